// SPDX-License-Identifier: Apache-2.0
// nt_xent_loss: every row of z [R, D] finds its other view among all rows but itself (Chen et al. 2020,
// https://arxiv.org/abs/2002.05709). Rows i and i + R/2 are two views of one image.
//
//   L = w sum_i (lse_i - S_ip),  S = scale Z Z^T,  lse_i = log(sum_{j != i} exp(S_ij)),  p: the other view of i
//   dL/dS_ij + dL/dS_ji = G_ij = w (exp(S_ij - lse_i) + exp(S_ij - lse_j)) - 2 w [j = p],     dL/dZ = scale G Z
//
// S and G are symmetric: only the tiles with pairs i < j are made, forward and backward, and serve both their rows and
// their columns. That is half the work of the dense formula: R^2 D and 3 R^2 D operations.
//
// This file: which tiles those are, and which of their elements are pairs.
#pragma once
#include "contrastive_loss.h"
#include "log_sum_exp.h"

namespace fvm::FVM_ISA {

template <class P> struct Triangle {
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR;
  int64_t R;

  // Whether the tile at (i0, j0) has an element above the diagonal, and whether it has others, too.
  static bool has_pairs(int64_t i0, int64_t j0) { return i0 < j0 + NR - 1; }
  static bool is_cut(int64_t i0, int64_t j0) { return j0 < i0 + MR; }

  // Elements that are no pairs, on the diagonal and below it or beyond the last row or column, become `value`.
  void fill_others(Acc<P>* tile, int64_t i0, int64_t j0, Acc<P> value) const {
    if (is_partial<P>(R - i0, R - j0)) fill_outside<P>(tile, R - i0, R - j0, value);
    if (!is_cut(i0, j0)) return;
    for (int64_t i = i0; i < i0 + MR; i++)
      for (int64_t j = j0; j < min(i + 1, j0 + NR); j++) tile[(i - i0) * NR + j - j0] = value;
  }

  // f(e) for each pair of two views of one image, e its place in the tile.
  template <class F> void for_each_positive(int64_t i0, int64_t j0, F&& f) const {
    for (int64_t i = i0; i < min(i0 + MR, R / 2); i++) {
      const int64_t j = i + R / 2 - j0;
      if (j >= 0 && j < NR) f((i - i0) * NR + j);
    }
  }
};

}  // namespace fvm::FVM_ISA
