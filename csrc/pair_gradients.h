// SPDX-License-Identifier: Apache-2.0
// Gradients of a loss L(s X Y^T) of all pairs: dX = s G Y and dY = s G^T X with G = dL/dS [n, m].
//
// G is made for a chunk of rows at a time (8 n m D operations in all for a loss whose G needs a pass of its own before,
// 6 n m D otherwise or where that pass has kept the similarities):
//
//   1. for each tile of the chunk: similarities, then G by the loss's own formula, in a workspace of bounded size;
//   2. dX of the chunk = G Y;
//   3. dY += G^T X of the chunk.
//
// Each product writes disjoint tiles, whose terms are added in the order of the pairs: results depend neither on the
// thread count nor on the run.
#pragma once
#include "contrastive_loss.h"

namespace fvm::FVM_ISA {

struct Sums {
  double loss, scale, bias;  // sums over pairs: of the loss, of G times the similarity, of G
  void operator+=(const Sums& other) { loss += other.loss, scale += other.scale, bias += other.bias; }
};

// The workspace of `pair_gradients`. G lies in stripes of columns, each row-major: rows that are far apart in memory
// would share few cache sets.
template <class T> struct GradientSpace {
  using P = Operand<T>;
  using B = Blocks<P>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR;
  static constexpr bool kPairs = Tile<P>::KU == 2;  // G^T X takes rows of G in pairs: a second copy
  static constexpr int kStripe = 3 * B::kWidth;     // so many terms at a time that adding their sum to dX costs little
  int64_t chunk, rows, width, stripes;              // rows x width pairs for a task
  P *y, *y_features, *x, *x_features, *g, *g_pairs;
  Sums* sums;

  GradientSpace(Workspace& space, int64_t n, int64_t m, int64_t D, bool want_x, bool want_y) {
    stripes = ceil_div(m, kStripe), width = even_part(m, B::kWidth, NR);
    const int64_t row_bytes = stripes * kStripe * int64_t(sizeof(P)) * (kPairs ? 2 : 1);
    chunk = even_part(n, min(4 * B::kRows, B::kBytes / row_bytes), MR), rows = even_part(chunk, B::kRows, MR);
    const int64_t size = want_x || want_y ? stripes * chunk * kStripe : 0;
    y = space.take<P>(packed_size<P>(m, D, NR));
    y_features = space.take<P>(want_x ? packed_size<P>(D, m, NR) : 0);
    x = space.take<P>(packed_size<P>(chunk, D, MR));
    x_features = space.take<P>(want_y ? packed_size<P>(D, chunk, NR) : 0);
    g = space.take<P>(size);
    g_pairs = space.take<P>(kPairs ? size : 0);
    sums = space.take<Sums>(ceil_div(chunk, rows) * ceil_div(m, width));
  }
  P* stripe(P* of, int64_t w) const { return of + w * chunk * kStripe; }
};

// Keeps a tile of `factor` G at row i of the chunk: row-major, and for bf16 also with pairs of rows interleaved.
template <class T>
static inline void store_gradient(const GradientSpace<T>& ws, const Acc<T>* tile, Acc<T> factor, int64_t i, int64_t j) {
  using S = GradientSpace<T>;
  constexpr int W = S::kStripe, L = kLanes<Acc<T>>;
  typename S::P* g = ws.stripe(ws.g, j / W) + i * W + j % W;
  for (int r = 0; r < S::MR; r++) {
    __builtin_prefetch(g + (r + S::MR) * W, 1);  // where the next tile goes
    for (int v = 0; v < S::NR; v += L) store_narrowed(g + r * W + v, load(tile + r * S::NR + v) * factor);
  }
  if constexpr (S::kPairs) {
    typename S::P* pairs = ws.stripe(ws.g_pairs, j / W) + i * W + j % W * 2;
    for (int r = 0; r < S::MR; r += 2) interleave(pairs + r * W, g + r * W, g + (r + 1) * W, S::NR);
  }
}

// Rows i0 to i1 of the chunk of dX = G Y, features d0 to d1.
template <class T>
static void multiply_by_y(const Pairs<T>& p, const GradientSpace<T>& ws, Acc<T>* dx, int64_t i0, int64_t i1, int64_t d0,
                          int64_t d1) {
  using S = GradientSpace<T>;
  using P = typename S::P;
  constexpr int W = S::kStripe, KU = Tile<P>::KU;
  for (int64_t w = 0; w < ws.stripes; w++)
    for (int64_t i = i0; i < i1; i += S::MR)
      for (int64_t d = d0; d < d1; d += S::NR)
        tile_partial<P, W, KU>(min(W, p.m - w * W), ws.stripe(ws.g, w) + i * W,
                               ws.y_features + d * padded_k<P>(p.m) + w * W * S::NR, dx + i * p.D + d, p.D, w > 0,
                               min(S::MR, i1 - i), min(S::NR, d1 - d));
}

// Rows j0 to j1 of dY += G^T X of the chunk, features d0 to d1; = for the first chunk.
template <class T>
static void multiply_by_x(const Pairs<T>& p, const GradientSpace<T>& ws, Acc<T>* dy, int64_t rows, bool add, int64_t j0,
                          int64_t j1, int64_t d0, int64_t d1) {
  using S = GradientSpace<T>;
  using P = typename S::P;
  constexpr int W = S::kStripe, KU = Tile<P>::KU;
  P* g = S::kPairs ? ws.g_pairs : ws.g;
  for (int64_t j = j0; j < j1; j += S::MR)
    for (int64_t d = d0; d < d1; d += S::NR)
      tile_partial<P, KU, W * KU>(rows, ws.stripe(g, j / W) + j % W * KU, ws.x_features + d * padded_k<P>(rows),
                                  dy + j * p.D + d, p.D, add, min(S::MR, j1 - j), min(S::NR, d1 - d));
}

// Both products of the chunk that starts at row `first`. Tasks have all features, as long as that leaves enough tasks
// and as the second-level cache holds them: G, which comes from further away, is read once for each task's features.
template <class T>
static void multiply(const Pairs<T>& p, const GradientSpace<T>& ws, Acc<T>* dx, Acc<T>* dy, int64_t first, int64_t rows,
                     int64_t threads) {
  using S = GradientSpace<T>;
  const int64_t height = ws.rows, width = even_part(p.m, 8 * S::MR, S::MR);
  const int64_t row_parts = dx ? ceil_div(rows, height) : 0, column_parts = dy ? ceil_div(p.m, width) : 0;
  const int64_t dims = even_part(p.D, (threads <= row_parts + column_parts ? 16 : 2) * S::NR, S::NR);
  const int64_t parts = row_parts + column_parts;
  parallel_for(parts * ceil_div(p.D, dims), threads, [&](int64_t task, int64_t) {
    const int64_t part = task % parts, d0 = task / parts * dims, d1 = min(d0 + dims, p.D);
    if (part < row_parts) {
      const int64_t i0 = part * height;
      multiply_by_y(p, ws, dx + first * p.D, i0, min(i0 + height, rows), d0, d1);
    } else {
      const int64_t j0 = (part - row_parts) * width;
      multiply_by_x(p, ws, dy, rows, first > 0, j0, min(j0 + width, p.m), d0, d1);
    }
  });
}

// G of the chunk that starts at row `first`, in rows i0 to i1 and columns j0 to j1.
template <class T, class F>
static Sums make_gradient(const Pairs<T>& p, const GradientSpace<T>& ws, const Kept<Operand<T>>& kept, bool want,
                          Acc<T> factor, int64_t first, int64_t i0, int64_t i1, int64_t j0, int64_t j1, F&& gradient) {
  using S = GradientSpace<T>;
  const int64_t Kp = padded_k<typename S::P>(p.D);
  Sums sums = {};
  alignas(64) Acc<T> made[S::MR * S::NR], g[S::MR * S::NR];
  for (int64_t j = j0; j < j1; j += S::NR)
    for (int64_t i = i0; i < i1; i += S::MR) {
      const Acc<T>* similarities = made;
      if (first + i < kept.rows)
        similarities = kept.tile(first + i, j);
      else
        tile<typename S::P>(p.D, ws.x + i * Kp, ws.y + j * Kp, made, S::NR);
      gradient(first + i, j, min(S::MR, i1 - i), min(S::NR, j1 - j), similarities, g, sums);
      if (want) store_gradient<T>(ws, g, factor, i, j);
    }
  return sums;
}

// For every tile of pairs: gradient(i0, j0, rows, columns, similarities, g, sums) reads MR x NR similarities x_i . y_j
// and writes G, zero outside of rows x columns. Then dx [n, D] = factor G Y and dy [m, D] = factor G^T X, where wanted.
template <class T, class F>
static Sums pair_gradients(const Pairs<T>& p, const GradientSpace<T>& ws, Acc<T>* dx, Acc<T>* dy, Acc<T> factor,
                           int64_t threads, F&& gradient, const Kept<Operand<T>>& kept = {}) {
  using S = GradientSpace<T>;
  Sums total = {};
  if (kept.rows < p.n) pack_rows_parallel<S::NR>(ws.y, p.y, p.m, p.D, threads);
  if (dx) pack_features_parallel<S::NR>(ws.y_features, p.y, p.m, p.D, threads);
  const int64_t column_parts = ceil_div(p.m, ws.width);
  for (int64_t first = 0; first < p.n; first += ws.chunk) {
    const int64_t rows = min(ws.chunk, p.n - first), row_parts = ceil_div(rows, ws.rows);
    if (kept.rows < first + rows) pack_rows_parallel<S::MR>(ws.x, p.x + first * p.D, rows, p.D, threads);
    if (dy) pack_features_parallel<S::NR>(ws.x_features, p.x + first * p.D, rows, p.D, threads);
    parallel_for(row_parts * column_parts, threads, [&](int64_t task, int64_t) {
      const int64_t i0 = task % row_parts * ws.rows, i1 = min(i0 + ws.rows, rows);
      const int64_t j0 = task / row_parts * ws.width, j1 = min(j0 + ws.width, p.m);
      ws.sums[task] = make_gradient(p, ws, kept, dx || dy, factor, first, i0, i1, j0, j1, gradient);
    });
    for (int64_t task = 0; task < row_parts * column_parts; task++) total += ws.sums[task];
    if (dx || dy) multiply(p, ws, dx, dy, first, rows, threads);
  }
  return total;
}

}  // namespace fvm::FVM_ISA
