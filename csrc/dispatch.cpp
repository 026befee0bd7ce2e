// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fvm {

// FVM_ISA_LIST is given by the build: X(x86_64) X(avx2) ... for the tables that were compiled, plainest first.
#define X(isa) extern const Kernels kernels_##isa;
FVM_ISA_LIST
#undef X

static bool runs_here(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // x86-64-v3 in the words of __builtin_cpu_supports; its remaining members (movbe, lzcnt) came with the same processors
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "x86_64" || isa == "neon";
}

static std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> all;
#define X(isa) all.push_back(&kernels_##isa);
  FVM_ISA_LIST
#undef X
  return all;
}

static std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Kernels* t : tables()) names.push_back(t->isa);
  return names;
}

std::vector<std::string> isas_usable() {
  std::vector<std::string> names;
  for (const Kernels* t : tables())
    if (runs_here(t->isa)) names.push_back(t->isa);
  return names;
}

static const Kernels* find(const std::string& name) {
  for (const Kernels* t : tables())
    if (name == t->isa && runs_here(name)) return t;
  throw std::invalid_argument("FVM_FAST_ISA: expected one of " + join(isas_usable()) + " (built: " +
                              join(isas_built()) + "; this processor runs the former), got '" + name + "'");
}

static const Kernels*& active() {
  static const Kernels* table = isas_usable().empty() ? tables().front() : find(isas_usable().back());
  return table;
}

std::string isa_error() {
  const char* wanted = std::getenv("FVM_FAST_ISA");
  if (isas_usable().empty())
    return "the compiled core was built for " + join(isas_built()) +
           ", and this processor runs none of them; build it here: "
           "pip install --force-reinstall --no-cache-dir --no-deps fvm_fast";
  try {
    if (wanted && *wanted) set_isa(wanted);
    return "";
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

const Kernels& kernels() { return *active(); }
void set_isa(const std::string& name) { active() = find(name); }

}  // namespace fvm
