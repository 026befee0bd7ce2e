// SPDX-License-Identifier: Apache-2.0
// log(sum(exp(scale * similarity))) of the rows and columns of a matrix of similarities that is seen tile by tile.
//
// A log-sum-exp is kept as two numbers, `scale * ref + log(sum)`: differences are taken between similarities, before
// they are scaled, and nothing is lost to their size. No bound of the similarities is assumed: `ref` follows the largest
// that was met, so that a large scale neither overflows on related features nor underflows on unrelated ones.
#pragma once
#include "gemm.h"

namespace fvm::FVM_ISA {

template <class A> constexpr A kLowest = sizeof(A) == 4 ? A(-3e38) : A(-1e308);  // a similarity that no sum notices

// Below this spread of the logits of a tile one exponential serves rows and columns: none is lost to underflow, and the
// rounding of its argument, which grows with the spread, stays below that of the similarities.
template <class A> constexpr A kSpan = 32;

// A scale taken apart: `sign` goes to the similarities, so that a larger one is a larger logit. Zero becomes a number
// that changes no logit but still separates the padding from them.
template <class A> struct Scale {
  A size, sign;
  explicit Scale(double scale)
      : size(A(std::fabs(scale) < 1e-30 ? 1e-30 : std::fabs(scale))), sign(scale < 0 ? -1 : 1) {}
};

// lse = scale * ref + rest: exp(S - lse) = exp(scale * (similarity - ref) - rest) loses nothing to the size of S
template <class A> struct Lse {
  A *ref, *rest;
  void set(int64_t i, double lse, Scale<A> scale) const {
    ref[i] = A(lse / scale.size);
    rest[i] = A(lse - double(scale.size) * double(ref[i]));
  }
};
template <class V, class A> static inline V probability(V similarity, A scale, V ref, V rest) {
  return vexp((similarity - ref) * scale - rest);
}

template <class A> static inline double log_sum_exp(A ref, A sum, A scale) {
  return double(scale) * double(ref) + std::log(double(sum));
}
// log(exp(a) + exp(b)); NaN stays NaN
static inline double log_add_exp(double a, double b) {
  const double top = a > b ? a : b, low = a > b ? b : a;
  return top + std::log1p(std::exp(low - top));
}

// ref <- max(ref, other); a sum relative to the old ref is worth `keep` of it, one relative to other `take` of it.
template <class A>
static inline void raise_ref(Vec<A>& ref, Vec<A> other, A scale, Vec<A>& keep, Vec<A>& take) {
  const Vec<A> top = max<A>(ref, other);
  keep = vexp((ref - top) * scale), take = vexp((other - top) * scale);
  ref = top;
}

template <class A> static inline void range(const A* values, int n, A& low, A& high) {
  Vec<A> lows = load(values), highs = lows;
  for (int e = kLanes<A>; e < n; e += kLanes<A>)
    lows = min<A>(lows, load(values + e)), highs = max<A>(highs, load(values + e));
  low = -max_lanes<A>(-lows), high = max_lanes<A>(highs);
}

// Rows, or columns: the weight of each in the loss, and its log-sum-exp. A vector may reach past the end.
template <class A> struct Terms {
  A* weight;
  Lse<A> lse;
};

// From the similarities of the tile at (i0, j0): weight exp(S - lse) of the row plus that of the column. `outliers`: some
// elements, which the caller replaces, are no part of the log-sum-exps and may be far above all others.
template <class P> struct WeightedProbabilities {
  using A = Acc<P>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>, RV = (MR + L - 1) / L;
  Terms<A> rows, columns;
  Scale<A> scale;

  void operator()(const A* similarities, A* g, int64_t i0, int64_t j0, bool outliers = false) const {
    A low, high;
    range(similarities, MR * NR, low, high);
    if ((high - low) * scale.size < kSpan<A> && !outliers)
      narrow(similarities, g, i0, j0, scale.sign < 0 ? -low : high);
    else
      wide(similarities, g, i0, j0);
  }

 private:
  // exp(S - lse) = exp(S - high) exp(high - lse), the second a number for each row and column
  void narrow(const A* similarities, A* g, int64_t i0, int64_t j0, A high) const {
    A of_row[RV * L], of_column[NR];
    auto factors = [&](const Terms<A>& of, int64_t first, int n, A* out) {
      for (int v = 0; v < n; v += L) {
        const V p = probability(splat(high), scale.size, load(of.lse.ref + first + v), load(of.lse.rest + first + v));
        store(out + v, load(of.weight + first + v) * p);
      }
    };
    factors(rows, i0, RV * L, of_row), factors(columns, j0, NR, of_column);
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += L) {
        const V e = vexp((load(similarities + i * NR + j) * scale.sign - high) * scale.size);
        store(g + i * NR + j, e * (load(of_column + j) + of_row[i]));
      }
  }

  void wide(const A* similarities, A* g, int64_t i0, int64_t j0) const {
    const Lse<A>&row = rows.lse, &column = columns.lse;
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += L) {
        const V u = load(similarities + i * NR + j) * scale.sign;
        const V by_row = probability(u, scale.size, splat(row.ref[i0 + i]), splat(row.rest[i0 + i]));
        const V by_column = probability(u, scale.size, load(column.ref + j0 + j), load(column.rest + j0 + j));
        store(g + i * NR + j, by_row * rows.weight[i0 + i] + by_column * load(columns.weight + j0 + j));
      }
  }
};

// The sums of MR rows over the tiles so far, each spread over the lanes until its row ends.
template <class P> struct RowSums {
  using A = Acc<P>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, NV = Tile<P>::NV, L = kLanes<A>, RV = (MR + L - 1) / L;
  V ref[RV], sum[MR];

  RowSums() {
    for (V& v : ref) v = splat(kLowest<A>);
    for (V& v : sum) v = V{};
  }
  double log_sum(int i, A scale) const { return log_sum_exp(ref[i / L][i % L], sum_lanes<A>(sum[i]), scale); }

  // Adds a tile to these rows, and to the NR columns whose refs and sums are given.
  void add(const A* u, A scale, A* col_ref, A* col_sum) {
    A low, high;
    range(u, MR * NR, low, high);
    V tile_ref[RV], tile_col_ref[NV], keep[RV], take[RV], col_keep[NV], col_take[NV], cols[NV] = {};
    const bool narrow = (high - low) * scale < kSpan<A>;
    for (V& v : tile_ref) v = splat(high);
    for (V& v : tile_col_ref) v = splat(high);
    if (!narrow) refs_of_wide(u, tile_ref, tile_col_ref);
    for (int v = 0; v < RV; v++) raise_ref(ref[v], tile_ref[v], scale, keep[v], take[v]);
    for (int j = 0; j < NV; j++) {
      V of_columns = load(col_ref + j * L);
      raise_ref(of_columns, tile_col_ref[j], scale, col_keep[j], col_take[j]);
      store(col_ref + j * L, of_columns);
    }
    for (int i = 0; i < MR; i++) {
      V row = {};
      for (int j = 0; j < NV; j++) {
        const V v = load(u + i * NR + j * L);
        const V e = vexp((v - tile_ref[i / L][i % L]) * scale);
        row += e;
        cols[j] += narrow ? e : vexp((v - tile_col_ref[j]) * scale);
      }
      sum[i] = sum[i] * keep[i / L][i % L] + row * take[i / L][i % L];
    }
    for (int j = 0; j < NV; j++) store(col_sum + j * L, load(col_sum + j * L) * col_keep[j] + cols[j] * col_take[j]);
  }

 private:
  static void refs_of_wide(const A* u, V* row_ref, V* col_ref) {
    A* refs = reinterpret_cast<A*>(row_ref);
    for (int j = 0; j < NV; j++) col_ref[j] = load(u + j * L);
    for (int i = 0; i < MR; i++) {
      V top = load(u + i * NR);
      for (int j = 0; j < NV; j++) {
        const V v = load(u + i * NR + j * L);
        top = max<A>(top, v), col_ref[j] = max<A>(col_ref[j], v);
      }
      refs[i] = max_lanes<A>(top);
    }
  }
};

}  // namespace fvm::FVM_ISA
