// SPDX-License-Identifier: Apache-2.0
// cp.async, which arrives as late as it may: the bytes are taken at once, and written when their group is waited for.
// Until then the destination is NaN, and touching it is a finding.
#include <cstring>

#include "emulation.h"
#include "memory.h"
#include "report.h"

#define CALLER __builtin_return_address(0)

namespace cusim {

void cp_async(void* shared, const void* global, int bytes, int from_global) {
  const uintptr_t to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (!is_shared(to) || is_shared(from)) {
    report("out_of_bounds", CALLER, "cp.async to %#zx from %#zx: it goes from global to shared memory", size_t(to),
           size_t(from));
    abort_launch();
  }
  if (to % bytes || from % bytes) {
    report("misaligned", CALLER, "cp.async of %d bytes to %#zx from %#zx: both have to be multiples of that", bytes,
           size_t(to), size_t(from));
    abort_launch();
  }
  AsyncCopy copy{static_cast<std::byte*>(shared), {}, bytes, CALLER};
  if (config.check && from_global > 0 && !check(CALLER, from, from_global, Access::read, false)) abort_launch();
  memcpy(copy.data, global, from_global);
  if (config.check && !check_async_write(CALLER, to, bytes)) abort_launch();
  memset(shared, 0xff, bytes);
  this_launch().cp_async++;
  current->uncommitted.push_back(copy);
}

void cp_async_commit() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void cp_async_wait(int groups_under_way) {
  while (int(current->groups.size()) > groups_under_way) {
    for (const AsyncCopy& copy : current->groups.front()) {
      memcpy(copy.to, copy.data, copy.bytes);
      if (config.check) arrive(reinterpret_cast<uintptr_t>(copy.to), copy.bytes);
    }
    current->groups.pop_front();
  }
}

}  // namespace cusim
