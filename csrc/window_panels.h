// SPDX-License-Identifier: Apache-2.0
// The operands of attention inside a window, and their products.
//
// Logits are held transposed, keys x 64 queries: the lanes of a vector are queries, so that maxima and sums over keys
// need no exchange of lanes, and the same array read along its columns or its rows is the left operand of P V and of
// P^T dO. q, k, v and dO lie in panels of NR channels, [tokens, NR] each: a left operand over channels, and, where
// steps are single, a right operand over tokens too.
#pragma once
#include "gemm.h"
#include "window_grid.h"

namespace fvm::FVM_ISA {

constexpr int64_t kSlack = 16;  // rows that tiles and transpositions may read or write after the last

// dst[0:lanes] = v, by the rounding instruction where there is one: it takes numbers below 2^-126 for zero
template <class T> static inline void store_rounded(T* dst, Vec<Acc<T>> v) { store_narrowed(dst, v); }
#if defined(__AVX512BF16__)
template <> inline void store_rounded<bf16>(bf16* dst, vf32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

// dst[0:n] = row
template <class T> static inline void write_row(T* dst, const Acc<T>* row, int64_t n) {
  constexpr int L = kLanes<Acc<T>>;
  int64_t e = 0;
  for (; e + L <= n; e += L) store_rounded(dst + e, load(row + e));
  for (; e < n; e++) dst[e] = narrow<T>(row[e]);
}

// Panels of one operand: channels in groups of NR
template <class P> struct Panels {
  static constexpr int NR = Tile<P>::NR;
  P* p;
  int64_t n, d;

  static int64_t size(int64_t n, int64_t d) { return ceil_div(d, NR) * (n + kSlack) * NR; }
  int64_t stride() const { return (n + kSlack) * NR; }
  int64_t count() const { return ceil_div(d, NR); }
  P* panel(int64_t c) const { return p + c * stride(); }
  int64_t width(int64_t c) const { return min(NR, d - c * NR); }
  int64_t vectors(int64_t c) const { return ceil_div(width(c), kLanes<Acc<P>>); }
  void clear_slack() const {
    for (int64_t c = 0; c < count(); c++) memset(static_cast<void*>(panel(c) + n * NR), 0, kSlack * NR * sizeof(P));
  }
};

// panels <- d values from row_of(i), for each row i. Not inlined, like the loops over keys: amid the variables of its
// callers the counters would live in memory.
template <class P, class F> __attribute__((noinline)) static void read_rows(const Panels<P> panels, const F row_of) {
  constexpr int NR = Panels<P>::NR;
  for (int64_t c = 0; c < panels.count(); c++) {
    P* dst = panels.panel(c);
    const int64_t width = panels.width(c);
    for (int64_t i = 0; i < panels.n; i++, dst += NR) {
      const auto* src = row_of(i) + c * NR;
      if (width < NR) {
        memset(static_cast<void*>(dst), 0, NR * sizeof(P));
        convert_row(dst, src, width);
      } else if constexpr (sizeof(P) == sizeof(*src)) {
        memcpy(static_cast<void*>(dst), src, NR * sizeof(P));
      } else {
        for (int e = 0; e < NR; e += kLanes<Acc<P>>) store(dst + e, load_widened(src + e));
      }
    }
  }
}

// to[channel step, 64 queries] <- rows [first, first + lanes) of the panels; lanes in whole vectors
template <class P>
static inline void transpose_rows(Acc<P>* to, const Panels<P>& panels, int64_t first, int64_t lanes) {
  using A = Acc<P>;
  constexpr int L = kLanes<A>, kSteps = Tile<P>::NR / Tile<P>::KU;
  for (int64_t c = 0; c < panels.count(); c++, to += kSteps * kQueries)
    for (int64_t i0 = 0; i0 < lanes; i0 += L)
      for (int64_t step = 0; step * Tile<P>::KU < panels.width(c); step += L) {
        const A* src = reinterpret_cast<const A*>(panels.panel(c) + (first + i0) * Tile<P>::NR) + step;
        Vec<A> v[L];
        for (int i = 0; i < L; i++) v[i] = load(src + i * kSteps);
        transpose<A>(v);
        for (int k = 0; k < L; k++) store(to + (step + k) * kQueries + i0, v[k]);
      }
}

// to[c, r] = factor * from[r, c] for a tile of up to a vector of rows and columns; `width` of the rows are written,
// zeros after the last
template <class S>
static inline void transpose_tile(S* to, int64_t to_stride, const S* from, int64_t from_stride, int64_t rows,
                                  int64_t columns, int64_t width, S factor = 1) {
  constexpr int L = kLanes<S>;
  Vec<S> v[L];
  for (int r = 0; r < L; r++) {
    v[r] = Vec<S>{};
    if (r < rows && columns < L)
      memcpy(&v[r], from + r * from_stride, columns * sizeof(S));
    else if (r < rows)
      v[r] = load(from + r * from_stride);
  }
  transpose<S>(v);
  for (int c = 0; c < L; c++) v[c] *= factor;
  for (int c = 0; c < min(columns, L); c++)
    if (width < L)
      memcpy(to + c * to_stride, &v[c], width * sizeof(S));
    else
      store(to + c * to_stride, v[c]);
}

// The panels as right operands over tokens: themselves, or their rows interleaved in pairs
template <class P> static inline Panels<P> token_steps(const Panels<P>& panels, P* pairs) {
  constexpr int NR = Panels<P>::NR;
  if constexpr (Tile<P>::KU == 1) {
    return panels;
  } else {
    const Panels<P> to{pairs, panels.n, panels.d};
    for (int64_t c = 0; c < panels.count(); c++)
      for (int64_t i = 0; i < panels.n; i += 2) {
        const P* rows = panels.panel(c) + i * NR;
        interleave(to.panel(c) + i * NR, rows, rows + NR, NR);
      }
    return to;
  }
}

// The sum of the lanes of each row, in the lane of its number; the rows are used up
template <class T, int BLOCK = kLanes<T> / 2> static inline Vec<T> sum_rows(Vec<T>* rows) {
  for (int i = 0; i < BLOCK; i++)
    rows[i] = exchange_blocks<BLOCK, false, T>(rows[i], rows[i + BLOCK]) +
              exchange_blocks<BLOCK, true, T>(rows[i], rows[i + BLOCK]);
  if constexpr (BLOCK > 1) return sum_rows<T, BLOCK / 2>(rows);
  return rows[0];
}

// dots[i] = a_i . b_i for the first n rows in whole vectors
template <class P, class Q>
static inline void row_dots(Acc<P>* dots, const Panels<P>& a, const Panels<Q>& b, int64_t n) {
  using A = Acc<P>;
  constexpr int L = kLanes<A>, NR = Panels<P>::NR;
  static_assert(NR == Panels<Q>::NR);
  for (int64_t i0 = 0; i0 < n; i0 += L) {
    Vec<A> v[L];
    for (int i = 0; i < L; i++) {
      v[i] = Vec<A>{};
      for (int64_t c = 0; c < a.count(); c++)
        for (int64_t e = 0; e < a.width(c); e += L)
          v[i] += load_widened(a.panel(c) + (i0 + i) * NR + e) * load_widened(b.panel(c) + (i0 + i) * NR + e);
    }
    store(dots + i0, sum_rows<A>(v));
  }
}

// ---- products. What becomes of an accumulator is said by a `Finish`: at(i, j) is the same for the tile that starts
// there.

template <class S, int LD> struct StoreTile {
  S* out;
  bool add;
  StoreTile at(int64_t i, int64_t j) const { return {out + i * LD + j, add}; }
  void operator()(int i, int j, Vec<S> acc) const {
    S* o = out + i * LD + j;
    store(o, add ? load(o) + acc : acc);
  }
};

// Left operand: step k of row i at A[i * ROW + k / KU * STEP], `jump` further after every `run` steps. Right operand:
// NV vectors of step k at B[k / KU * BSTEP]. Never inlined: see tile_strided.
template <class P, int MR, int NV, int ROW, int STEP, int BSTEP, class Finish>
__attribute__((noinline)) static void window_tile(int64_t K, int64_t run, int64_t jump, const P* __restrict A,
                                                  const P* __restrict B, const Finish finish) {
  using T = Tile<P>;
  using V = Vec<Acc<P>>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = V{};
  for (int64_t k0 = 0; k0 < K; k0 += run, A += jump) {
    const P* a = A;
    for (int64_t k = 0; k < min(run, K - k0); k += T::KU, a += STEP, B += BSTEP) add_step<P, ROW>(acc, a, B);
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) finish(i, j * T::lanes, acc[i][j]);
}

// f.operator()<NV>(first vector) for groups of the tile's width, the last one perhaps narrower
template <class P, class F> static inline void for_each_group(int64_t vectors, F&& f) {
  constexpr int NV = Tile<P>::NV;
  static_assert(NV <= 3);
  for (int64_t v = 0; v < vectors; v += NV) {
    if (vectors - v >= NV)
      f.template operator()<NV>(v);
    else if (vectors - v == 1)
      f.template operator()<1>(v);
    else
      f.template operator()<2>(v);
  }
}

// m rows by `vectors` vectors of columns, in tiles of MR rows or, at the end, little more than half of them
template <int ROW, int STEP, int BSTEP, class P, class Finish>
static inline void window_product(int64_t m, int64_t vectors, int64_t K, int64_t run, int64_t jump, const P* A,
                                  const P* B, const Finish& finish) {
  using T = Tile<P>;
  constexpr int kHalf = T::MR / 2 + 1;
  for_each_group<P>(vectors, [&]<int NV>(int64_t v) {
    const P* b = B + v * T::lanes * T::KU;
    int64_t i = 0;
    for (; m - i > kHalf; i += T::MR)
      window_tile<P, T::MR, NV, ROW, STEP, BSTEP>(K, run, jump, A + i * ROW, b, finish.at(i, v * T::lanes));
    if (i < m) window_tile<P, kHalf, NV, ROW, STEP, BSTEP>(K, run, jump, A + i * ROW, b, finish.at(i, v * T::lanes));
  });
}

// X Y^T over channels, keys x queries: X in panels, Y transposed
template <class P, class Finish>
static inline void product_over_channels(const Panels<P>& x, const Acc<P>* y, int64_t vectors, const Finish& finish) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  window_product<NR, KU, kQueries * KU>(x.n, vectors, x.d, NR, x.stride(), x.p, reinterpret_cast<const P*>(y), finish);
}

// out = P X over keys for a block of queries, a panel of channels: P in steps of keys
template <class P>
static inline void product_over_keys(const P* probabilities, int64_t queries, const Panels<P>& x, int64_t c,
                                     Acc<P>* out) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  const StoreTile<Acc<P>, NR> finish{out, false};
  window_product<KU, int(kQueries) * KU, NR * KU>(queries, x.vectors(c), x.n, x.n + 1, 0, probabilities, x.panel(c),
                                                  finish);
}

// out (+)= P^T X over a block of queries that starts at `first`, all keys, a panel of channels: P in rows of keys
template <class P>
static inline void product_over_queries(const P* probabilities, int64_t keys, int64_t first, int64_t queries,
                                        const Panels<P>& x, int64_t c, Acc<P>* out) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  const StoreTile<Acc<P>, NR> finish{out, first > 0};
  window_product<int(kQueries), KU, NR * KU>(keys, x.vectors(c), queries, queries + 1, 0, probabilities,
                                             x.panel(c) + first * NR, finish);
}

}  // namespace fvm::FVM_ISA
