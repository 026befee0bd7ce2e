// SPDX-License-Identifier: Apache-2.0
// Fibers: one for each CUDA thread of a block, all on the calling OS thread, switched by hand. x86-64 swaps the
// callee-saved registers in some twenty instructions; elsewhere, or with CUSIM_UCONTEXT, the C library's ucontext does
// it more slowly.
#pragma once
#include <ucontext.h>

#include <cstddef>

namespace cusim {

union Fiber {
  void* stack_pointer;  // where the registers lie
  ucontext_t context;
};

// Prepares a fiber that starts in `entry`, which never returns, on the stack [stack, stack + size).
void make_fiber(Fiber& fiber, std::byte* stack, size_t size, void (*entry)());

// Saves the running fiber in `from` and goes on in `to`.
void switch_fiber(Fiber& from, Fiber& to);

constexpr size_t kStackBytes = 256 << 10;

// The stack of the i-th thread of a block. Stacks are kept; the page below each is not mapped, so that overflow is a
// fault.
std::byte* stack_of(int i);

}  // namespace cusim
