// SPDX-License-Identifier: Apache-2.0
// What the contrastive losses share: pairs (x_i, y_j) whose similarities x_i . y_j are made tile by tile, the blocks that
// they are cut into, packed operands, and which pairs are positive.
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

// Threads for so many multiply-adds: below a million, waking others takes longer than the work.
static inline int64_t team(int64_t threads, int64_t work) { return work < (int64_t(1) << 20) ? 1 : threads; }

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Cuts n into parts of nearly the same size: at most `most` (or one unit), and a multiple of `unit`.
static inline int64_t even_part(int64_t n, int64_t most, int64_t unit) {
  const int64_t units = ceil_div(n, unit), fit = most < unit ? 1 : most / unit;
  return ceil_div(units, ceil_div(units, fit)) * unit;
}

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

// Similarities of the first rows, a tile after the other, that a forward pass keeps for the backward: as many panels of
// rows as `size` elements have room for.
template <class P> struct Kept {
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR;
  Acc<P>* tiles = nullptr;
  int64_t size = 0, panels = 0, rows = 0;  // panels: of columns

  Kept() = default;
  Kept(void* tiles, int64_t size, int64_t n, int64_t m)
      : tiles(static_cast<Acc<P>*>(tiles)), size(size), panels(ceil_div(m, NR)) {
    rows = min(ceil_div(n, MR), size / (panels * MR * NR)) * MR;
  }
  Acc<P>* tile(int64_t i, int64_t j) const { return tiles + (i / MR * panels + j / NR) * (MR * NR); }
  void keep(int64_t i, int64_t j, const Acc<P>* similarities) const {
    if (i < rows) memcpy(static_cast<void*>(tile(i, j)), similarities, MR * NR * sizeof(Acc<P>));
  }
  void clear_rest() const {
    for (int64_t e = rows * panels * NR; e < size; e++) tiles[e] = 0;
  }
};

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

  void fill(const int32_t* from, int32_t padding) const {  // from null: row numbers
    for (int64_t first = 0, p = 0; first < n; first += width, p++) {
      for (int64_t i = first; i < first + width; i++) ids[i] = i >= n ? padding : from ? from[i] : int32_t(i);
      low[p] = high[p] = ids[first];
      for (int64_t i = first; i < min(first + width, n); i++) {
        if (ids[i] < low[p]) low[p] = ids[i];
        if (ids[i] > high[p]) high[p] = ids[i];
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

}  // namespace fvm::FVM_ISA
