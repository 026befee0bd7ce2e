// SPDX-License-Identifier: Apache-2.0
// Runs the blocks of a launch, and the threads of a block until all have returned or none can go on.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>

#include "emulation.h"
#include "memory.h"
#include "report.h"

// The storage behind fvm::dynamic_shared; the static arrays of the kernels lie around it.
namespace fvm {
alignas(1024) thread_local unsigned char dynamic_shared_memory[cusim::kSharedOptIn];
}

namespace cusim {

Config config;
Block block;
Thread* current = nullptr;
Body body;
bool aborted = false;
cudaError_t last_error = cudaSuccess;

uint3 thread_index() { return current->index; }
uint3 block_index() { return block.index; }
dim3 block_dim() { return block.block_dim; }
dim3 grid_dim() { return block.grid_dim; }

bool Site::operator==(const Site& o) const {
  return line == o.line && (file == o.file || (file && o.file && !strcmp(file, o.file)));
}

namespace {

Fiber scheduler;
std::mt19937 random_order;
std::map<const void*, size_t> allowed;

void release_barrier() {
  for (Thread& t : block.threads)
    if (t.state == State::at_barrier) t.state = State::ready;
  for (Warp& w : block.warps) flush(w);
  block.waiting = 0;
  block.barriers++;
  block.result = block.votes;
  this_launch().barriers++;
}

void thread_main() {
  body.function(body.arguments);
  Thread& me = *current;
  const bool pending =
      std::any_of(me.groups.begin(), me.groups.end(), [](const auto& group) { return !group.empty(); });
  if (pending || !me.uncommitted.empty())
    report("in_flight", (me.uncommitted.empty() ? me.groups.back().back() : me.uncommitted.back()).pc,
           "the thread returned while its cp.async was under way; wait for it");
  me.state = State::done;
  block.live--;
  Warp& warp = block.warps[me.warp()];
  warp.live &= ~(1u << me.lane());
  complete_on_exit(warp);
  if (block.waiting > 0 && block.waiting == block.live) release_barrier();
  wait();
  __builtin_unreachable();
}

void prepare_block(uint32_t linear) {
  static uint32_t serial = 0;
  const dim3 g = block.grid_dim, b = block.block_dim;
  block.linear = linear;
  block.serial = ++serial;
  block.index = uint3{linear % g.x, linear / g.x % g.y, linear / g.x / g.y};
  block.live = block.size;
  block.waiting = block.barriers = 0;
  block.warps.resize((block.size + kLanes - 1) / kLanes);
  for (Warp& w : block.warps) {
    memset(w.clock, 0, sizeof w.clock);
    for (int lane = 0; lane < kLanes; lane++) w.clock[lane][lane] = 1;
    w.live = 0;
    w.exchanges.clear();
    w.events.clear();
  }
  block.threads.resize(block.size);
  for (int i = 0; i < block.size; i++) {
    Thread& t = block.threads[i];
    t.linear = i;
    t.index = uint3{i % b.x, i / b.x % b.y, i / b.x / b.y};
    t.state = State::ready;
    t.stack = stack_of(i);
    t.uncommitted.clear();
    t.groups.clear();
    block.warps[t.warp()].live |= 1u << t.lane();
    make_fiber(t.fiber, t.stack, kStackBytes, thread_main);
  }
  forget_block();
}

void order_for(std::vector<int>& order) {
  if (config.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random_order);
}

std::vector<int> first_order(uint32_t n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (config.schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  order_for(order);
  return order;
}

void report_deadlock() {
  const Thread* waiting = nullptr;
  int at_barrier = 0, in_collective = 0;
  for (const Thread& t : block.threads) {
    at_barrier += t.state == State::at_barrier;
    in_collective += t.state == State::in_collective;
    if (t.state != State::done && !waiting) waiting = &t;
  }
  report("deadlock", waiting->waits_at.pc,
         "nobody can go on: %d threads wait at a barrier of the block, %d in a warp function, %d have returned",
         at_barrier, in_collective, block.size - at_barrier - in_collective);
  aborted = true;
}

void run_block() {
  std::vector<int> order = first_order(block.size);
  while (block.live > 0 && !aborted) {
    bool progress = false;
    for (int i : order) {
      if (block.threads[i].state != State::ready) continue;
      progress = true;
      current = &block.threads[i];
      switch_fiber(scheduler, current->fiber);
      current = nullptr;
      if (aborted) return;
    }
    if (!progress) report_deadlock();
    order_for(order);
  }
  for (Warp& w : block.warps) flush(w);
}

// What the driver would refuse.
cudaError_t refusal(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes) {
  const uint64_t size = uint64_t(threads.x) * threads.y * threads.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (size < 1 || size > kMaxThreads || threads.z > 64) {
    report("launch", kernel, "a block of %u x %u x %u threads; at most 1024, and 64 in z", threads.x, threads.y,
           threads.z);
    return cudaErrorInvalidConfiguration;
  }
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    report("launch", kernel, "a grid of %u x %u x %u blocks; 1 to 2^31 - 1 in x, to 65535 in y and z", grid.x, grid.y,
           grid.z);
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > allowed_shared(kernel)) {
    report("launch", kernel, "%zu bytes of dynamic shared memory, where %zu are allowed", shared_bytes,
           allowed_shared(kernel));
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

void check_static_shared(const void* kernel) {
  const size_t touched = static_shared_touched();
  this_launch().static_shared_bytes = std::max<uint64_t>(this_launch().static_shared_bytes, touched);
  if (touched + block.shared_bytes > std::max(kSharedDefault, allowed_shared(kernel)))
    report("launch", kernel, "%zu bytes of static and %zu of dynamic shared memory, where %zu are allowed in all",
           touched, block.shared_bytes, allowed_shared(kernel));
}

}  // namespace

void wait() {
  Thread* me = current;
  switch_fiber(me->fiber, scheduler);
}

void abort_launch() {
  aborted = true;
  wait();
  __builtin_unreachable();
}

size_t allowed_shared(const void* kernel) {
  const auto it = allowed.find(kernel);
  return it == allowed.end() ? kSharedDefault : it->second;
}

void forget_allowances() { allowed.clear(); }
void allow_shared(const void* kernel, size_t bytes) { allowed[kernel] = bytes; }

int barrier(int predicate, Vote vote, const char* file, int line) {
  const Site site{__builtin_return_address(0), file, line};
  if (block.waiting == 0) block.barrier = site;
  if (!(block.barrier == site)) {
    report("divergence", site.pc, "__syncthreads, while other threads wait at another one, line %d",
           block.barrier.line);
    abort_launch();
  }
  if (block.waiting == 0) block.votes = vote == Vote::all;
  const bool yes = predicate != 0;
  block.votes = vote == Vote::all ? block.votes && yes : vote == Vote::any ? block.votes || yes : block.votes + yes;
  current->state = State::at_barrier;
  current->waits_at = site;
  if (++block.waiting == block.live) release_barrier();
  if (current->state != State::ready || config.schedule == Schedule::random) wait();
  return block.result;
}

void run(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes, void (*function)(const void*),
         const void* arguments, size_t arguments_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  block.index = uint3{0, 0, 0};
  last_error = refusal(kernel, grid, threads, shared_bytes);
  if (last_error != cudaSuccess) return;
  find_shared_memory();
  forget_launch();
  begin_launch(kernel, grid, threads, shared_bytes);
  body = {function, arguments, arguments_bytes};
  aborted = false;
  random_order.seed(config.seed);
  block.grid_dim = grid, block.block_dim = threads;
  block.size = threads.x * threads.y * threads.z;
  block.shared_bytes = shared_bytes;
  for (int linear : first_order(grid.x * grid.y * grid.z)) {
    prepare_block(linear);
    run_block();
    if (config.check) check_static_shared(kernel);
    if (aborted) break;
  }
  end_launch();
  if (aborted) last_error = cudaErrorIllegalAddress;
}

}  // namespace cusim
