// SPDX-License-Identifier: Apache-2.0
// Panels of A packed row by row: MR rows of kChunk consecutive k, one chunk of k after the other. Filling them moves whole
// vectors, where a panel with k slowest would need a transposition. Sums of a chunk are added up at its end, which also
// keeps long sums of floats accurate.
#pragma once
#include "gemm.h"

namespace fvm::FVM_ISA {

constexpr int64_t kChunk = 256;
template <class P> constexpr int kRowStride =
    kChunk + kVecBytes / int(sizeof(P));  // rows fall into different cache sets

template <class P> static inline int64_t row_panel_size(int64_t K) {
  return ceil_div(K, kChunk) * Tile<P>::MR * kRowStride<P>;
}
template <class P> static inline int64_t row_panels_size(int64_t rows, int64_t K) {
  return ceil_div(rows, Tile<P>::MR) * row_panel_size<P>(K);
}

// Row i <- row[0:K], which is zero as far as a multiple of KU and readable a few vectors further.
template <class P> static inline void pack_row(P* panels, int64_t i, const Acc<P>* row, int64_t K) {
  constexpr int V = kLanes<Acc<P>>;
  P* dst = panels + i / Tile<P>::MR * row_panel_size<P>(K) + i % Tile<P>::MR * kRowStride<P>;
  for (int64_t k0 = 0; k0 < K; k0 += kChunk, dst += Tile<P>::MR * kRowStride<P>)
    for (int64_t k = 0; k < min(kChunk, padded_k<P>(K - k0)); k += V) store_narrowed(dst + k, load(row + k0 + k));
}

// For each tile of the product of A (m rows in row panels) and packed B (n columns): epilogue(i0, j0, rows, columns, acc)
template <class P, class Epilogue>
static inline void gemm_rows(int64_t m, int64_t n, int64_t K, const P* A, const P* B, Epilogue&& epilogue) {
  using T = Tile<P>;
  alignas(64) Acc<P> acc[T::MR * T::NR];
  for (int64_t j = 0; j < n; j += T::NR)
    for (int64_t i = 0; i < m; i += T::MR) {
      const P *a = A + i / T::MR * row_panel_size<P>(K), *b = B + j * padded_k<P>(K);
      for (int64_t k = 0; k < K; k += kChunk, a += T::MR * kRowStride<P>, b += kChunk * T::NR)
        tile_strided<P, kRowStride<P>, T::KU>(min(kChunk, K - k), a, b, acc, T::NR, k > 0);
      epilogue(i, j, min(T::MR, m - i), min(T::NR, n - j), acc);
    }
}

}  // namespace fvm::FVM_ISA
