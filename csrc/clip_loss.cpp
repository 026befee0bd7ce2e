// SPDX-License-Identifier: Apache-2.0
// clip_loss forward: the log-sum-exp of every row and column of logits, the sum of targets times logits, and the loss.
#include "clip_loss.h"

namespace fvm::FVM_ISA {

namespace {

template <class T> struct ClipForward {
  using P = Operand<T>;
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>, kRows = Blocks<P>::kRows;
  int64_t stripe_rows, stripes, columns;  // columns: padded to whole panels
  P *x, *y;
  A *col_ref, *col_sum;  // [stripes, columns]
  double* target_sums;   // [stripes]

  ClipForward(Workspace& ws, int64_t n, int64_t m, int64_t D) {
    // few stripes, for each holds a line of column sums; but enough to share among threads
    const int64_t few = even_part(n, min(ceil_div(n, 16), kRows), MR);
    stripe_rows = n <= 128 * kRows ? few : round_up(ceil_div(n, 128), kRows);
    stripes = ceil_div(n, stripe_rows), columns = round_up(m, NR);
    x = ws.take<P>(packed_size<P>(n, D, MR)), y = ws.take<P>(packed_size<P>(m, D, NR));
    col_ref = ws.take<A>(stripes * columns), col_sum = ws.take<A>(stripes * columns);
    target_sums = ws.take<double>(stripes);
  }

  // The share of a tile of similarities in the sum of targets times similarities. Leaves the tile with the sign of the
  // logits, and with values that no sum notices outside of r x c.
  double prepare(const ClipTargets<T>& targets, int64_t i, int64_t j, int64_t r, int64_t c, A* u) const {
    if (targets.scale.sign < 0)
      for (int e = 0; e < MR * NR; e++) u[e] = -u[e];
    double target = 0;
    V dense = {};
    targets.for_each_dense(i, j, [&](int e, V q) { dense += q * load(u + e); });
    targets.for_each_positive(i, j, [&](int e, double q) { target += q * double(u[e]); });
    if (is_partial<P>(r, c)) fill_outside<P>(u, r, c, kLowest<A>);
    return target + sum_lanes<A>(dense);
  }

  // The log-sum-exps of a stripe's rows, and its sums for every column.
  void stripe(const Pairs<T>& p, const ClipTargets<T>& targets, int64_t s, double* row_lse, const Kept<P>& kept) const {
    const int64_t Kp = padded_k<P>(p.D), last = min((s + 1) * stripe_rows, p.n);
    const A scale = targets.scale.size;
    A *ref = col_ref + s * columns, *sum = col_sum + s * columns;
    for (int64_t j = 0; j < columns; j++) ref[j] = kLowest<A>, sum[j] = 0;
    double target = 0;
    for (int64_t first = s * stripe_rows; first < last; first += kRows) {
      RowSums<P> rows[kRows / MR];
      gemm<P>(min(kRows, last - first), p.m, p.D, x + first * Kp, y,
              [&](int64_t i, int64_t j, int64_t r, int64_t c, A* u) {
                kept.keep(first + i, j, u);
                target += prepare(targets, first + i, j, r, c, u);
                rows[i / MR].add(u, scale, ref + j, sum + j);
              });
      for (int64_t i = first; i < min(first + kRows, last); i++)
        row_lse[i] = rows[(i - first) / MR].log_sum(int((i - first) % MR), scale);
    }
    target_sums[s] = target;
  }

  void merge_stripes(int64_t j, int64_t m, A scale, double* col_lse) const {
    V ref = load(col_ref + j), sum = load(col_sum + j), keep, take;
    for (int64_t s = 1; s < stripes; s++) {
      raise_ref(ref, load(col_ref + s * columns + j), scale, keep, take);
      sum = sum * keep + load(col_sum + s * columns + j) * take;
    }
    for (int64_t l = 0; l < min(L, m - j); l++) col_lse[j + l] = log_sum_exp(ref[l], sum[l], scale);
  }
};

// The sum of each term's weight times its log-sum-exp.
inline double weighted_sum(const double* targets, const double* lse, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += lse[i] * (targets ? targets[i] : 0.5 / double(n));
  return sum;
}

// Fills lse [n + m] and `kept`; returns the sum of targets times logits.
template <class T>
double clip_forward(const ClipInputs<T>& in, double* lse, const Kept<Operand<T>>& kept, void* workspace,
                    int64_t threads) {
  using F = ClipForward<T>;
  const Pairs<T>& p = in.pairs;
  Workspace ws(workspace);
  const F f(ws, p.n, p.m, p.D);
  const ClipTargets<T> targets(ws, in);
  targets.fill(in, threads);
  pack_rows_parallel<F::MR>(f.x, p.x, p.n, p.D, threads);
  pack_rows_parallel<F::NR>(f.y, p.y, p.m, p.D, threads);
  parallel_for(f.stripes, threads, [&](int64_t s, int64_t) { f.stripe(p, targets, s, lse, kept); });
  kept.clear_rest();
  constexpr int64_t kColumns = 16 * F::L;
  parallel_for(ceil_div(p.m, kColumns), threads, [&](int64_t task, int64_t) {
    for (int64_t j = task * kColumns; j < min((task + 1) * kColumns, p.m); j += F::L)
      f.merge_stripes(j, p.m, targets.scale.size, lse + p.n);
  });
  double sum = 0;
  for (int64_t s = 0; s < f.stripes; s++) sum += f.target_sums[s];
  return sum * double(targets.scale.size);
}

}  // namespace

int64_t clip_loss_fwd_workspace(int64_t n, int64_t m, int64_t D, int64_t teacher_D, Dtype dtype, int64_t) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace ws(nullptr);
    ClipForward<T>(ws, n, m, D);
    ClipTargets<T>(ws, clip_inputs<T>(nullptr, nullptr, nullptr, nullptr, n, m, D, teacher_D));
    return ws.bytes();
  });
}

void clip_loss_fwd(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids,
                   Maybe<const double> row_targets, Maybe<const double> col_targets, Maybe<const void> teacher_x,
                   Maybe<const void> teacher_y, double* lse, Maybe<double> target_sum, Maybe<void> loss,
                   Maybe<void> kept, void* workspace, Scalar scale, Scalar teacher_scale, double teacher_weight,
                   double row_smoothing, double col_smoothing, int64_t n, int64_t m, int64_t D, int64_t teacher_D,
                   int64_t kept_size, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    ClipInputs<T> in = clip_inputs<T>(x, y, teacher_x.p, teacher_y.p, n, m, D, teacher_D);
    in.row_ids = row_ids.p, in.col_ids = col_ids.p, in.row_targets = row_targets.p, in.col_targets = col_targets.p;
    in.scale = scale, in.teacher_scale = teacher_scale, in.teacher_weight = teacher_weight;
    in.row_smoothing = row_smoothing, in.col_smoothing = col_smoothing;
    const Kept<Operand<T>> keep(kept.p, kept_size, n, m);
    const double sum = clip_forward(in, lse, keep, workspace, team(threads, n * m * D));
    if (target_sum) *target_sum.p = sum;
    if (loss)
      *static_cast<Acc<T>*>(loss.p) =
          Acc<T>(weighted_sum(row_targets.p, lse, n) + weighted_sum(col_targets.p, lse + n, m) - sum);
  });
}

}  // namespace fvm::FVM_ISA
