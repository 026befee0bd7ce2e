// SPDX-License-Identifier: Apache-2.0
// What memory there is: the shared memory of the block, and the buffers that were registered with their exact extents.
// Whatever else a kernel touches is out of bounds.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cusim {

enum class Access : int;

void find_shared_memory();  // of the calling OS thread: the thread-local segment of this library
bool is_shared(uintptr_t address);
void forget_launch();            // what earlier launches did is ordered before what comes
void forget_block();             // shared memory: its contents are gone, and NaN
size_t static_shared_touched();  // bytes outside the dynamic array that the block touched

// Checks and counts an access of the running thread. False: it must not be carried out.
bool check(const void* pc, uintptr_t address, unsigned bytes, Access access, bool aligned);

// cp.async: its destination is untouchable from issue to arrival, and is written by whoever waited for it.
bool check_async_write(const void* pc, uintptr_t shared, unsigned bytes);
void arrive(uintptr_t shared, unsigned bytes);

}  // namespace cusim
