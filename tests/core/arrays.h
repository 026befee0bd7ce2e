// SPDX-License-Identifier: Apache-2.0
// Tensors for the tests: exactly as large as their elements, so that a read or write one element past the end is seen.
// Under AddressSanitizer they are plain heap blocks; elsewhere they end at a page that may not be touched. They start
// full of NaN, so that what a kernel leaves unwritten, or reads before it wrote it, is seen as well.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fvm::test {

class Block {
 public:
  explicit Block(int64_t bytes = 0);
  Block(Block&& other) noexcept { swap(other); }
  Block& operator=(Block&& other) noexcept { return swap(other), *this; }
  ~Block();
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(Block& other) { std::swap(data_, other.data_), std::swap(bytes_, other.bytes_); }
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Numbers of a fixed type: ids, masks, weights.
template <class T> class Numbers {
 public:
  explicit Numbers(int64_t n) : block_(n * int64_t(sizeof(T))), n_(n) {}
  explicit Numbers(const std::vector<T>& values) : Numbers(int64_t(values.size())) {
    for (int64_t i = 0; i < n_; i++) data()[i] = values[i];
  }
  T* data() const { return static_cast<T*>(block_.data()); }
  operator T*() const { return data(); }
  operator Maybe<const T>() const { return {data()}; }
  std::vector<T> values() const { return {data(), data() + n_}; }

 private:
  Block block_;
  int64_t n_;
};

// A tensor of any dtype; made without one it is absent, and its address null.
class Array {
 public:
  Array() = default;
  Array(Dtype dtype, int64_t n);                          // full of NaN
  Array(Dtype dtype, const std::vector<double>& values);  // rounded to nearest even
  void* data() const { return present_ ? block_.data() : nullptr; }
  operator void*() const { return data(); }
  std::vector<double> values() const;
  bool same_bits(const Array& other) const;

 private:
  bool present_ = false;
  Dtype dtype_ = Dtype::f32;
  int64_t n_ = 0;
  Block block_;
};

inline Maybe<const void> in(const Array& array) { return {array.data()}; }
inline Maybe<void> out(const Array& array) { return {array.data()}; }

// ---- dtypes

constexpr Dtype kFloats[] = {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16};
const char* name_of(Dtype dtype);
int64_t size_of(Dtype dtype);
inline Dtype accumulation(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
double round_to(Dtype dtype, double value);
std::vector<double> round_to(Dtype dtype, std::vector<double> values);

// How far a sum of a few hundred products may be off, relative to the largest value of a result
double tolerance(Dtype dtype);

// ---- inputs: the same on every machine

std::vector<double> uniform(int64_t n, uint64_t seed, double low = -1, double high = 1);
template <class T = int64_t> std::vector<T> random_ids(int64_t n, int64_t size, uint64_t seed) {
  std::vector<T> ids;
  for (double u : uniform(n, seed, 0, double(size))) ids.push_back(T(u));
  return ids;
}

// ---- what is demanded of results

// |got - expected| <= tolerance * largest |expected|, everywhere; infinities and NaN where they are expected
void check_close(const char* what, const std::vector<double>& got, const std::vector<double>& expected,
                 double tolerance);

struct Output {
  const char* name;
  Array value;
};
using Outputs = std::vector<Output>;

void check_same_bits(const Outputs& a, const Outputs& b, const char* when);

// The outputs of run(threads), which must be the same bits for 1 and 3 threads.
template <class Run> Outputs run_on_threads(Run&& run) {
  Outputs alone = run(int64_t(1));
  check_same_bits(run(int64_t(3)), alone, "on 3 threads and on 1");
  return alone;
}

}  // namespace fvm::test
