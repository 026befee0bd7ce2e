// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "harness.h"

namespace fvm::test {

// ---- memory

#if defined(__SANITIZE_ADDRESS__)
// As torch's allocator does for all of its tensors, a block of whole cache lines, which a workspace is, starts with one.
Block::Block(int64_t bytes)
    : data_(bytes > 0 && bytes % 64 == 0 ? std::aligned_alloc(64, bytes) : std::malloc(bytes)), bytes_(bytes) {
  std::memset(data_, 0xff, bytes);
}
Block::~Block() { std::free(data_); }
#else
static int64_t page() { return sysconf(_SC_PAGESIZE); }
static int64_t pages_of(int64_t bytes) { return (bytes + page() - 1) / page() * page(); }

Block::Block(int64_t bytes) : bytes_(bytes) {
  const int64_t size = pages_of(bytes);
  void* memory = mmap(nullptr, size + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + size, page(), PROT_NONE) != 0) {
    std::perror("memory for a tensor");
    std::abort();
  }
  data_ = static_cast<char*>(memory) + size - bytes;
  std::memset(data_, 0xff, bytes);
}
Block::~Block() {
  if (data_) munmap(static_cast<char*>(data_) + bytes_ - pages_of(bytes_), pages_of(bytes_) + page());
}
#endif

// ---- dtypes

#if defined(__aarch64__)
using half = __fp16;
#else
using half = _Float16;
#endif

const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"f64", "f32", "bf16", "f16", "u8"};
  return kNames[int(dtype)];
}

int64_t size_of(Dtype dtype) {
  constexpr int64_t kSizes[] = {8, 4, 2, 2, 1};
  return kSizes[int(dtype)];
}

double tolerance(Dtype dtype) {
  constexpr double kTolerances[] = {1e-12, 1e-5, 2e-2, 3e-3};
  return kTolerances[int(dtype)];
}

static uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  const uint32_t below = bits & 0xffff, half_way = 0x8000;
  bits >>= 16;
  if (below > half_way || (below == half_way && (bits & 1))) bits++;
  return uint16_t(bits);
}

static void store_as(Dtype dtype, void* at, double value) {
  const float f = float(value);
  const half h = half(f);  // as the kernels do, through float
  const uint16_t b = bf16_bits(f);
  const uint8_t u = dtype == Dtype::u8 ? uint8_t(value) : 0;
  const void* stored[] = {&value, &f, &b, &h, &u};
  std::memcpy(at, stored[int(dtype)], size_of(dtype));
}

static double load_as(Dtype dtype, const void* at) {
  double d;
  float f;
  half h;
  uint16_t b;
  switch (dtype) {
    case Dtype::f64: return std::memcpy(&d, at, 8), d;
    case Dtype::f32: return std::memcpy(&f, at, 4), f;
    case Dtype::f16: return std::memcpy(&h, at, 2), double(float(h));
    case Dtype::u8: return *static_cast<const uint8_t*>(at);
    default: break;
  }
  std::memcpy(&b, at, 2);
  const uint32_t bits = uint32_t(b) << 16;
  return std::memcpy(&f, &bits, 4), f;
}

double round_to(Dtype dtype, double value) {
  char memory[8];
  store_as(dtype, memory, value);
  return load_as(dtype, memory);
}

std::vector<double> round_to(Dtype dtype, std::vector<double> values) {
  for (double& value : values) value = round_to(dtype, value);
  return values;
}

// ---- tensors

Array::Array(Dtype dtype, int64_t n) : present_(true), dtype_(dtype), n_(n), block_(n * size_of(dtype)) {}

Array::Array(Dtype dtype, const std::vector<double>& values) : Array(dtype, int64_t(values.size())) {
  for (int64_t i = 0; i < n_; i++) store_as(dtype, static_cast<char*>(block_.data()) + i * size_of(dtype), values[i]);
}

std::vector<double> Array::values() const {
  std::vector<double> values(n_);
  for (int64_t i = 0; i < n_; i++)
    values[i] = load_as(dtype_, static_cast<const char*>(block_.data()) + i * size_of(dtype_));
  return values;
}

bool Array::same_bits(const Array& other) const {
  return block_.bytes() == other.block_.bytes() && std::memcmp(block_.data(), other.block_.data(), block_.bytes()) == 0;
}

std::vector<double> uniform(int64_t n, uint64_t seed, double low, double high) {
  std::vector<double> values(n);
  uint64_t state = seed * 0x9e3779b97f4a7c15;
  for (double& value : values) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    value = low + (high - low) * double((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }
  return values;
}

// ---- demands

static bool is_close(double got, double expected, double largest_error) {
  if (std::isnan(expected)) return std::isnan(got);
  return got == expected || std::fabs(got - expected) <= largest_error;  // false for NaN
}

void check_close(const char* what, const std::vector<double>& got, const std::vector<double>& expected,
                 double tolerance) {
  if (got.size() != expected.size())
    return fail(
        __FILE__, __LINE__,
        std::string(what) + ": sizes " + std::to_string(got.size()) + ", expected " + std::to_string(expected.size()));
  double largest = 1e-3;  // less than that is none
  for (double value : expected)
    if (std::isfinite(value)) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < got.size(); i++) {
    if (is_close(got[i], expected[i], tolerance * largest)) continue;
    char text[256];
    snprintf(text, sizeof text, "%s[%zu] is %.9g, expected %.9g to %.1e of the largest, %.3g", what, i, got[i],
             expected[i], tolerance, largest);
    return fail(__FILE__, __LINE__, text);
  }
}

void check_same_bits(const Outputs& a, const Outputs& b, const char* when) {
  CHECK(a.size() == b.size());
  for (size_t i = 0; i < a.size() && i < b.size(); i++)
    if (!a[i].value.same_bits(b[i].value))
      fail(__FILE__, __LINE__, std::string(a[i].name) + ": expected the same bits " + when);
}

}  // namespace fvm::test
