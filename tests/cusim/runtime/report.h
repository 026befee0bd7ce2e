// SPDX-License-Identifier: Apache-2.0
// Findings: what a kernel did wrong, once for each place, with the first instance in words.
#pragma once
#include <cstdint>

namespace cusim {

struct Finding {  // read by emulator.py: keep the two alike
  char kind[16];
  const void* pc;    // in the kernels' code; or else
  const char* file;  // the source line itself
  int32_t line, thread;
  uint32_t block[3];
  uint32_t count;
  char text[256];
};

// Kinds: race, out_of_bounds, uninitialised, misaligned, read_only, in_flight, divergence, deadlock, shuffle, launch.
void report(const char* kind, const void* pc, const char* format, ...) __attribute__((format(printf, 3, 4)));
void report_at(const char* kind, const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

void clear_findings();

}  // namespace cusim
