// SPDX-License-Identifier: Apache-2.0
#include "shadow.h"

#include <cstdlib>

#include "emulation.h"
#include "report.h"

namespace cusim {

namespace {

uint32_t* clock_of(int thread) { return block.warps[thread / kLanes].clock[thread % kLanes]; }
uint32_t now() { return clock_of(current->linear)[current->lane()]; }

bool happened_before(const Write& w) {
  if (w.block != block.linear) return false;
  if (w.thread == current->linear || w.barriers < block.barriers) return true;
  return w.thread / kLanes == current->warp() && clock_of(current->linear)[w.thread % kLanes] >= w.clock;
}

bool happened_before(const Readers& r) {
  if (r.lanes == 0) return true;
  if (r.block != block.linear) return false;
  if (r.barriers < block.barriers) return true;
  if (r.warp != current->warp()) return false;
  for (int lane = 0; lane < kLanes; lane++)
    if ((r.lanes >> lane & 1) && lane != current->lane() && clock_of(current->linear)[lane] < r.clock) return false;
  return true;
}

void note_reader(Cell& cell) {
  const uint32_t me = 1u << current->lane();
  const Readers mine{block.linear, block.barriers, now(), me, uint16_t(current->warp())};
  Readers *a = &cell.readers[0], *b = &cell.readers[1];
  for (Readers* r : {a, b})
    if (r->lanes && r->block == mine.block && r->warp == mine.warp && r->barriers == mine.barriers) {
      if (r->clock != mine.clock && happened_before(*r))
        *r = mine;
      else
        r->lanes |= me;
      return;
    }
  for (Readers* r : {a, b})
    if (happened_before(*r)) {
      *r = mine;
      return;
    }
  if (a->block == b->block && a->block != mine.block) *b = mine;
}

// What is wrong with an access, one flag a kind, gathered over its bytes.
struct Faults {
  int race_with = -1;
  uint32_t race_block = 0;
  bool with_reader = false, in_flight = false, blank = false;
};

void check_read(const Cell& cell, bool atomic, Faults& faults) {
  const bool has_writer = cell.written && !(atomic && cell.write.atomic);
  if (has_writer && !happened_before(cell.write)) {
    faults.race_with = cell.write.thread;
    faults.race_block = cell.write.block;
  }
}

void check_write(Cell& cell, bool atomic, Faults& faults) {
  if (cell.written && !(atomic && cell.write.atomic) && !happened_before(cell.write)) {
    faults.race_with = cell.write.thread;
    faults.race_block = cell.write.block;
  }
  for (const Readers& r : cell.readers)
    if (!happened_before(r)) {
      faults.race_with = r.warp * kLanes + __builtin_ctz(r.lanes);
      faults.race_block = r.block;
      faults.with_reader = true;
    }
  cell.write = {block.linear, block.barriers, now(), uint16_t(current->linear), atomic};
  cell.written = true;
}

Cell& fresh(Cell& cell, uint32_t age) {
  if (cell.age != age) {
    cell = Cell{};
    cell.age = age;
  }
  return cell;
}

void report_faults(const Faults& faults, const void* pc, const char* what, const char* verb, size_t offset) {
  if (faults.in_flight) report("in_flight", pc, "%s of %s byte %zu while cp.async is writing it", verb, what, offset);
  if (faults.blank) report("uninitialised", pc, "%s of %s byte %zu, which was never written", verb, what, offset);
  if (faults.race_with >= 0)
    report("race", pc, "%s of %s byte %zu, which thread %d of block %u %s, with nothing that orders the two", verb,
           what, offset, faults.race_with, faults.race_block, faults.with_reader ? "reads" : "writes");
}

}  // namespace

Region make_region(uintptr_t begin, size_t bytes, const char* name, bool initialised, bool read_only) {
  auto* cells = static_cast<Cell*>(calloc(bytes + 1, sizeof(Cell)));
  return {begin, begin + bytes, name, read_only, std::vector<bool>(bytes, initialised), cells};
}

unsigned check_bytes(Region& region, uint32_t age, uintptr_t address, unsigned bytes, Access access, bool async,
                     const void* pc, size_t& untouched) {
  const size_t offset = address - region.begin;
  Faults faults;
  unsigned first_touched = 0;
  for (size_t i = offset; i < offset + bytes; i++) {
    Cell& cell = fresh(region.cells[i], age);
    bool& touched = access == Access::read ? cell.read : cell.written;
    first_touched += !touched;
    untouched += !cell.read && !cell.written;
    faults.in_flight |= cell.in_flight;
    faults.blank |= access != Access::write && !region.initialised[i] && !cell.in_flight;
    if (access != Access::write) check_read(cell, access == Access::atomic, faults);
    if (access == Access::read) {
      note_reader(cell);
    } else {
      check_write(cell, access == Access::atomic, faults);
      region.initialised[i] = true;
      cell.in_flight = async;
    }
    touched = true;
  }
  const char* verbs[] = {"read", "write", "atomic update"};
  report_faults(faults, pc, region.name.c_str(), async ? "cp.async" : verbs[int(access)], offset);
  return first_touched;
}

void arrive_in(Region& region, uintptr_t address, unsigned bytes) {
  for (size_t i = address - region.begin; i < address - region.begin + bytes; i++) {
    Cell& cell = region.cells[i];
    cell.in_flight = false;
    cell.write = {block.linear, block.barriers, now(), uint16_t(current->linear), false};
  }
}

}  // namespace cusim
