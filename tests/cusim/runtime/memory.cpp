// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulation.h"
#include "report.h"
#include "shadow.h"

namespace fvm {
extern thread_local unsigned char dynamic_shared_memory[];
}

namespace cusim {

namespace {

struct SharedMemory { uintptr_t begin, end, dynamic_begin; };

std::vector<Region> buffers;
Region shared_region;
SharedMemory shared;
uintptr_t image_begin, image_end;  // the library itself: constant tables
size_t touched_statically = 0;
uint32_t launch_age = 1;
std::vector<uint64_t> guards;

bool is_dynamic(uintptr_t address) { return address - shared.dynamic_begin < kSharedOptIn; }

bool check_shared(const void* pc, uintptr_t address, unsigned bytes, Access access, bool async) {
  const uintptr_t limit = shared.dynamic_begin + block.shared_bytes;
  if (is_dynamic(address) && address + bytes > limit) {
    report("out_of_bounds", pc, "access to byte %zu of dynamic shared memory, of which the launch gave %zu",
           size_t(address - shared.dynamic_begin), block.shared_bytes);
    return false;
  }
  if (std::binary_search(guards.begin(), guards.end(), address - shared.begin)) return true;
  size_t untouched = 0;
  check_bytes(shared_region, block.serial, address, bytes, access, async, pc, untouched);
  if (!is_dynamic(address)) touched_statically += untouched;
  count(pc, kSharedRegion, address, bytes, access, 0);
  return true;
}

Region* find_buffer(uintptr_t address) {
  static size_t last = 0;
  auto holds = [&](const Region& b) { return address >= b.begin && address < b.end; };
  if (last < buffers.size() && holds(buffers[last])) return &buffers[last];
  for (last = 0; last < buffers.size(); last++)
    if (holds(buffers[last])) return &buffers[last];
  return nullptr;
}

// The buffer that an address outside all of them was meant for, most likely: the nearest.
Region* nearest_buffer(uintptr_t address) {
  auto distance = [&](const Region& b) { return address < b.begin ? b.begin - address : address - b.end; };
  auto nearer = [&](const Region& a, const Region& b) { return distance(a) < distance(b); };
  auto it = std::min_element(buffers.begin(), buffers.end(), nearer);
  return it == buffers.end() ? nullptr : &*it;
}

bool check_global(const void* pc, uintptr_t address, unsigned bytes, Access access) {
  Region* buffer = find_buffer(address);
  if (!buffer && access == Access::read && address >= image_begin && address < image_end) return true;  // a constant
  if (!buffer || address + bytes > buffer->end) {
    Region* meant = buffer ? buffer : nearest_buffer(address);
    if (!meant)
      report("out_of_bounds", pc, "access to %#zx, and no buffer is registered", size_t(address));
    else
      report("out_of_bounds", pc, "access to bytes %td to %td of %s, which has %zu", ptrdiff_t(address - meant->begin),
             ptrdiff_t(address + bytes - meant->begin) - 1, meant->name.c_str(), size_t(meant->end - meant->begin));
    return false;
  }
  if (buffer->read_only && access != Access::read) {
    report("read_only", pc, "write to byte %zu of %s, which is an input", size_t(address - buffer->begin),
           buffer->name.c_str());
    return false;
  }
  size_t untouched = 0;
  const unsigned first_touched = check_bytes(*buffer, launch_age, address, bytes, access, false, pc, untouched);
  count(pc, int(buffer - buffers.data()), address, bytes, access, first_touched);
  return true;
}

int note_segments(dl_phdr_info* module, size_t, void*) {
  const uintptr_t inside = reinterpret_cast<uintptr_t>(&note_segments);
  uintptr_t begin = UINTPTR_MAX, end = 0, tls_size = 0;
  for (int i = 0; i < module->dlpi_phnum; i++) {
    const auto& segment = module->dlpi_phdr[i];
    if (segment.p_type == PT_TLS) tls_size = segment.p_memsz;
    if (segment.p_type != PT_LOAD) continue;
    begin = std::min(begin, uintptr_t(module->dlpi_addr + segment.p_vaddr));
    end = std::max(end, uintptr_t(module->dlpi_addr + segment.p_vaddr + segment.p_memsz));
  }
  if (inside < begin || inside >= end) return 0;
  image_begin = begin, image_end = end;
  shared.begin = reinterpret_cast<uintptr_t>(module->dlpi_tls_data);
  shared.end = shared.begin + tls_size;
  return 1;
}

}  // namespace

void find_shared_memory() {
  *const_cast<volatile unsigned char*>(fvm::dynamic_shared_memory) = 0;  // the segment is made at the first touch
  shared.dynamic_begin = reinterpret_cast<uintptr_t>(fvm::dynamic_shared_memory);
  dl_iterate_phdr(note_segments, nullptr);
  if (shared_region.begin != shared.begin) {  // the first launch from this OS thread
    free(shared_region.cells);
    shared_region = make_region(shared.begin, shared.end - shared.begin, "shared memory", false, false);
  }
}

bool is_shared(uintptr_t address) { return address >= shared.begin && address < shared.end; }
void forget_launch() { launch_age++; }
size_t static_shared_touched() { return touched_statically; }

void forget_block() {
  touched_statically = 0;
  std::fill(shared_region.initialised.begin(), shared_region.initialised.end(), false);
  auto poison = [](uintptr_t begin, uintptr_t end) { memset(reinterpret_cast<void*>(begin), 0xff, end - begin); };
  poison(shared.begin, shared.dynamic_begin + block.shared_bytes);
  poison(shared.dynamic_begin + kSharedOptIn, shared.end);
}

bool check(const void* pc, uintptr_t address, unsigned bytes, Access access, bool aligned) {
  if (aligned && address % bytes != 0) {
    report("misaligned", pc, "access of %u bytes at %#zx, which is no multiple of that", bytes, size_t(address));
    return false;
  }
  if (is_shared(address)) return check_shared(pc, address, bytes, access, false);
  return check_global(pc, address, bytes, access);
}

bool check_async_write(const void* pc, uintptr_t address, unsigned bytes) {
  return check_shared(pc, address, bytes, Access::write, true);
}

void arrive(uintptr_t address, unsigned bytes) { arrive_in(shared_region, address, bytes); }

}  // namespace cusim

// g++ guards thread-local arrays of a class against being constructed twice, here in memory that is NaN and so "done".
extern "C" void cusim_ignore_guards(const uint64_t* offsets, size_t n) { cusim::guards.assign(offsets, offsets + n); }

extern "C" void cusim_register(void* memory, size_t bytes, const char* name, int initialised, int read_only) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  cusim::buffers.push_back(cusim::make_region(begin, bytes, name, initialised != 0, read_only != 0));
}

extern "C" void cusim_forget_buffers() {
  for (auto& buffer : cusim::buffers) free(buffer.cells);
  cusim::buffers.clear();
}

// How many bytes of the i-th buffer nobody has written yet.
extern "C" int64_t cusim_blank_bytes(int i) {
  const std::vector<bool>& initialised = cusim::buffers[i].initialised;
  return std::count(initialised.begin(), initialised.end(), false);
}
