// SPDX-License-Identifier: Apache-2.0
// Packed, register-blocked matrix products: acc[MR x NR] += A[MR x K] B[K x NR], one tile at a time.
//
// A kernel packs its operands into panels (from whatever layout they have in memory), calls `tile` for each pair of
// panels, and does what it likes with the MR x NR result while it is still in the first-level cache. Panels of A hold
// MR rows, panels of B hold NR columns; inside a panel the K index runs slowest, so the inner loop only streams.
// The accumulation order over K is fixed, so a tile's value depends on nothing but its operands.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace fvm::FVM_ISA {

// What operands of storage type T are multiplied in. bf16 pairs go to vdpbf16ps where the processor has it; elsewhere,
// as fp16 everywhere, they are widened to float while they are packed.
template <class T> struct OperandOf { using type = float; };
template <> struct OperandOf<double> { using type = double; };
#if defined(__AVX512BF16__)
template <> struct OperandOf<bf16> { using type = bf16; };
#endif
template <class T> using Operand = typename OperandOf<T>::type;

// Register tile: MR x NR accumulators, the operands of one step, and nothing spilled.
template <class P> struct Tile {
  using acc = Acc<P>;
  static constexpr int lanes = kLanes<acc>;
#if defined(__AVX512F__)
  static constexpr int MR = 14, NV = 2;
#elif defined(__AVX2__)
  static constexpr int MR = 6, NV = 2;
#elif defined(__aarch64__)
  static constexpr int MR = 8, NV = 3;
#else
  static constexpr int MR = 4, NV = 2;
#endif
  static constexpr int NR = NV * lanes;
  static constexpr int KU = sizeof(P) == 2 ? 2 : 1;  // K is padded to a multiple of KU: vdpbf16ps takes pairs
};

template <class P> constexpr int64_t padded_k(int64_t K) { return ceil_div(K, Tile<P>::KU) * Tile<P>::KU; }
// elements of a packed operand with n rows (of A) or columns (of B), in panels of `width`
template <class P> constexpr int64_t packed_size(int64_t n, int64_t K, int width) {
  return ceil_div(n, width) * width * padded_k<P>(K);
}

// ---- packing. Element (i, k) of the operand is src[i * ld + k] (rows) or src[k * ld + i] (columns); i runs inside the
// panel. Missing rows and the K padding are zero.

template <class P, class T> static inline P to_operand(T x) {
  if constexpr (sizeof(P) == sizeof(T))
    return x;
  else
    return narrow<P>(widen(x));
}

// Two steps as one: pairs[2 i], pairs[2 i + 1] = first[i], second[i]
__attribute__((always_inline)) static inline void interleave(bf16* pairs, const bf16* first, const bf16* second,
                                                             int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t pair = uint32_t(first[i].bits) | uint32_t(second[i].bits) << 16;
    memcpy(static_cast<void*>(pairs + 2 * i), &pair, 4);
  }
}

// One vector of the K steps of a row, a step being KU operands in the room of one accumulator.
template <class P, class T> static inline Vec<Acc<P>> load_steps(const T* src) {
  if constexpr (Tile<P>::KU == 2) {
    Vec<Acc<P>> pairs;
    memcpy(&pairs, src, sizeof pairs);  // aligned to one operand, not to two
    return pairs;
  } else {
    return load_widened(src);
  }
}

// A panel of `rows` rows, K steps at a time transposed in registers.
template <int WIDTH, class P, class T>
static inline void pack_row_panel(P* dst, const T* src, int64_t ld, int64_t rows, int64_t K) {
  using A = Acc<P>;
  constexpr int KU = Tile<P>::KU, L = kLanes<A>;
  const int64_t Kp = padded_k<P>(K), steps = K / KU / L * L;
  for (int i0 = 0; i0 < WIDTH; i0 += L) {
    constexpr int kLast = WIDTH % L == 0 ? L : WIDTH % L;
    const bool whole = i0 + L <= WIDTH;
    for (int64_t step = 0; step < steps; step += L) {
      Vec<A> v[L];
      for (int i = 0; i < L; i++)
        v[i] = i0 + i < min(rows, WIDTH) ? load_steps<P>(src + (i0 + i) * ld + step * KU) : Vec<A>{};
      transpose<A>(v);
      for (int k = 0; k < L; k++) {
        A* d = reinterpret_cast<A*>(dst) + (step + k) * WIDTH + i0;
        if (whole)
          store(d, v[k]);
        else
          memcpy(static_cast<void*>(d), &v[k], kLast * sizeof(A));
      }
    }
  }
  for (int64_t k = steps * KU; k < Kp; k++)
    for (int i = 0; i < WIDTH; i++)
      dst[(k / KU * WIDTH + i) * KU + k % KU] = i < rows && k < K ? to_operand<P>(src[i * ld + k]) : P{};
}

template <int WIDTH, class P, class T>
static inline void pack_rows(P* dst, const T* src, int64_t ld, int64_t n, int64_t K) {
  for (int64_t i = 0; i < n; i += WIDTH, dst += WIDTH * padded_k<P>(K))
    pack_row_panel<WIDTH>(dst, src + i * ld, ld, min(WIDTH, n - i), K);
}

template <int WIDTH, class P, class T>
static inline void pack_columns(P* dst, const T* src, int64_t ld, int64_t n, int64_t K) {
  constexpr int KU = Tile<P>::KU;
  const int64_t Kp = padded_k<P>(K);
  for (int64_t i0 = 0; i0 < n; i0 += WIDTH, dst += WIDTH * Kp) {
    const int64_t columns = min(WIDTH, n - i0);
    for (int64_t k = 0; k < Kp; k += KU) {
      P* d = dst + k * WIDTH;
      const T* s = src + k * ld + i0;
      if (columns < WIDTH || k + KU > K) {
        for (int i = 0; i < WIDTH * KU; i++)
          d[i] = i / KU < columns && k + i % KU < K ? to_operand<P>(s[i % KU * ld + i / KU]) : P{};
      } else if constexpr (KU == 2) {
        interleave(d, s, s + ld, WIDTH);
      } else {
        constexpr int L = kLanes<Acc<P>>, kVectors = WIDTH / L * L;
        for (int i = 0; i < kVectors; i += L) store(d + i, load_widened(s + i));
        for (int i = kVectors; i < WIDTH; i++) d[i] = to_operand<P>(s[i]);
      }
    }
  }
}

// ---- the inner loop

// acc[i][j] += A[i * ROW] B[j] for one step of K: MR rows by NV vectors of columns
template <class P, int ROW, int MR, int NV>
__attribute__((always_inline)) static inline void add_step(Vec<Acc<P>> (&acc)[MR][NV], const P* A, const P* B) {
  using V = Vec<Acc<P>>;
  constexpr int L = kLanes<Acc<P>>;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(P) == 2) {
    __m512bh bv[NV];
    for (int j = 0; j < NV; j++) bv[j] = (__m512bh)_mm512_loadu_si512(B + j * L * 2);
    for (int i = 0; i < MR; i++) {
      int32_t pair;
      memcpy(&pair, A + i * ROW, 4);
      for (int j = 0; j < NV; j++)
        acc[i][j] = (V)_mm512_dpbf16_ps((__m512)acc[i][j], (__m512bh)_mm512_set1_epi32(pair), bv[j]);
    }
  } else
#endif
  {
    V bv[NV];
    for (int j = 0; j < NV; j++) bv[j] = load(B + j * L);
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NV; j++) acc[i][j] += A[i * ROW] * bv[j];
  }
}

// out[MR x NR], row stride ld: = A B, or += A B when `add`. B is one panel. A's step k (a pair of them, when KU is 2)
// of row i is at A[i * ROW + k / KU * STEP]: a packed panel has ROW = KU and STEP = MR * KU, a slice of a wider one a
// larger STEP, a row-major block ROW = its stride and STEP = KU.
// Never inlined: amid the registers of an epilogue the compiler spills accumulators inside the loop (twice the time).
template <class P, int ROW, int STEP>
__attribute__((noinline)) static void tile_strided(int64_t K, const P* __restrict A, const P* __restrict B,
                                                   Acc<P>* __restrict out, int64_t ld, bool add) {
  using T = Tile<P>;
  using V = Vec<Acc<P>>;
  V acc[T::MR][T::NV];
  for (int i = 0; i < T::MR; i++)
    for (int j = 0; j < T::NV; j++) acc[i][j] = V{};
  for (int64_t k = 0; k < K; k += T::KU, A += STEP, B += T::NR * T::KU) {
    add_step<P, ROW>(acc, A, B);
  }
  for (int i = 0; i < T::MR; i++)
    for (int j = 0; j < T::NV; j++) {
      Acc<P>* o = out + i * ld + j * T::lanes;
      store(o, add ? load(o) + acc[i][j] : acc[i][j]);
    }
}

// The same of two packed panels.
template <class P>
static inline void tile(int64_t K, const P* A, const P* B, Acc<P>* out, int64_t ld, bool add = false) {
  tile_strided<P, Tile<P>::KU, Tile<P>::MR * Tile<P>::KU>(K, A, B, out, ld, add);
}

// The same where only rows x columns of the tile exist in `out`.
template <class P, int ROW, int STEP>
static inline void tile_partial(int64_t K, const P* A, const P* B, Acc<P>* out, int64_t ld, bool add, int64_t rows,
                                int64_t columns) {
  using T = Tile<P>;
  if (rows == T::MR && columns == T::NR) return tile_strided<P, ROW, STEP>(K, A, B, out, ld, add);
  alignas(64) Acc<P> acc[T::MR * T::NR];
  tile_strided<P, ROW, STEP>(K, A, B, acc, T::NR, false);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) out[i * ld + j] = (add ? out[i * ld + j] : 0) + acc[i * T::NR + j];
}

// For each tile of the product of packed A (m rows) and packed B (n columns): epilogue(i0, j0, rows, columns, acc),
// with acc an MR x NR array of row stride NR. B's panel stays in the first-level cache while A's panels pass by.
template <class P, class Epilogue>
static inline void gemm(int64_t m, int64_t n, int64_t K, const P* A, const P* B, Epilogue&& epilogue) {
  using T = Tile<P>;
  const int64_t Kp = padded_k<P>(K);
  alignas(64) Acc<P> acc[T::MR * T::NR];
  for (int64_t j = 0; j < n; j += T::NR)
    for (int64_t i = 0; i < m; i += T::MR) {
      tile<P>(K, A + i * Kp, B + j * Kp, acc, T::NR);
      epilogue(i, j, min(T::MR, m - i), min(T::NR, n - j), acc);
    }
}

}  // namespace fvm::FVM_ISA
