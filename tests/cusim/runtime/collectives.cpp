// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: each deposits its part and waits until all lanes of the mask that have not
// returned are there. Fragment layouts are those of the PTX manual ("Matrix fragments for mma.m16n8k16", "ldmatrix").
#include <algorithm>
#include <cstring>

#include "emulation.h"
#include "memory.h"
#include "report.h"

#define CALLER __builtin_return_address(0)

namespace cusim {

namespace {

const char* name(Collective what) {
  const char* names[] = {"a shuffle", "a vote", "a match", "__syncwarp", "ldmatrix", "mma"};
  return names[int(what)];
}

template <class T> T take(const std::byte* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

// Every lane of the mask now knows what any of them knew, and its time goes on.
void join_clocks(Warp& warp, unsigned mask) {
  uint32_t joined[kLanes] = {};
  for (int a = 0; a < kLanes; a++)
    for (int b = 0; b < kLanes && (mask >> a & 1); b++) joined[b] = std::max(joined[b], warp.clock[a][b]);
  for (int a = 0; a < kLanes; a++)
    if (mask >> a & 1) {
      memcpy(warp.clock[a], joined, sizeof joined);
      warp.clock[a][a]++;
    }
}

float to_float(uint32_t half, bool bf16) {
  if (bf16) return take<float>(reinterpret_cast<const std::byte*>(&(half <<= 16)));
  return __half2float(__half(__half_raw{uint16_t(half)}));
}

// The parts of lane l, with g = l / 4 and t = l % 4; products are exact, sums are rounded to float in the order of k.
void multiply(Exchange& e, int turn) {
  float a[16][16], b[16][8], d[16][8];
  const bool bf16 = take<uint32_t>(e.in[turn][0] + 40) != 0;
  for (int l = 0; l < kLanes; l++) {
    const int g = l / 4, t = l % 4;
    const std::byte* part = e.in[turn][l];
    for (int i = 0; i < 4; i++)
      for (int half = 0; half < 2; half++)
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = to_float(take<uint16_t>(part + 4 * i + 2 * half), bf16);
    for (int i = 0; i < 2; i++)
      for (int half = 0; half < 2; half++)
        b[2 * t + i * 8 + half][g] = to_float(take<uint16_t>(part + 16 + 4 * i + 2 * half), bf16);
    for (int i = 0; i < 4; i++) d[g + i / 2 * 8][2 * t + i % 2] = take<float>(part + 24 + 4 * i);
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < kLanes; l++)
    for (int i = 0; i < 4; i++) memcpy(e.out[turn][l] + 4 * i, &d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2], 4);
}

void complete(Warp& warp, Exchange& e) {
  const int turn = e.turn % 2;
  if (e.what == Collective::warp_barrier) join_clocks(warp, e.arrived);
  if (e.what == Collective::mma) multiply(e, turn);
  if (e.what == Collective::ldmatrix)  // each lane's row, as it is now
    for (int l = 0; l < kLanes; l++)
      if (const void* row = take<const void*>(e.in[turn][l])) memcpy(e.out[turn][l], row, 16);
  const int first = int(&warp - block.warps.data()) * kLanes;
  for (int l = 0; l < kLanes; l++)
    if (e.arrived >> l & 1) block.threads[first + l].state = State::ready;
  e.met[turn] = e.arrived;
  e.arrived = 0;
  e.turn++;
}

Exchange& exchange_of(Warp& warp, unsigned mask) {
  for (auto& e : warp.exchanges)
    if (e->mask == mask) return *e;
  warp.exchanges.push_back(std::make_unique<Exchange>());
  warp.exchanges.back()->mask = mask;
  return *warp.exchanges.back();
}

struct Part {
  Exchange& exchange;
  int turn;
  const std::byte* of(int lane) const { return exchange.in[turn][lane]; }
  bool has(int lane) const { return exchange.met[turn] >> lane & 1; }
};

// Deposits `bytes` of this lane and returns when the collective is complete.
Part meet(Collective what, unsigned mask, const void* in, size_t bytes, Site site) {
  const void* pc = site.pc;
  Warp& warp = block.warps[current->warp()];
  Exchange& e = exchange_of(warp, mask);
  if (!(mask >> current->lane() & 1)) {
    report("divergence", pc, "%s by lane %d, which its mask %#x leaves out", name(what), current->lane(), mask);
    abort_launch();
  }
  if (e.arrived && (e.what != what || !(e.site == site))) {
    report("divergence", pc, "%s, while other lanes of the mask %#x are in %s, line %d", name(what), mask, name(e.what),
           e.site.line);
    abort_launch();
  }
  const int turn = e.turn % 2;
  e.what = what;
  e.site = site;
  e.arrived |= 1u << current->lane();
  if (bytes > 0) memcpy(e.in[turn][current->lane()], in, bytes);
  current->state = State::in_collective;
  current->waits_at = site;
  if (e.arrived == (mask & warp.live)) complete(warp, e);
  if (current->state != State::ready || config.schedule == Schedule::random) wait();
  return {e, turn};
}

// ldmatrix and mma want the whole warp.
void need_full_warp(const char* what, const void* pc) {
  if (block.warps[current->warp()].live == ~0u) return;
  report("divergence", pc, "%s in a warp that has not all its 32 lanes", what);
  abort_launch();
}

// The lane a shuffle reads, as the manual says for segments of `width` lanes.
int source_lane(Shuffle how, int operand, int width) {
  const int lane = current->lane(), first = lane & ~(width - 1), last = first + width - 1;
  int from = 0;
  if (how == Shuffle::index) from = first | (operand & (width - 1));
  if (how == Shuffle::up) from = lane - operand;
  if (how == Shuffle::down) from = lane + operand;
  if (how == Shuffle::exclusive_or) from = lane ^ operand;
  const bool outside = how == Shuffle::up ? from < first : from > last;
  return outside ? lane : from;
}

}  // namespace

void complete_on_exit(Warp& warp) {
  for (auto& e : warp.exchanges)
    if (e->arrived && e->arrived == (e->mask & warp.live)) complete(warp, *e);
}

void shuffle(unsigned mask, Shuffle how, int operand, int width, void* value, unsigned bytes, const char* file,
             int line) {
  const int from = source_lane(how, operand, width);
  const Part part = meet(Collective::shuffle, mask, value, bytes, {CALLER, file, line});
  if (part.has(from))
    memcpy(value, part.of(from), bytes);
  else
    report("shuffle", CALLER, "a shuffle reads lane %d, which %s", from,
           mask >> from & 1 ? "has returned or does not exist" : "its mask leaves out");
}

unsigned ballot(unsigned mask, int predicate, const char* file, int line) {
  const uint32_t yes = predicate != 0;
  const Part part = meet(Collective::ballot, mask, &yes, sizeof yes, {CALLER, file, line});
  unsigned votes = 0;
  for (int l = 0; l < kLanes; l++)
    if (part.has(l)) votes |= take<uint32_t>(part.of(l)) << l;
  return votes;
}

unsigned match_any(unsigned mask, uint64_t value, const char* file, int line) {
  const Part part = meet(Collective::match, mask, &value, sizeof value, {CALLER, file, line});
  unsigned equal = 0;
  for (int l = 0; l < kLanes; l++)
    if (part.has(l)) equal |= unsigned(take<uint64_t>(part.of(l)) == value) << l;
  return equal;
}

void warp_barrier(unsigned mask, const char* file, int line) {
  meet(Collective::warp_barrier, mask, nullptr, 0, {CALLER, file, line});
}

unsigned active_lanes() { return block.warps[current->warp()].live; }

void ldmatrix(uint32_t* tiles, const void* row, int matrices, bool transposed) {
  const int l = current->lane();
  const uintptr_t address = reinterpret_cast<uintptr_t>(row);
  need_full_warp("ldmatrix", CALLER);
  this_launch().ldmatrix += l == 0;
  const bool gives_row = l < 8 * matrices;
  if (gives_row && (!is_shared(address) || address % 16)) {
    report("misaligned", CALLER, "ldmatrix from %#zx: rows are in shared memory, at multiples of 16", size_t(address));
    abort_launch();
  }
  if (gives_row && config.check && !check(CALLER, address, 16, Access::read, true)) abort_launch();
  const void* given = gives_row ? row : nullptr;
  const Part part = meet(Collective::ldmatrix, ~0u, &given, sizeof given, {CALLER});
  for (int m = 0; m < matrices; m++) {
    uint16_t halves[2];
    for (int i = 0; i < 2; i++) {
      const int r = transposed ? 2 * (l % 4) + i : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + i;
      halves[i] = take<uint16_t>(part.exchange.out[part.turn][8 * m + r] + 2 * column);
    }
    memcpy(&tiles[m], halves, 4);
  }
}

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16) {
  need_full_warp("mma", CALLER);
  this_launch().mma += current->lane() == 0;
  const uint32_t b[2] = {b0, b1}, type = bf16;
  std::byte in[44];
  memcpy(in, a, 16);
  memcpy(in + 16, b, 8);
  memcpy(in + 24, d, 16);
  memcpy(in + 40, &type, 4);
  const Part part = meet(Collective::mma, ~0u, in, sizeof in, {CALLER});
  memcpy(d, part.exchange.out[part.turn][current->lane()], 16);
}

}  // namespace cusim
