// SPDX-License-Identifier: Apache-2.0
// Softmax over the keys of transposed logits [keys, 64 queries], and its gradient: all reductions run down the lanes.
#pragma once
#include "window_grid.h"
#include "window_panels.h"
#include "window_prefetch.h"

namespace fvm::FVM_ISA {

// ---- logits, as tiles of raw products come in

template <class S> struct ScaledLogits {  // scale * product + bias
  S* out;
  const S* bias;  // [keys, 64], or a row of zeros when bias_stride is 0
  int64_t bias_stride;
  S scale;
  ScaledLogits at(int64_t i, int64_t j) const {
    return {out + i * kQueries + j, bias + i * bias_stride + j, bias_stride, scale};
  }
  void operator()(int i, int j, Vec<S> acc) const {
    store(out + i * kQueries + j, acc * scale + load(bias + i * bias_stride + j));
  }
};

template <class S> struct CosineLogits {  // scale * product / (|k| |q|) + bias
  ScaledLogits<S> scaled;
  const S *keys, *queries;  // 1 / |k| and scale / |q|
  CosineLogits at(int64_t i, int64_t j) const { return {scaled.at(i, j), keys + i, queries + j}; }
  void operator()(int i, int j, Vec<S> acc) const {
    store(scaled.out + i * kQueries + j,
          acc * keys[i] * load(queries + j) + load(scaled.bias + i * scaled.bias_stride + j));
  }
};

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

// r[0:n] = 1 / max(|row|, 1e-12), n in whole vectors
template <class P> static inline void inverse_norms(Acc<P>* r, const Panels<P>& rows, int64_t n) {
  using S = Acc<P>;
  row_dots(r, rows, rows, n);
  for (int64_t i = 0; i < n; i++) {
    const S norm = root(r[i]);
    r[i] = S(1) / (norm < S(1e-12) ? S(1e-12) : norm);
  }
}

// ---- probabilities as operands

#if defined(__AVX512BF16__)
typedef uint16_t vu16 __attribute__((vector_size(64)));
constexpr vu16 kInterleave = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif

// One step of the left operand, KU keys for a vector of queries
template <class P> static inline void store_step(P* dst, const Vec<Acc<P>>* keys) {
  if constexpr (Tile<P>::KU == 1) {
    store(dst, keys[0]);
#if defined(__AVX512BF16__)
  } else {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)keys[1], (__m512)keys[0]);
    _mm512_storeu_si512(dst, _mm512_permutexvar_epi16((__m512i)kInterleave, halves));
#endif
  }
}

// What the shift mask adds: rows of values by the part that a key lies in. Null where the window is whole.
template <class S> struct BlockMask {
  const int32_t* part;  // [keys]
  const S* values;      // [4, padded], from the first query of the block
  int64_t padded;

  BlockMask(const ShiftMask<S>& mask, int kind, int64_t first)
      : part(kind ? mask.part + kind * mask.N : nullptr),
        values(mask.values + kind * 4 * mask.padded + first),
        padded(mask.padded) {}
};

// m = the largest logit of each query; masks the logits
template <int NV, class S>
static inline void mask_and_max(S* s, int64_t keys, const BlockMask<S>& mask, int64_t lane, Vec<S>* m) {
  constexpr int L = kLanes<S>;
  for (int v = 0; v < NV; v++) m[v] = splat(-S(INFINITY));
  s += lane;
  for (int64_t j = 0; mask.part && j < keys; j++) {
    const S* values = mask.values + mask.part[j] * mask.padded + lane;
    for (int v = 0; v < NV; v++) store(s + j * kQueries + v * L, load(s + j * kQueries + v * L) + load(values + v * L));
  }
  for (int64_t j = 0; j < keys; j++)
    for (int v = 0; v < NV; v++) m[v] = max<S>(m[v], load(s + j * kQueries + v * L));
}

// Sums over keys, for some vectors of queries: of kRun keys at a time, then of these, so that the error does not grow
// with the number of keys.
template <class S, int NV> struct KeySum {
  static constexpr int64_t kRun = 16;
  Vec<S> run[NV] = {}, total[NV] = {};

  void start(int64_t key) {
    if (key % kRun != 0) return;
    for (int v = 0; v < NV; v++) total[v] += run[v], run[v] = Vec<S>{};
  }
  Vec<S> of(int v) const { return total[v] + run[v]; }
};

// p, in steps, = 2^(s - max) (times `keep`, which may be null); inverse_sum = 1 / the sum before
template <class P, int NV, class S>
__attribute__((noinline)) static void softmax_group(S* s, P* p, int64_t keys, const BlockMask<S>& mask, const S* keep,
                                                    S* inverse_sum, int64_t lane, const Prefetch ahead) {
  constexpr int L = kLanes<S>, KU = Tile<P>::KU;
  Vec<S> m[NV];
  KeySum<S, NV> sum;
  mask_and_max<NV>(s, keys, mask, lane, m);
  for (int64_t j = 0; j < keys; j += KU) {
    sum.start(j);
    ahead.rows<KU>(j);
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const int64_t at = j * kQueries + lane + v * L;
      Vec<S> e[KU];
#pragma GCC unroll 2
      for (int u = 0; u < KU; u++) {
        e[u] = j + u < keys ? vexp2(load(s + at + u * kQueries) - m[v]) : Vec<S>{};
        sum.run[v] += e[u];
        if (keep && j + u < keys) e[u] *= load(keep + at + u * kQueries);
      }
      store_step<P>(p + j * kQueries + (lane + v * L) * KU, e);
    }
  }
  for (int v = 0; v < NV; v++) store(inverse_sum + lane + v * L, S(1) / sum.of(v));
}

// ---- the gradient

// The arrays of a block of queries, all [keys, 64]; those of operands may share memory with s and dp when P is S
template <class P> struct GradientBlock {
  using S = Acc<P>;
  S *s, *dp;                // logits; dL/dP
  const S* keep;            // dropout's factors or null
  P *p_rows, *ds_rows;      // left operands over queries
  P* ds_steps;              // left operand over keys
  S* dbias;                 // += dL/dS, or null
  const S *keys, *queries;  // cosine: 1 / |k| and 1 / |q|, or null
};

// s = 2^(s - max), dp *= keep; inverse = 1 / sum of s, mean = sum of P dP over the keys
template <class P, int NV>
static inline void exponentials(const GradientBlock<P>& block, int64_t keys, const BlockMask<Acc<P>>& mask,
                                int64_t lane, Vec<Acc<P>>* inverse, Vec<Acc<P>>* mean, const Prefetch ahead) {
  using S = Acc<P>;
  constexpr int L = kLanes<S>;
  Vec<S> m[NV];
  KeySum<S, NV> sum, dot;
  mask_and_max<NV>(block.s, keys, mask, lane, m);
  for (int64_t j = 0; j < keys; j++) {
    sum.start(j), dot.start(j);
    ahead.rows<1>(j);
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const int64_t at = j * kQueries + lane + v * L;
      const Vec<S> e = vexp2(load(block.s + at) - m[v]);
      Vec<S> dp = load(block.dp + at);
      if (block.keep) store(block.dp + at, dp *= load(block.keep + at));
      store(block.s + at, e);
      sum.run[v] += e;
      dot.run[v] += e * dp;
    }
  }
  for (int v = 0; v < NV; v++) inverse[v] = S(1) / sum.of(v), mean[v] = dot.of(v) * inverse[v];
}

// From s and dp = dO V^T: P and dL/dS = P (dP - sum over keys of P dP), the latter by cosine times 1 / (|k| |q|)
template <class P, int NV>
__attribute__((noinline)) static void gradient_group(const GradientBlock<P>& block, int64_t keys,
                                                     const BlockMask<Acc<P>>& mask, int64_t lane, const Prefetch before,
                                                     const Prefetch after) {
  using S = Acc<P>;
  constexpr int L = kLanes<S>, KU = Tile<P>::KU;
  Vec<S> inverse[NV], mean[NV];
  exponentials<P, NV>(block, keys, mask, lane, inverse, mean, before);
  for (int64_t j = 0; j < keys; j += KU) {
    after.rows<KU>(j);
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const int64_t at = j * kQueries + lane + v * L;
      Vec<S> ds[KU];
#pragma GCC unroll 2
      for (int u = 0; u < KU; u++) {
        ds[u] = Vec<S>{};
        if (j + u >= keys) continue;
        const int64_t here = at + u * kQueries;
        Vec<S> p = load(block.s + here) * inverse[v];
        ds[u] = p * (load(block.dp + here) - mean[v]);
        if (block.dbias) store(block.dbias + here, load(block.dbias + here) + ds[u]);
        if (block.keys) ds[u] = ds[u] * block.keys[j + u] * load(block.queries + lane + v * L);
        if (block.keep) p *= load(block.keep + here);
        store_rounded(block.p_rows + here, p);
        store_rounded(block.ds_rows + here, ds[u]);
      }
      if constexpr (KU > 1) store_step<P>(block.ds_steps + j * kQueries + (lane + v * L) * KU, ds);
    }
  }
}

}  // namespace fvm::FVM_ISA
