// SPDX-License-Identifier: Apache-2.0
// Gradients of a loss L(s X Y^T) of all pairs: dX = s G Y and dY = s G^T X with G = dL/dS [n, m], which is made for a
// chunk of rows at a time: its tiles from similarities by the loss's own formula, then both products.
//
// G of half types is rounded to them, for the tensor cores, after it was brought near the largest number of half: what
// few pairs have of the gradient would otherwise be lost below the smallest.
#pragma once
#include "contrastive_products.cuh"

namespace fvm::cuda {

template <class T> struct GradientSpace {
  static constexpr int kSums = 3;
  int64_t chunk, pitch, tiles;  // rows of G at a time; G is [chunk, pitch]
  T* g;
  Acc<T>* partials;
  double* sums;  // [kSums, tiles]

  GradientSpace(Workspace& arena, int64_t n, int64_t m, int64_t D, bool want_x, bool want_y,
                int64_t more_bytes_of_tile = 0)
      : pitch(round_up(m, kChunk<T>)) {
    const bool want = want_x || want_y;
    chunk = rows_of_chunk(n, (want ? kTile * pitch * int64_t(sizeof(T)) : 0) + more_bytes_of_tile);
    tiles = ceil_div<int64_t>(n, kTile) * ceil_div<int64_t>(m, kTile);
    g = arena.take<T>(want ? chunk * pitch : 0);
    partials = arena.take<Acc<T>>(want_x ? partials_size(chunk, m, D) : 0);
    sums = arena.take<double>(kSums * tiles);
  }
};

// Numbers |G| <= 2 are stored as so many times as much.
template <class T> constexpr Acc<T> kBigger = std::is_same<T, fp16>::value ? 16384 : 1;

namespace {

// G of one tile, times loss.bigger(), and the loss's sums over its pairs. `g` is null where only sums are wanted. Columns
// beyond m have similarities of zero, and a loss that would add anything of them to its sums looks at their numbers.
template <class T, class Loss>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    make_gradient(Pairs<T> pairs, Chunk chunk, Loss loss, T* __restrict__ g, int64_t pitch, double* __restrict__ sums,
                  int64_t tiles) {
  using A = Acc<T>;
  using L = Lanes<A>;
  constexpr int N = L::N, kSums = Loss::kSums;
  const int64_t row = chunk.first + chunk.tile_row() * kTile, column = chunk.tile_column() * kTile;
  const bool skips = loss.skips(row, column);
  A sum[kSums + 1] = {};
  if (!skips) {
    SimilarityTile<T> tile;
    make_similarities(tile, pairs, row, column);
    const auto columns = loss.columns(column + L::column());
    const A bigger = loss.bigger();
    for_each_pack<kRowsAtOnce<A>>(tile, [&](int r, int c, const Pack<A, N>& u) {
      const int64_t i = row + r, j = column + c;
      if (i >= pairs.x.rows || j >= pitch) return;
      A gradient[N];
      loss.gradient(columns, i, j, u.at, gradient, sum);
#pragma unroll
      for (int k = 0; k < N; k++) gradient[k] = j + k < pairs.y.rows ? gradient[k] * bigger : 0;
      if (g) store(g + (i - chunk.first) * pitch + j, narrow<T>(gradient));
    });
  }
  if constexpr (kSums > 0) {
    double total[kSums];
#pragma unroll
    for (int k = 0; k < kSums; k++) total[k] = double(sum[k]);
    block_sum(total);
    if (threadIdx.x == 0)
#pragma unroll
      for (int k = 0; k < kSums; k++)
        sums[k * tiles + chunk.first / kTile * chunk.column_tiles + blockIdx.x] = total[k];
  }
}

template <class A> struct Totals {
  A* out[3];  // those that are wanted
  Factor factor[3];
};

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    add_totals(const double* __restrict__ sums, int64_t tiles, Totals<A> totals) {
  for (int k = 0; k < 3; k++) {
    if (!totals.out[k]) continue;
    const double total = sum_over(tiles, [&](int64_t t) { return sums[k * tiles + t]; });
    if (threadIdx.x == 0) *totals.out[k] = A(total * totals.factor[k].value());
  }
}

template <class T> struct Wanted {
  Acc<T>*dx, *dy;         // [n, D], [m, D] or null; in a triangle dy = dx
  Factor factor;          // of the gradients
  const Acc<T>* unscale;  // the inverse of loss.bigger() where only the device knows it
  bool triangle = false;
};

template <class T>
cudaError_t multiply_chunk(const Pairs<T>& p, const GradientSpace<T>& space, const Chunk& chunk, const Wanted<T>& want,
                           cudaStream_t stream) {
  const int64_t D = p.x.columns, first = chunk.first, left = want.triangle ? first : 0;  // columns that are left out
  const T *x = p.x.values + first * D, *y = p.y.values + left * D;
  const Gradient<T> g{space.g + left, chunk.rows,   p.y.rows - left, space.pitch,
                      want.factor,    want.unscale, want.triangle};
  if (want.dy) FVM_TRY(multiply_by_x(g, x, D, want.dy + left * D, first > 0, stream));
  if (want.dx) FVM_TRY(multiply_by_y(g, y, D, want.dx + first * D, want.triangle, space.partials, stream));
  return cudaSuccess;
}

// prepare(chunk, loss) enqueues what the loss needs to know of a chunk.
template <class T, class Loss, class Prepare>
cudaError_t pair_gradients(const Pairs<T>& p, const GradientSpace<T>& space, Loss loss, const Wanted<T>& want,
                           cudaStream_t stream, Prepare&& prepare) {
  const int64_t n = p.x.rows, m = p.y.rows;
  const bool any = want.dx || want.dy;
  if (n == 0 && want.dy) FVM_TRY(cudaMemsetAsync(want.dy, 0, m * p.y.columns * sizeof(Acc<T>), stream));
  for (int64_t first = 0; first < n; first += space.chunk) {
    const Chunk chunk(first, space.chunk, n, m);
    FVM_TRY(prepare(chunk, loss));
    FVM_TRY(FVM_LAUNCH((make_gradient<T, Loss>), chunk.blocks(), kTileThreads, kTileShared, stream, p, chunk, loss,
                       any ? space.g : nullptr, space.pitch, space.sums, space.tiles));
    if (any) FVM_TRY(multiply_chunk(p, space, chunk, want, stream));
  }
  return cudaSuccess;
}

}  // namespace

}  // namespace fvm::cuda
