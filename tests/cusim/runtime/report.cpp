// SPDX-License-Identifier: Apache-2.0
#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

#include "emulation.h"

namespace cusim {

namespace {

std::vector<Finding> findings;

void add(const char* kind, const void* pc, Site site, const char* format, va_list words) {
  for (Finding& f : findings)
    if (!strcmp(f.kind, kind) && f.pc == pc && Site{nullptr, f.file, f.line} == site) {
      f.count++;
      return;
    }
  Finding f{};
  snprintf(f.kind, sizeof f.kind, "%s", kind);
  vsnprintf(f.text, sizeof f.text, format, words);
  f.pc = pc;
  f.file = site.file;
  f.line = site.line;
  f.thread = current ? current->linear : -1;
  f.block[0] = block.index.x, f.block[1] = block.index.y, f.block[2] = block.index.z;
  f.count = 1;
  findings.push_back(f);
}

}  // namespace

void report(const char* kind, const void* pc, const char* format, ...) {
  va_list words;
  va_start(words, format);
  add(kind, pc, {}, format, words);
  va_end(words);
}

void report_at(const char* kind, const char* file, int line, const char* format, ...) {
  va_list words;
  va_start(words, format);
  add(kind, nullptr, {nullptr, file, line}, format, words);
  va_end(words);
}

void clear_findings() { findings.clear(); }

}  // namespace cusim

extern "C" int64_t cusim_findings(const cusim::Finding** first) {
  *first = cusim::findings.data();
  return int64_t(cusim::findings.size());
}
