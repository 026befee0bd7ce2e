// SPDX-License-Identifier: Apache-2.0
// What the kernels' instrumentation calls. g++ -fsanitize=thread announces every load and store that may leave the
// function, -fsanitize=bounds every array index that does not fit: the calls end here instead of in the sanitizers.
#include <cstring>

#include "emulation.h"
#include "memory.h"
#include "report.h"

#define CALLER __builtin_return_address(0)

namespace cusim {

namespace {

// Registers and local memory of the thread, and the arguments of the kernel, are nobody else's business.
bool is_private(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(current->stack) < kStackBytes ||
         address - reinterpret_cast<uintptr_t>(body.arguments) < body.bytes;
}

void access(const void* pc, const void* address, size_t bytes, Access access, bool aligned) {
  if (!config.check || !current) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(address);
  if (!is_private(from) && !check(pc, from, unsigned(bytes), access, aligned)) abort_launch();
}

// A range is made of the widest accesses that a lane can do.
void access_range(const void* pc, const void* address, size_t bytes, Access kind) {
  const char* at = static_cast<const char*>(address);
  for (size_t done = 0; done < bytes; done += 16)
    access(pc, at + done, bytes - done < 16 ? bytes - done : 16, kind, false);
}

}  // namespace

void touch(const void* pc, const void* address, unsigned bytes, Access kind) { access(pc, address, bytes, kind, true); }
void touch_range(const void* pc, const void* address, size_t bytes, Access kind) {
  access_range(pc, address, bytes, kind);
}

}  // namespace cusim

using cusim::Access;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t n) { cusim::access_range(CALLER, p, n, Access::read); }
void __tsan_write_range(void* p, size_t n) { cusim::access_range(CALLER, p, n, Access::write); }

#define HOOKS(n)                                                                                 \
  void __tsan_read##n(void* p) { cusim::access(CALLER, p, n, Access::read, true); }              \
  void __tsan_write##n(void* p) { cusim::access(CALLER, p, n, Access::write, true); }            \
  void __tsan_unaligned_read##n(void* p) { cusim::access(CALLER, p, n, Access::read, false); }   \
  void __tsan_unaligned_write##n(void* p) { cusim::access(CALLER, p, n, Access::write, false); } \
  void __tsan_volatile_read##n(void* p) { cusim::access(CALLER, p, n, Access::read, true); }     \
  void __tsan_volatile_write##n(void* p) { cusim::access(CALLER, p, n, Access::write, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS

struct IndexCheck {
  const char* file;
  uint32_t line, column;
};  // the head of the sanitizer's own structure

void __ubsan_handle_out_of_bounds(IndexCheck* at, uintptr_t index) {
  if (!cusim::config.check || !cusim::current) return;
  cusim::report_at("out_of_bounds", at->file, int(at->line), "index %zd of an array that is smaller", ptrdiff_t(index));
  cusim::abort_launch();
}

}  // extern "C"
