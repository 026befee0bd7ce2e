// SPDX-License-Identifier: Apache-2.0
#include "fibers.h"

#include <sys/mman.h>

#include <vector>

#if !defined(__x86_64__) && !defined(CUSIM_UCONTEXT)
#define CUSIM_UCONTEXT
#endif

#ifndef CUSIM_UCONTEXT
// System V x86-64: rbx, rbp, r12 to r15 and the stack pointer belong to the caller.
extern "C" void cusim_switch(void** save, void* load);
asm(R"(
    .text
    .globl cusim_switch
    .hidden cusim_switch
    .type cusim_switch, @function
cusim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cusim_switch, . - cusim_switch
)");
#endif

namespace cusim {

#ifdef CUSIM_UCONTEXT

void make_fiber(Fiber& fiber, std::byte* stack, size_t size, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

void make_fiber(Fiber& fiber, std::byte* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size - 64);  // 16-byte aligned after the return address, as at a call
  *--top = nullptr;                                          // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) { cusim_switch(&from.stack_pointer, to.stack_pointer); }

#endif

std::byte* stack_of(int i) {
  constexpr size_t kGuard = 64 << 10;  // a multiple of every page size
  static std::vector<std::byte*> stacks;
  while (int(stacks.size()) <= i) {
    void* memory = mmap(nullptr, kGuard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, kGuard, PROT_NONE);
    stacks.push_back(static_cast<std::byte*>(memory) + kGuard);
  }
  return stacks[i];
}

}  // namespace cusim
