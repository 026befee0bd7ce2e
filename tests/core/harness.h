// SPDX-License-Identifier: Apache-2.0
// A test framework of one page. TEST(name) { ... } registers a test, which is run once for every instruction set that
// this processor has; CHECK counts a failure and goes on; RUN(kernel, ...) calls a kernel of the active table and
// remembers that it was called, so that a kernel without a test is noticed.
#pragma once
#include <string>

#include "dispatch.h"
#include "kernels.h"

namespace fvm::test {

struct Test {
  const char* name;
  void (*run)();
  Test(const char* name, void (*run)());  // joins the list of all tests
};

// Says where and what, with the words of the scopes that are open.
void fail(const char* file, int line, const std::string& what);

// Words for the failures inside of a block: the case that is being tested.
class Scope {
 public:
  explicit Scope(const std::string& words);
  ~Scope();
  Scope(const Scope&) = delete;
};

#define FVM_KERNEL_ID(name) name,
enum class KernelId : int { FVM_KERNELS(FVM_KERNEL_ID) count };
#undef FVM_KERNEL_ID

void count_call(KernelId kernel);

}  // namespace fvm::test

#define TEST(name)                                          \
  static void name();                                       \
  static const fvm::test::Test test_of_##name(#name, name); \
  static void name()

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) fvm::test::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define RUN(kernel, ...) (fvm::test::count_call(fvm::test::KernelId::kernel), fvm::kernels().kernel(__VA_ARGS__))
