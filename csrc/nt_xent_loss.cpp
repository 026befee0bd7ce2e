// SPDX-License-Identifier: Apache-2.0
// nt_xent_loss forward: the log-sum-exp of every row without itself, and the sum of the logits of the positive pairs.
#include "nt_xent_loss.h"

namespace fvm::FVM_ISA {

namespace {

template <class T> struct NtXentForward {
  using P = Operand<T>;
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>, kRows = Blocks<P>::kRows;
  Triangle<P> triangle;
  int64_t D, stripe_rows, stripes, columns;  // columns: padded to whole panels
  P *rows, *cols;                            // the same features, in panels of MR and of NR
  A *col_ref, *col_sum;                      // [stripes, columns]
  double* positive_sums;                     // [stripes]

  NtXentForward(Workspace& ws, int64_t R, int64_t D) : triangle{R}, D(D) {
    // A stripe holds a line of column sums: not too many, but enough that no thread waits for the long ones on top.
    const int64_t panels = ceil_div(R, MR), block = kRows / MR;
    const int64_t few = panels < block ? panels : min(ceil_div(panels, 16), block);
    stripe_rows = (panels > 64 * block ? round_up(ceil_div(panels, 64), block) : few) * MR;
    stripes = ceil_div(R, stripe_rows), columns = round_up(R, NR);
    rows = ws.take<P>(packed_size<P>(R, D, MR)), cols = ws.take<P>(packed_size<P>(R, D, NR));
    col_ref = ws.take<A>(stripes * columns), col_sum = ws.take<A>(stripes * columns);
    positive_sums = ws.take<double>(stripes);
  }

  // The tiles with pairs of the rows `first` to `last`, a panel of columns after the other.
  template <class F> void for_each_tile(int64_t first, int64_t last, F&& f) const {
    const int64_t Kp = padded_k<P>(D);
    alignas(64) A u[MR * NR];
    for (int64_t j = first / NR * NR; j < triangle.R; j += NR)
      for (int64_t i = first; i < last && triangle.has_pairs(i, j); i += MR) {
        tile<P>(D, rows + i * Kp, cols + j * Kp, u, NR);
        f(i, j, u);
      }
  }

  // The log-sum-exps of a stripe's rows over the columns right of the diagonal, and its sums for those columns.
  void stripe(int64_t s, Scale<A> scale, double* lse) const {
    A *ref = col_ref + s * columns, *sum = col_sum + s * columns;
    const int64_t last = min((s + 1) * stripe_rows, triangle.R);
    for (int64_t j = s * stripe_rows / NR * NR; j < columns; j++) ref[j] = kLowest<A>, sum[j] = 0;
    double positive = 0;
    for (int64_t first = s * stripe_rows; first < last; first += kRows) {
      RowSums<P> sums[kRows / MR];
      const int64_t end = min(first + kRows, last);
      for_each_tile(first, end, [&](int64_t i, int64_t j, A* u) {
        if (scale.sign < 0)
          for (int e = 0; e < MR * NR; e++) u[e] = -u[e];
        triangle.for_each_positive(i, j, [&](int64_t e) { positive += double(u[e]); });
        triangle.fill_others(u, i, j, kLowest<A>);
        sums[(i - first) / MR].add(u, scale.size, ref + j, sum + j);
      });
      for (int64_t i = first; i < end; i++) lse[i] = sums[(i - first) / MR].log_sum(int((i - first) % MR), scale.size);
    }
    positive_sums[s] = positive;
  }

  // S is symmetric: what columns j to j + L have above the diagonal, these rows have left of it.
  void add_columns(int64_t j, Scale<A> scale, double* lse) const {
    V ref = splat(kLowest<A>), sum = {}, keep, take;
    for (int64_t s = 0; s < stripes && s * stripe_rows / NR * NR <= j; s++) {
      raise_ref(ref, load(col_ref + s * columns + j), scale.size, keep, take);
      sum = sum * keep + load(col_sum + s * columns + j) * take;
    }
    for (int64_t l = 0; l < min(L, triangle.R - j); l++)
      lse[j + l] = log_add_exp(lse[j + l], log_sum_exp(ref[l], sum[l], scale.size));
  }
};

// Fills the log-sum-exps; returns the sum of the positive logits.
template <class T>
double forward(const T* z, int64_t R, int64_t D, double scale_of_logits, double* lse, void* workspace,
               int64_t threads) {
  using F = NtXentForward<T>;
  Workspace ws(workspace);
  const F f(ws, R, D);
  const Scale<Acc<T>> scale(scale_of_logits);
  pack_rows_parallel<F::MR>(f.rows, z, R, D, threads);
  pack_rows_parallel<F::NR>(f.cols, z, R, D, threads);
  parallel_for(f.stripes, threads, [&](int64_t s, int64_t) { f.stripe(s, scale, lse); });
  constexpr int64_t kColumns = 16 * F::L;
  parallel_for(ceil_div(R, kColumns), threads, [&](int64_t task, int64_t) {
    for (int64_t j = task * kColumns; j < min((task + 1) * kColumns, R); j += F::L) f.add_columns(j, scale, lse);
  });
  double sum = 0;
  for (int64_t s = 0; s < f.stripes; s++) sum += f.positive_sums[s];
  return sum * double(scale.size);
}

}  // namespace

int64_t nt_xent_loss_fwd_workspace(int64_t R, int64_t D, Dtype dtype, int64_t) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace ws(nullptr);
    NtXentForward<T>(ws, R, D);
    return ws.bytes();
  });
}

void nt_xent_loss_fwd(const void* z, double* lse, double* positive_sum, void* loss, void* workspace, Scalar scale,
                      int64_t R, int64_t D, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    *positive_sum = forward(static_cast<const T*>(z), R, D, scale, lse, workspace, team(threads, R * R / 2 * D));
    double sum = -2 * *positive_sum;
    for (int64_t i = 0; i < R; i++) sum += lse[i];
    *static_cast<Acc<T>*>(loss) = Acc<T>(sum / double(R));
  });
}

}  // namespace fvm::FVM_ISA
