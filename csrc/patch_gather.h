// SPDX-License-Identifier: Apache-2.0
// Patches of an image as rows of F = C * p * p values, read and written in place: no unfolded copy of the batch.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace fvm::FVM_ISA {

// Where patches lie in an image [C, H, W], or [H, W, C] when `channels_last`. A patch is planes x p runs of `run`
// consecutive values; a row lists them in memory's order, so features run (c, y, x) or (y, x, c).
struct PatchGrid {
  int64_t C, H, W, p;
  bool channels_last;

  int64_t patches() const { return (H / p) * (W / p); }
  int64_t features() const { return C * p * p; }
  int64_t image_size() const { return C * H * W; }
  int64_t planes() const { return channels_last ? 1 : C; }
  int64_t run() const { return channels_last ? p * C : p; }
  int64_t line() const { return channels_last ? W * C : W; }
  int64_t origin(int64_t patch) const {
    const int64_t columns = W / p;
    return patch / columns * p * line() + patch % columns * run();
  }
  int64_t channel(int64_t feature) const { return channels_last ? feature % C : feature / (p * p); }
  // the place of a feature in a row of the weight [D, C, p, p]
  int64_t in_weight(int64_t feature) const { return channels_last ? feature % C * p * p + feature / C : feature; }

  // f(offset in the image, first feature) for each run of the patch
  template <class F> void for_each_run(int64_t patch, F&& f) const {
    int64_t feature = 0;
    for (int64_t c = 0; c < planes(); c++)
      for (int64_t y = 0, at = origin(patch) + c * H * W; y < p; y++, at += line(), feature += run()) f(at, feature);
  }
};

// A vector of S from any type of image
template <class S, class I> static inline Vec<S> load_pixels(const I* p) { return load_widened(p); }
template <> inline vf32 load_pixels<float, uint8_t>(const uint8_t* p) {
  typedef uint8_t vu8 __attribute__((vector_size(kVecBytes / 4), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const vu8*>(p), vi32), vf32);
}
template <> inline vf64 load_pixels<double, uint8_t>(const uint8_t* p) {
  vf64 y;
  for (int i = 0; i < kLanes<double>; i++) y[i] = p[i];
  return y;
}
static inline float widen(uint8_t x) { return x; }

// row[0:F] = the patch, in S. Writes up to a vector more than F, and reads (never past `end`) as far beyond a run: what
// it finds there is overwritten by the next run.
template <class S, class I>
static inline void gather_patch(const PatchGrid& grid, const I* image, const I* end, int64_t patch, S* row) {
  constexpr int V = kLanes<S>;
  const int64_t n = grid.run();
  grid.for_each_run(patch, [&](int64_t at, int64_t feature) {
    const I* src = image + at;
    S* dst = row + feature;
    for (int64_t j = 0; j < n; j += V) {
      if (end - (src + j) >= V)
        store(dst + j, load_pixels<S>(src + j));
      else
        for (int64_t i = j; i < n; i++) dst[i] = widen(src[i]);
    }
  });
}

// The patch of the image = row[0:F]
template <class S, class I>
static inline void scatter_patch(const PatchGrid& grid, const S* row, int64_t patch, I* image) {
  const int64_t n = grid.run();
  grid.for_each_run(patch, [&](int64_t at, int64_t feature) { convert_row(image + at, row + feature, n); });
}

}  // namespace fvm::FVM_ISA
