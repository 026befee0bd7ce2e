// SPDX-License-Identifier: Apache-2.0
// What both directions of patch_embed read: which patch a token shows, and the pixels of a patch as a row of numbers.
#pragma once
#include "dtype_dispatch.h"
#include "gemm.h"
#include "kernels.h"
#include "patch_gather.h"
#include "row_panels.h"
#include "workspace.h"

namespace fvm::FVM_ISA {

// Which patch each of the P + K tokens of an image shows
struct Tokens {
  int64_t B, P, K, L;
  const int64_t* ids;  // [B, K] or null: all patches in order
  const bool* mask;    // [B, L] or null

  int64_t rows() const { return P + K; }
  int64_t patch(int64_t b, int64_t k) const { return ids ? ids[b * K + k] : k; }
  bool masked(int64_t b, int64_t patch) const { return mask && mask[b * L + patch]; }
};

// Patches of images of any type, read as normalised rows of S: row = pixels * scale + shift
template <class S> struct Pixels {
  PatchGrid grid;
  int64_t B;
  const void* images;
  void (*gather)(const Pixels&, int64_t b, int64_t patch, S* row);
  const S *scale, *shift;  // [padded_row(F)] or null

  // room for a row of n, and for vectors and panels that are read and written past its end
  static int64_t padded_row(int64_t n) { return n + 4 * kLanes<S> + Tile<Operand<S>>::NR; }

  // row[0:F] and zeros as far as a multiple of KU
  void read(int64_t b, int64_t patch, S* row) const {
    constexpr int V = kLanes<S>;
    const int64_t F = grid.features();
    gather(*this, b, patch, row);
    if (scale)
      for (int64_t f = 0; f < F; f += V) store(row + f, load(row + f) * load(scale + f) + load(shift + f));
    store(row + F, Vec<S>{});
  }
};

template <class S, class I> void gather_from(const Pixels<S>& pixels, int64_t b, int64_t patch, S* row) {
  const I* images = static_cast<const I*>(pixels.images);
  const int64_t size = pixels.grid.image_size();
  gather_patch(pixels.grid, images + b * size, images + pixels.B * size, patch, row);
}

// Images of uint8, of T, or of float beside a 16-bit T. (x / 255 - mean) / std of uint8 and (x - mean) / std of float
// images are one product and one sum, whose factors go to `scale` and `shift`.
template <class T>
Pixels<Acc<T>> pixels_of(const PatchGrid& grid, int64_t B, const void* images, Dtype dtype, Maybe<const double> mean,
                         Maybe<const double> std, Acc<T>* scale, Acc<T>* shift) {
  using S = Acc<T>;
  const bool is_uint8 = dtype == Dtype::u8;
  Pixels<S> pixels{grid, B, images, gather_from<S, T>, nullptr, nullptr};
  if (is_uint8)
    pixels.gather = gather_from<S, uint8_t>;
  else if (sizeof(T) == 2 && dtype == Dtype::f32)
    pixels.gather = gather_from<S, S>;
  if (!is_uint8 && !mean) return pixels;
  for (int64_t f = 0; f < grid.features(); f++) {
    const int64_t c = grid.channel(f);
    scale[f] = S((is_uint8 ? 1.0 / 255 : 1.0) / (std ? std.p[c] : 1.0));
    shift[f] = mean ? S(-mean.p[c] / std.p[c]) : S(0);
  }
  pixels.scale = scale, pixels.shift = shift;
  return pixels;
}

// order[f]: the place of feature f in a row of the weight; null when it is f itself
static inline const int64_t* weight_order(const PatchGrid& grid, int64_t* order) {
  if (!grid.channels_last) return nullptr;
  for (int64_t f = 0; f < grid.features(); f++) order[f] = grid.in_weight(f);
  return order;
}

// A panel of `WIDTH` of n columns (or rows) of an operand with K steps; element(i, k) is its value
template <int WIDTH, class P, class F> void pack_elements(P* panel, int64_t n, int64_t K, F&& element) {
  constexpr int KU = Tile<P>::KU;
  for (int64_t k = 0; k < padded_k<P>(K); k++) {
    P* d = panel + k / KU * KU * WIDTH + k % KU;
    for (int64_t i = 0; i < WIDTH; i++) d[i * KU] = i < n && k < K ? to_operand<P>(element(i, k)) : P{};
  }
}

// The D rows of the weight [D, F] in panels
template <int WIDTH, class P, class T>
void pack_weight_rows(P* packed, const T* weight, const int64_t* order, int64_t D, int64_t F, int64_t threads) {
  parallel_for(ceil_div(D, WIDTH), threads, [&](int64_t panel, int64_t) {
    const int64_t d = panel * WIDTH, rows = min(WIDTH, D - d);
    P* dst = packed + d * padded_k<P>(F);
    const T* src = weight + d * F;
    if (order)
      pack_elements<WIDTH>(dst, rows, F, [&](int64_t i, int64_t f) { return src[i * F + order[f]]; });
    else
      pack_rows<WIDTH>(dst, src, F, rows, F);
  });
}

// Its F columns in panels
template <int WIDTH, class P, class T>
void pack_weight_columns(P* packed, const T* weight, const int64_t* order, int64_t D, int64_t F, int64_t threads) {
  parallel_for(ceil_div(F, WIDTH), threads, [&](int64_t panel, int64_t) {
    const int64_t f = panel * WIDTH, columns = min(WIDTH, F - f);
    P* dst = packed + f * padded_k<P>(D);
    if (order)
      pack_elements<WIDTH>(dst, columns, D, [&](int64_t i, int64_t d) { return weight[d * F + order[f + i]]; });
    else
      pack_columns<WIDTH>(dst, weight + f, F, columns, D);
  });
}

// Tokens of a task: a few tiles, so that a panel of the weight is used more than once while it is in the cache
template <class P> constexpr int64_t kMaxRows = 4 * Tile<P>::MR;

}  // namespace fvm::FVM_ISA
