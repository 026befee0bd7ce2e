// SPDX-License-Identifier: Apache-2.0
// Shadow memory: for every byte, who wrote and read it last. An access is right when it reads what was written and each
// earlier access that it conflicts with happened before it: in the same thread, before a barrier of the block, or
// before a warp barrier (a vector clock a lane). So a missing barrier is found whatever order the threads happened to
// run in.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cusim {

enum class Access : int;

struct Write {
  uint32_t block, barriers, clock;
  uint16_t thread;
  bool atomic;
};
struct Readers {  // lanes of one warp, between two barriers
  uint32_t block, barriers, clock, lanes;
  uint16_t warp;
};
struct Cell {    // of one byte; all zero is the state before the first access
  uint32_t age;  // the launch (or, in shared memory, block) that the rest is about
  bool in_flight, read, written;
  Write write;
  Readers readers[2];  // two that are unordered: a writer is not in both
};

// Memory with its shadow. Cells start as zeros that the system provides, so that only what is touched costs anything.
struct Region {
  uintptr_t begin = 0, end = 0;
  std::string name;
  bool read_only = false;
  std::vector<bool> initialised;
  Cell* cells = nullptr;
};

Region make_region(uintptr_t begin, size_t bytes, const char* name, bool initialised, bool read_only);

// Checks an access of the running thread to bytes that lie within a region. Returns how many of them are read (or
// written) for the first time in this age; adds to `untouched` those that are neither.
unsigned check_bytes(Region& region, uint32_t age, uintptr_t address, unsigned bytes, Access access, bool async,
                     const void* pc, size_t& untouched);

// A cp.async of the running thread has arrived in shared memory.
void arrive_in(Region& region, uintptr_t address, unsigned bytes);

}  // namespace cusim
