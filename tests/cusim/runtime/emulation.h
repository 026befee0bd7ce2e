// SPDX-License-Identifier: Apache-2.0
// What is running: the launch, its block, the threads and warps of that block. One launch at a time in a process,
// blocks one after another, the threads of a block as fibers that change only where a thread has to wait.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda_on_cpu.h"
#undef memcpy
#undef memset
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#undef warpSize
#include "fibers.h"
#include "traffic.h"

namespace cusim {

constexpr int kLanes = 32, kMaxThreads = 1024;
constexpr size_t kSharedDefault = 48 << 10;  // bytes of a block without the attribute
constexpr size_t kSharedOptIn = 99 << 10;    // with it: what the smallest of sm_80 to sm_120 have

enum class Schedule : int { forward = 0, reverse = 1, random = 2 };
struct Config {
  Schedule schedule = Schedule::forward;
  uint32_t seed = 0;
  bool check = false;  // detect and count; needs kernels built with the hooks
};

struct Site {  // of a call that waits; two are the same where the source line is, since compilers double code
  const void* pc = nullptr;
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Site& other) const;
};

struct AsyncCopy {
  std::byte *to, data[16];
  int bytes;
  const void* pc;
};

enum class State { ready, at_barrier, in_collective, done };
struct Thread {
  Fiber fiber;
  std::byte* stack;
  uint3 index;
  int linear;
  State state;
  Site waits_at;
  std::vector<AsyncCopy> uncommitted;
  std::deque<std::vector<AsyncCopy>> groups;
  int lane() const { return linear % kLanes; }
  int warp() const { return linear / kLanes; }
};

enum class Collective { shuffle, ballot, match, warp_barrier, ldmatrix, mma };
struct Exchange {  // a collective of the lanes in `mask`; two turns, as fast lanes may be one ahead of slow ones
  unsigned mask = 0, arrived = 0, turn = 0;
  unsigned met[2] = {};  // the lanes that took part
  Collective what{};
  Site site;
  std::byte in[2][kLanes][48], out[2][kLanes][16];
};

struct Warp {
  uint32_t clock[kLanes][kLanes];  // [a][b]: what lane a knows of lane b's time; times pass at warp barriers
  unsigned live;                   // lanes that have not returned
  std::vector<std::unique_ptr<Exchange>> exchanges;
  std::vector<Event> events;
};

struct Block {
  dim3 grid_dim, block_dim;
  uint3 index;
  uint32_t linear, serial;  // its place in the grid; its number among all blocks ever run
  uint32_t barriers;        // passed so far
  int size, live, waiting;
  Site barrier;       // where the first of those waits
  int votes, result;  // so far; of the last barrier
  size_t shared_bytes;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

struct Body {
  void (*function)(const void*);
  const void* arguments;
  size_t bytes;
};

extern Config config;
extern Block block;
extern Thread* current;  // null outside kernels
extern Body body;
extern bool aborted;  // the launch is being cut short
extern cudaError_t last_error;

void wait();                       // gives the other threads a turn
[[noreturn]] void abort_launch();  // after a finding that leaves nothing sensible to go on with
void complete_on_exit(Warp& warp);
void allow_shared(const void* kernel, size_t bytes);
size_t allowed_shared(const void* kernel);
void forget_allowances();

}  // namespace cusim
