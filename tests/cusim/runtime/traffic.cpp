// SPDX-License-Identifier: Apache-2.0
#include "traffic.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "emulation.h"

namespace cusim {

namespace {

std::vector<Launch> launches;
std::vector<Line> lines;
std::map<std::tuple<const void*, int, Access>, Line> lines_of_launch;

auto place(const Event& e) { return std::make_tuple(e.pc, e.region, e.access); }

// Distinct values of address / unit over the request.
template <class F> size_t distinct(const Event* first, const Event* last, uintptr_t unit, F&& use) {
  uintptr_t seen[kLanes * 5];
  size_t n = 0;
  for (const Event* e = first; e != last; e++)
    for (uintptr_t u = e->address / unit; u <= (e->address + e->bytes - 1) / unit && n < kLanes * 5; u++) seen[n++] = u;
  std::sort(seen, seen + n);
  n = std::unique(seen, seen + n) - seen;
  for (size_t i = 0; i < n; i++) use(seen[i]);
  return n;
}

// Shared memory serves 4-byte accesses of 32 lanes at once, 8-byte ones by half-warps, 16-byte ones by quarters; each
// part takes as many wavefronts as the fullest bank has different words.
void count_wavefronts(Line& line, const Event* first, const Event* last) {
  const int lanes = first->bytes <= 4 ? kLanes : first->bytes == 8 ? kLanes / 2 : kLanes / 4;
  while (first != last) {
    const int part = first->lane / lanes;
    const Event* end = std::find_if(first, last, [&](const Event& e) { return e.lane / lanes != part; });
    int words[32] = {}, fullest = 0;
    distinct(first, end, 4, [&](uintptr_t word) { fullest = std::max(fullest, ++words[word % 32]); });
    line.wavefronts += fullest;
    line.ideal_wavefronts += 1;
    first = end;
  }
}

void count_request(const Event* first, const Event* last) {
  Line& line = lines_of_launch[place(*first)];
  line.pc = first->pc;
  line.region = first->region;
  line.access = int(first->access);
  line.bytes_per_lane = first->bytes;
  line.requests++;
  for (const Event* e = first; e != last; e++) line.bytes += e->bytes, line.unique += e->first_touched;
  if (first->region == kSharedRegion)
    count_wavefronts(line, first, last);
  else
    line.sectors += distinct(first, last, 32, [](uintptr_t) {});
}

}  // namespace

void begin_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  launches.push_back({kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, 0, 0, 0, 0, 0});
}

Launch& this_launch() { return launches.back(); }

void end_launch() {
  for (auto& [where, line] : lines_of_launch) {
    line.launch = int(launches.size()) - 1;
    lines.push_back(line);
  }
  lines_of_launch.clear();
}

void clear_traffic() {
  launches.clear();
  lines.clear();
  lines_of_launch.clear();
}

void count(const void* pc, int region, uintptr_t address, unsigned bytes, Access access, unsigned first_touched) {
  block.warps[current->warp()].events.push_back(
      {pc, address, region, 0, uint8_t(bytes), uint8_t(current->lane()), uint8_t(first_touched), access});
}

void flush(Warp& warp) {
  std::vector<Event>& events = warp.events;
  auto by = [](auto key) { return [key](const Event& a, const Event& b) { return key(a) < key(b); }; };
  std::stable_sort(events.begin(), events.end(),
                   by([](const Event& e) { return std::tuple_cat(place(e), std::make_tuple(e.lane)); }));
  for (size_t i = 1; i < events.size(); i++)
    if (place(events[i]) == place(events[i - 1]) && events[i].lane == events[i - 1].lane)
      events[i].turn = events[i - 1].turn + 1;
  auto request = [](const Event& e) { return std::tuple_cat(place(e), std::make_tuple(e.turn)); };
  std::stable_sort(events.begin(), events.end(), by(request));
  for (size_t i = 0, j = 0; i < events.size(); i = j) {
    while (j < events.size() && request(events[j]) == request(events[i])) j++;
    count_request(&events[i], &events[i] + (j - i));
  }
  events.clear();
}

}  // namespace cusim

extern "C" int64_t cusim_lines(const cusim::Line** first) {
  *first = cusim::lines.data();
  return int64_t(cusim::lines.size());
}

extern "C" int64_t cusim_launches(const cusim::Launch** first) {
  *first = cusim::launches.data();
  return int64_t(cusim::launches.size());
}
