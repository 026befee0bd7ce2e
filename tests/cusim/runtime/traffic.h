// SPDX-License-Identifier: Apache-2.0
// Counters of memory traffic. The accesses of a warp's lanes at one instruction form a request; requests are counted by
// instruction and buffer in bytes, 32-byte sectors (global) and wavefronts (shared: 32 banks of 4 bytes).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace cusim {

enum class Access : int;
struct Warp;

constexpr int kSharedRegion = -1;  // else the number of the buffer

struct Event {  // one lane's access
  const void* pc;
  uintptr_t address;
  int32_t region;
  uint32_t turn;  // how many times this lane was here before, since the last flush
  uint8_t bytes, lane, first_touched;
  Access access;
};

struct Line {  // read by emulator.py: keep the two alike
  const void* pc;
  int32_t launch, region, access, bytes_per_lane;
  uint64_t requests, bytes, unique, sectors, wavefronts, ideal_wavefronts;
};

struct Launch {  // read by emulator.py
  const void* kernel;
  uint32_t grid[3], block[3];
  uint64_t shared_bytes, static_shared_bytes, mma, ldmatrix, cp_async, barriers;
};

void begin_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);
Launch& this_launch();
void end_launch();
void clear_traffic();

// Adds a lane's access; `first_touched` of its bytes had not been read (or written) before in this launch.
void count(const void* pc, int region, uintptr_t address, unsigned bytes, Access access, unsigned first_touched);

// Groups what the lanes of a warp did since the last time into requests. Called where all of them have stopped.
void flush(Warp& warp);

}  // namespace cusim
