// SPDX-License-Identifier: Apache-2.0
// What the contrastive losses share: pairs (x_i, y_j) whose similarities x_i . y_j are made tile by tile and not kept.
//
// A loss L(s X Y^T) has the gradients dX = s G Y and dY = s G^T X with G = dL/dS [n, m]. G is made for a chunk of rows
// at a time (8 n m D operations in all for a loss whose G needs a pass of its own before, 6 n m D otherwise):
//
//   1. for each tile of the chunk: similarities, then G by the loss's own formula, kept in a workspace of bounded size;
//   2. dX of the chunk = G Y;
//   3. dY += G^T X of the chunk.
//
// Each product writes disjoint tiles in a fixed order, so that results depend neither on the thread count nor on the
// run.
#pragma once
#include "dtype_dispatch.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "workspace.h"

namespace fvm::FVM_ISA {

template <class T> struct Pairs {
  const T* x;  // [n, D]
  const T* y;  // [m, D]
  int64_t n, m, D;
};

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// Sizes of the blocks, for the tile of operand type P.
template <class P> struct Blocks {
  using T = Tile<P>;
  static constexpr int kRows = 128 / T::MR * T::MR;  // rows whose panels stay in the second-level cache
  // G is cut by NR as it is made and by MR as it is used
  static constexpr int kLcm = T::MR * T::NR / gcd(T::MR, T::NR);
  static constexpr int kWidth = (224 + kLcm / 2) / kLcm * kLcm;  // columns of a block of G
  static constexpr int kDims = 2 * T::NR;                        // features of a task of the gradient products
  static constexpr int64_t kBytes = int64_t(32) << 20;           // of G
};

// ---- packing in parallel: rows as panels over the features (K = D), or features as panels over the rows (K = rows)

template <int WIDTH, class P, class T>
static void pack_rows_parallel(P* dst, const T* src, int64_t n, int64_t D, int64_t threads) {
  constexpr int64_t kRows = 8 * WIDTH;
  parallel_for(ceil_div(n, kRows), threads, [&](int64_t task, int64_t) {
    const int64_t i = task * kRows;
    pack_rows<WIDTH>(dst + i * padded_k<P>(D), src + i * D, D, min(kRows, n - i), D);
  });
}

template <int WIDTH, class P, class T>
static void pack_features_parallel(P* dst, const T* src, int64_t n, int64_t D, int64_t threads) {
  parallel_for(ceil_div(D, WIDTH), threads, [&](int64_t task, int64_t) {
    const int64_t d = task * WIDTH;
    pack_columns<WIDTH>(dst + d * padded_k<P>(n), src + d, D, min(WIDTH, D - d), n);
  });
}

// Values of a tile outside of its rows x columns become `value`.
template <class P> static inline void fill_outside(Acc<P>* tile, int64_t rows, int64_t columns, Acc<P> value) {
  using T = Tile<P>;
  for (int64_t i = 0; i < T::MR; i++)
    for (int64_t j = i < rows ? columns : 0; j < T::NR; j++) tile[i * T::NR + j] = value;
}
template <class P> static inline bool is_partial(int64_t rows, int64_t columns) {
  return rows < Tile<P>::MR || columns < Tile<P>::NR;
}

// ---- which pairs are positive: those of equal ids

// Ids padded to whole panels, and their range in each, so that a tile without positives (all but the diagonal ones when
// ids are row numbers) costs one comparison.
struct Ids {
  int64_t n, width;
  int32_t *ids, *low, *high;

  Ids(Workspace& ws, int64_t n, int width)
      : n(n),
        width(width),
        ids(ws.take<int32_t>(round_up(n, width))),
        low(ws.take<int32_t>(ceil_div(n, width))),
        high(ws.take<int32_t>(ceil_div(n, width))) {}

  void fill(const int32_t* from, int32_t padding) const {
    for (int64_t first = 0, p = 0; first < n; first += width, p++) {
      low[p] = high[p] = from[first];
      for (int64_t i = first; i < first + width; i++) {
        ids[i] = i < n ? from[i] : padding;
        if (i < n && from[i] < low[p]) low[p] = from[i];
        if (i < n && from[i] > high[p]) high[p] = from[i];
      }
    }
  }
};

template <class P> struct Positives {
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR;
  Ids rows, columns;

  Positives(Workspace& ws, int64_t n, int64_t m) : rows(ws, n, MR), columns(ws, m, NR) {}
  void fill(const int32_t* row_ids, const int32_t* col_ids) const { rows.fill(row_ids, -1), columns.fill(col_ids, -2); }

  bool possible(int64_t i0, int64_t j0) const {
    return rows.low[i0 / MR] <= columns.high[j0 / NR] && columns.low[j0 / NR] <= rows.high[i0 / MR];
  }
  bool in_row(int64_t i, int64_t j0) const {
    int any = 0;
    for (int j = 0; j < NR; j++) any |= rows.ids[i] == columns.ids[j0 + j];
    return any != 0;
  }
  // Calls f(i, j) with places in the tile.
  template <class F> void for_each(int64_t i0, int64_t j0, F&& f) const {
    if (!possible(i0, j0)) return;
    for (int i = 0; i < MR; i++)
      if (in_row(i0 + i, j0))
        for (int j = 0; j < NR; j++)
          if (rows.ids[i0 + i] == columns.ids[j0 + j]) f(i, j);
  }
};

// ---- the gradients

struct Sums {
  double loss, scale, bias;  // sums over pairs: of the loss, of G times the similarity, of G
  void operator+=(const Sums& other) { loss += other.loss, scale += other.scale, bias += other.bias; }
};

// The workspace of `pair_gradients`.
template <class T> struct GradientSpace {
  using P = Operand<T>;
  using B = Blocks<P>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR;
  static constexpr bool kPairs = Tile<P>::KU == 2;  // G^T X takes rows of G in pairs: a second copy
  int64_t chunk, width_blocks;
  P *y, *y_features, *x, *x_features, *g, *g_pairs;
  Sums* sums;

  GradientSpace(Workspace& space, int64_t n, int64_t m, int64_t D, bool want_x, bool want_y) {
    width_blocks = ceil_div(m, B::kWidth);
    const int64_t row_bytes = width_blocks * B::kWidth * int64_t(sizeof(P)) * (kPairs ? 2 : 1);
    const int64_t most = B::kBytes / row_bytes / MR * MR;
    chunk = min(round_up(n, MR), min(4 * B::kRows, most < MR ? MR : most));
    const bool want = want_x || want_y;
    y = space.take<P>(packed_size<P>(m, D, NR));
    y_features = space.take<P>(want_x ? packed_size<P>(D, m, NR) : 0);
    x = space.take<P>(packed_size<P>(chunk, D, MR));
    x_features = space.take<P>(want_y ? packed_size<P>(D, chunk, NR) : 0);
    g = space.take<P>(want ? chunk * width_blocks * B::kWidth : 0);
    g_pairs = space.take<P>(want && kPairs ? chunk * width_blocks * B::kWidth : 0);
    sums = space.take<Sums>(width_blocks * ceil_div(chunk, B::kRows));
  }
  P* block(P* of, int64_t w) const { return of + w * chunk * B::kWidth; }
};

// Keeps a tile of `factor` G: row-major in a block, and for bf16 also with pairs of rows interleaved.
template <class T>
static inline void store_gradient(const GradientSpace<T>& ws, const Acc<T>* tile, Acc<T> factor, int64_t w, int64_t i,
                                  int64_t j) {
  using S = GradientSpace<T>;
  constexpr int W = S::B::kWidth, L = kLanes<Acc<T>>;
  typename S::P* g = ws.block(ws.g, w) + i * W + j;
  for (int r = 0; r < S::MR; r++)
    for (int v = 0; v < S::NR; v += L) store_narrowed(g + r * W + v, load(tile + r * S::NR + v) * factor);
  if constexpr (S::kPairs) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(ws.block(ws.g_pairs, w)) + i / 2 * W + j;
    for (int r = 0; r < S::MR; r += 2)
      for (int c = 0; c < S::NR; c++)
        pairs[r / 2 * W + c] = uint32_t(g[r * W + c].bits) | uint32_t(g[(r + 1) * W + c].bits) << 16;
  }
}

// dx[first : first + rows] = G Y
template <class T>
static void multiply_by_y(const Pairs<T>& p, const GradientSpace<T>& ws, Acc<T>* dx, int64_t first, int64_t rows,
                          int64_t threads) {
  using S = GradientSpace<T>;
  constexpr int W = S::B::kWidth, KU = Tile<typename S::P>::KU;
  const int64_t row_blocks = ceil_div(rows, S::B::kRows);
  parallel_for(row_blocks * ceil_div(p.D, S::B::kDims), threads, [&](int64_t task, int64_t) {
    const int64_t i0 = task % row_blocks * S::B::kRows, i1 = min(i0 + S::B::kRows, rows);
    const int64_t d0 = task / row_blocks * S::B::kDims, d1 = min(d0 + S::B::kDims, p.D);
    for (int64_t w = 0; w < ws.width_blocks; w++)
      for (int64_t d = d0; d < d1; d += S::NR)
        for (int64_t i = i0; i < i1; i += S::MR)
          tile_partial<typename S::P, W, KU>(min(W, p.m - w * W), ws.block(ws.g, w) + i * W,
                                             ws.y_features + d * padded_k<typename S::P>(p.m) + w * W * S::NR,
                                             dx + (first + i) * p.D + d, p.D, w > 0, min(S::MR, i1 - i),
                                             min(S::NR, d1 - d));
  });
}

// dy += G^T X, or = for the first chunk
template <class T>
static void multiply_by_x(const Pairs<T>& p, const GradientSpace<T>& ws, Acc<T>* dy, int64_t first, int64_t rows,
                          int64_t threads) {
  using S = GradientSpace<T>;
  constexpr int W = S::B::kWidth, KU = Tile<typename S::P>::KU;
  const typename S::P* g = S::kPairs ? ws.g_pairs : ws.g;
  parallel_for(ws.width_blocks * ceil_div(p.D, S::B::kDims), threads, [&](int64_t task, int64_t) {
    const int64_t w = task % ws.width_blocks, j1 = min(W, p.m - w * W);
    const int64_t d0 = task / ws.width_blocks * S::B::kDims, d1 = min(d0 + S::B::kDims, p.D);
    for (int64_t d = d0; d < d1; d += S::NR)
      for (int64_t j = 0; j < j1; j += S::MR)
        tile_partial<typename S::P, KU, W * KU>(rows, ws.block(const_cast<typename S::P*>(g), w) + j * KU,
                                                ws.x_features + d * padded_k<typename S::P>(rows),
                                                dy + (w * W + j) * p.D + d, p.D, first > 0, min(S::MR, j1 - j),
                                                min(S::NR, d1 - d));
  });
}

// G of the rows i0 and following of the chunk that starts at row `first`, for the columns of block w.
template <class T, class F>
static Sums gradient_block(const Pairs<T>& p, const GradientSpace<T>& ws, bool keep, Acc<T> factor, int64_t first,
                           int64_t i0, int64_t rows, int64_t w, F&& gradient) {
  using S = GradientSpace<T>;
  const int64_t Kp = padded_k<typename S::P>(p.D), j0 = w * S::B::kWidth;
  Sums sums = {};
  alignas(64) Acc<T> g[S::MR * S::NR];
  gemm<typename S::P>(rows, min(S::B::kWidth, p.m - j0), p.D, ws.x + i0 * Kp, ws.y + j0 * Kp,
                      [&](int64_t i, int64_t j, int64_t r, int64_t c, const Acc<T>* similarities) {
                        gradient(first + i0 + i, j0 + j, r, c, similarities, g, sums);
                        if (keep) store_gradient<T>(ws, g, factor, w, i0 + i, j);
                      });
  return sums;
}

// For every tile of pairs: gradient(i0, j0, rows, columns, similarities, g, sums) reads MR x NR similarities x_i . y_j
// and writes G, zero outside of rows x columns. Then dx [n, D] = factor G Y and dy [m, D] = factor G^T X, where wanted.
template <class T, class F>
static Sums pair_gradients(const Pairs<T>& p, const GradientSpace<T>& ws, Acc<T>* dx, Acc<T>* dy, Acc<T> factor,
                           int64_t threads, F&& gradient) {
  using S = GradientSpace<T>;
  Sums total = {};
  pack_rows_parallel<S::NR>(ws.y, p.y, p.m, p.D, threads);
  if (dx) pack_features_parallel<S::NR>(ws.y_features, p.y, p.m, p.D, threads);
  for (int64_t first = 0; first < p.n; first += ws.chunk) {
    const int64_t rows = min(ws.chunk, p.n - first), row_blocks = ceil_div(rows, S::B::kRows);
    pack_rows_parallel<S::MR>(ws.x, p.x + first * p.D, rows, p.D, threads);
    if (dy) pack_features_parallel<S::NR>(ws.x_features, p.x + first * p.D, rows, p.D, threads);
    parallel_for(row_blocks * ws.width_blocks, threads, [&](int64_t task, int64_t) {
      const int64_t i0 = task % row_blocks * S::B::kRows;
      ws.sums[task] =
          gradient_block(p, ws, dx || dy, factor, first, i0, min(S::B::kRows, rows - i0), task / row_blocks, gradient);
    });
    for (int64_t task = 0; task < row_blocks * ws.width_blocks; task++) total += ws.sums[task];
    if (dx) multiply_by_y(p, ws, dx, first, rows, threads);
    if (dy) multiply_by_x(p, ws, dy, first, rows, threads);
  }
  return total;
}

}  // namespace fvm::FVM_ISA
