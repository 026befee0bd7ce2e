// SPDX-License-Identifier: Apache-2.0
// clip_loss: cross-entropy over the rows and the columns of S = scale X Y^T (Radford et al. 2021,
// https://arxiv.org/abs/2103.00020), against hard, smoothed or a teacher's targets.
//
//   L = sum_i w_i (lse_i - sum_j q_ij S_ij) + sum_j w_j (lse_j - sum_i q'_ij S_ij),   lse: log-sum-exp of row or column
//   dL/dS_ij = w_i exp(S_ij - lse_i) + w_j exp(S_ij - lse_j) - Q_ij,                  Q_ij = w_i q_ij + w_j q'_ij
//
// The forward makes every tile of S once for both directions; the backward once more, but for those of the first rows,
// which the forward keeps as long as they are no more than a few times the features. The loss of a pair that is told
// apart well is a small difference of lse and S: differences are taken between similarities, before they are scaled,
// and log-sum-exps are kept in double. This file: what both passes know of the rows, the columns and their targets.
#pragma once
#include "contrastive_loss.h"
#include "log_sum_exp.h"

namespace fvm::FVM_ISA {

// ---- what is known of each row, or column: padded to whole panels with what adds nothing

template <class A> struct Side {
  int64_t n, padded;
  A* weight;         // of its term in the loss
  double* positive;  // of each of its positive pairs
  Lse<A> lse, teacher;

  Side(Workspace& ws, int64_t n, int width)
      : n(n), padded(round_up(n, width) + kLanes<A>) {  // a vector may reach past the end
    weight = ws.take<A>(padded), positive = ws.take<double>(padded);
    lse = {ws.take<A>(padded), ws.take<A>(padded)};
    teacher = {ws.take<A>(padded), ws.take<A>(padded)};
  }
  // targets [3, n]: weight, positive, the teacher's log-sum-exp. Null: one positive each, `hard` of its target.
  void fill(const double* targets, double hard, const double* lse_of, Scale<A> scale, Scale<A> teacher_scale) const {
    for (int64_t i = 0; i < padded; i++) {
      weight[i] = i < n ? A(targets ? targets[i] : 0.5 / double(n)) : 0;
      positive[i] = i < n ? (targets ? targets[n + i] : 0.5 / double(n) * hard) : 0;
      lse.set(i, i < n && lse_of ? lse_of[i] : 0, scale);
      teacher.set(i, i < n && targets ? targets[2 * n + i] : 0, teacher_scale);
    }
  }
};

// ---- targets

template <class T> struct ClipInputs {
  Pairs<T> pairs, teacher;  // teacher.x is null without one
  const int32_t *row_ids, *col_ids;
  const double *row_targets, *col_targets, *lse;  // lse: of rows, then of columns; null before they are known
  double scale, teacher_scale, teacher_weight, row_smoothing, col_smoothing;
};

template <class T> struct ClipTargets {
  using P = Operand<T>;
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>;
  Positives<P> positives;
  Side<A> row, column;
  P *teacher_x, *teacher_y;
  int64_t teacher_dim;
  Scale<A> scale, teacher_scale;
  A teacher_weight, row_smoothing, col_smoothing;

  ClipTargets(Workspace& ws, const ClipInputs<T>& in)
      : positives(ws, in.pairs.n, in.pairs.m),
        row(ws, in.pairs.n, MR),
        column(ws, in.pairs.m, NR),
        teacher_x(ws.take<P>(packed_size<P>(in.teacher.n, in.teacher.D, MR))),
        teacher_y(ws.take<P>(packed_size<P>(in.teacher.m, in.teacher.D, NR))),
        teacher_dim(in.teacher.D),
        scale(in.scale),
        teacher_scale(in.teacher_scale),
        teacher_weight(A(in.teacher_weight)),
        row_smoothing(A(in.row_smoothing)),
        col_smoothing(A(in.col_smoothing)) {}

  void fill(const ClipInputs<T>& in, int64_t threads) const {
    positives.fill(in.row_ids, in.col_ids);
    const double hard = 1 - in.row_smoothing * double(in.pairs.m);
    row.fill(in.row_targets, hard, in.lse, scale, teacher_scale);
    column.fill(in.col_targets, hard, in.lse ? in.lse + in.pairs.n : nullptr, scale, teacher_scale);
    if (teacher_dim == 0) return;
    pack_rows_parallel<MR>(teacher_x, in.teacher.x, in.teacher.n, teacher_dim, threads);
    pack_rows_parallel<NR>(teacher_y, in.teacher.y, in.teacher.m, teacher_dim, threads);
  }

  // Targets that every pair has a share of: f(e, q) for each vector, e its place in the tile.
  template <class F> void for_each_dense(int64_t i0, int64_t j0, F&& f) const {
    if (teacher_dim == 0 && row_smoothing == 0 && col_smoothing == 0) return;
    alignas(64) A t[MR * NR];
    if (teacher_dim) {
      const int64_t Kp = padded_k<P>(teacher_dim);
      tile<P>(teacher_dim, teacher_x + i0 * Kp, teacher_y + j0 * Kp, t, NR);
    }
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += L) {
        const V w_row = splat(row.weight[i0 + i]), w_column = load(column.weight + j0 + j);
        V q = w_row * row_smoothing + w_column * col_smoothing;
        if (teacher_dim) {
          const V u = load(t + i * NR + j) * teacher_scale.sign;
          const V by_row =
              probability(u, teacher_scale.size, splat(row.teacher.ref[i0 + i]), splat(row.teacher.rest[i0 + i]));
          const V by_column =
              probability(u, teacher_scale.size, load(column.teacher.ref + j0 + j), load(column.teacher.rest + j0 + j));
          q += (w_row * by_row + w_column * by_column) * teacher_weight;
        }
        f(i * NR + j, q);
      }
  }

  // f(e, q) for each positive pair: what it has beside that.
  template <class F> void for_each_positive(int64_t i0, int64_t j0, F&& f) const {
    positives.for_each(i0, j0, [&](int i, int j) { f(i * NR + j, row.positive[i0 + i] + column.positive[j0 + j]); });
  }
};

template <class T>
static inline ClipInputs<T> clip_inputs(const void* x, const void* y, const void* teacher_x, const void* teacher_y,
                                        int64_t n, int64_t m, int64_t D, int64_t teacher_D) {
  ClipInputs<T> in = {};
  in.pairs = {static_cast<const T*>(x), static_cast<const T*>(y), n, m, D};
  in.teacher = {static_cast<const T*>(teacher_x), static_cast<const T*>(teacher_y), n, m, teacher_D};
  return in;
}

}  // namespace fvm::FVM_ISA
