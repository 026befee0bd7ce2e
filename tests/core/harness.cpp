// SPDX-License-Identifier: Apache-2.0
// core_tests [WORD]: runs the tests whose name contains WORD, all without one, on every usable instruction set.
// FVM_FAST_ISA=avx2 core_tests runs them on that one.
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <vector>

namespace fvm::test {
namespace {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

std::vector<std::string> scopes;
int failures = 0;
int64_t calls[int(KernelId::count)];
char running[256];  // for the message of a crash, which may not allocate

constexpr const char* kKernelNames[] = {
#define FVM_KERNEL_NAME(name) #name,
    FVM_KERNELS(FVM_KERNEL_NAME)};

#if !defined(__SANITIZE_ADDRESS__)  // which says it better
void say_where(int signal_number) {
  const char* said[] = {"\ncrashed (most likely past the end of a tensor) in ", running, "\n"};
  for (const char* text : said)
    if (write(STDERR_FILENO, text, strlen(text)) < 0) break;
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}
#endif

// Every kernel is called with each instruction set, or this is a failure.
void check_all_called(const std::string& isa) {
  for (int k = 0; k < int(KernelId::count); k++)
    if (calls[k] == 0)
      fail(__FILE__, __LINE__, isa + ": expected a test that calls " + kKernelNames[k] + ", got none; add one here");
}

void run_all(const std::string& isa, const char* word) {
  using clock = std::chrono::steady_clock;
  set_isa(isa);
  memset(calls, 0, sizeof calls);
  for (const Test& test : tests()) {
    if (!strstr(test.name, word)) continue;
    snprintf(running, sizeof running, "%s %s", isa.c_str(), test.name);
    const Scope scope(running);
    const auto start = clock::now();
    test.run();
    printf("%-48s %7.2f s\n", running, std::chrono::duration<double>(clock::now() - start).count());
    fflush(stdout);
  }
  if (!*word) check_all_called(isa);
}

}  // namespace

Test::Test(const char* name, void (*run)()) : name(name), run(run) { tests().push_back(*this); }

Scope::Scope(const std::string& words) { scopes.push_back(words); }
Scope::~Scope() { scopes.pop_back(); }

void fail(const char* file, int line, const std::string& what) {
  std::string where;
  for (const std::string& words : scopes) where += words + ": ";
  fprintf(stderr, "%s:%d: %s%s\n", file, line, where.c_str(), what.c_str());
  failures++;
}

void count_call(KernelId kernel) { calls[int(kernel)]++; }

}  // namespace fvm::test

int main(int argc, char** argv) {
  using namespace fvm::test;
#if !defined(__SANITIZE_ADDRESS__)
  signal(SIGSEGV, say_where);
  signal(SIGBUS, say_where);
#endif
  const std::string error = fvm::isa_error();
  if (!error.empty()) fail(__FILE__, __LINE__, error);
  const char* wanted = std::getenv("FVM_FAST_ISA");
  const auto isas = wanted && *wanted ? std::vector<std::string>{fvm::kernels().isa} : fvm::isas_usable();
  for (const std::string& isa : isas)
    if (error.empty()) run_all(isa, argc > 1 ? argv[1] : "");
  if (failures == 0 && running[0] == 0) fail(__FILE__, __LINE__, "expected a test of that name, got none");
  printf("%s\n", failures ? "FAILED" : "passed");
  return failures != 0;
}
