// SPDX-License-Identifier: Apache-2.0
// engine_rates [ROUNDS]: for each usable instruction set and dtype a line
//   isa dtype peak tile product product_with_packing product/peak product_with_packing/peak
// with rates in GFLOP/s: medians over rounds that measure all of them in turn, on one thread, in its processor time.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dispatch.h"
#include "rates.h"

namespace fvm::bench {

#define X(isa) extern const Rates rates_##isa;
FVM_ISA_LIST
#undef X

namespace {

constexpr int64_t kSize = 512;
constexpr Dtype kDtypes[] = {Dtype::f64, Dtype::f32, Dtype::bf16};
constexpr const char* kNames[] = {"float64", "float32", "bfloat16"};

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + long(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Seconds a call, of as many as last some milliseconds
double seconds(double (*f)(const Work&), const Work& work) {
  const double start = now();
  int calls = 0;
  while (calls == 0 || now() - start < 4e-3) f(work), calls++;
  return (now() - start) / calls;
}

struct Memory {
  explicit Memory(size_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
  void* data;
};

// Numbers near one in every dtype, for denormals and infinities are slow on some processors
void fill(const Work& w) {
  for (const void* operand : {w.a, w.b})
    for (int64_t i = 0; i < kSize * kSize; i++) {
      void* at = const_cast<void*>(operand);
      if (w.dtype == Dtype::f64)
        static_cast<double*>(at)[i] = 1 + double(i % 7) / 8;
      else if (w.dtype == Dtype::f32)
        static_cast<float*>(at)[i] = 1 + float(i % 7) / 8;
      else
        static_cast<uint16_t*>(at)[i] = uint16_t(0x3f80 + i % 7);
    }
}

// x and y of the loop acc = acc * x + y: neither to infinity nor to denormals
void fill_peak(const Work& w) {
  for (int i = 0; i < 64; i++)
    if (w.dtype == Dtype::f64)
      static_cast<double*>(w.c)[i] = 0.5;
    else
      static_cast<float*>(w.c)[i] = 0.5f;
}

void measure(const Rates& rates, int dtype, int rounds) {
  const Memory a(kSize * kSize * 8), b(kSize * kSize * 8), c(kSize * kSize * 8);
  const size_t bytes = size_t(rates.packed_bytes(kDtypes[dtype], kSize, kSize));
  const Memory packed_a(bytes), packed_b(bytes);
  const Work work = {kDtypes[dtype], kSize, kSize, kSize, a.data, b.data, packed_a.data, packed_b.data, c.data};
  fill(work);
  rates.pack(work);
  std::vector<double> peak, tile, bare, packing, share, packing_share;
  for (int round = 0; round < rounds; round++) {
    fill_peak(work);
    const double flops = rates.product(work), peak_flops = (fill_peak(work), rates.peak(work));
    fill_peak(work);
    peak.push_back(peak_flops / seconds(rates.peak, work));
    tile.push_back(rates.tile(work) / seconds(rates.tile, work));
    const double product = seconds(rates.product, work);
    bare.push_back(flops / product);
    packing.push_back(flops / (product + seconds(rates.pack, work)));
    share.push_back(bare.back() / peak.back()), packing_share.push_back(packing.back() / peak.back());
  }
  printf("%s %s %.2f %.2f %.2f %.2f %.4f %.4f\n", rates.isa, kNames[dtype], median(peak) / 1e9, median(tile) / 1e9,
         median(bare) / 1e9, median(packing) / 1e9, median(share), median(packing_share));
  fflush(stdout);
}

}  // namespace
}  // namespace fvm::bench

int main(int argc, char** argv) {
  using namespace fvm::bench;
  const std::vector<std::string> usable = fvm::isas_usable();
  const Rates* all[] = {
#define X(isa) &rates_##isa,
      FVM_ISA_LIST
#undef X
  };
  for (const Rates* rates : all)
    if (std::find(usable.begin(), usable.end(), rates->isa) != usable.end())
      for (int dtype = 0; dtype < 3; dtype++) measure(*rates, dtype, argc > 1 ? std::atoi(argv[1]) : 15);
}
