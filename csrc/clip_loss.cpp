// SPDX-License-Identifier: Apache-2.0
// clip_loss forward: the log-sum-exp of every row and column of logits, and the sum of targets times logits.
#include "clip_loss.h"

namespace fvm::FVM_ISA {

namespace {

// ---- running sums of exp(scale * (similarity - ref)), ref the largest similarity so far

template <class A> constexpr A kLowest = sizeof(A) == 4 ? A(-3e38) : A(-1e308);  // a similarity that no sum notices

template <class A> static inline void raise_ref(Vec<A>& ref, Vec<A> other, A scale, Vec<A>& keep, Vec<A>& take) {
  const Vec<A> top = max<A>(ref, other);
  keep = vexp((ref - top) * scale), take = vexp((other - top) * scale);
  ref = top;
}

// Sums of MR rows over the columns so far: each spread over the lanes until its stripe ends.
template <class P> struct RowSums {
  using A = Acc<P>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, NV = Tile<P>::NV, L = kLanes<A>, RV = (MR + L - 1) / L;
  V ref[RV], sum[MR];

  RowSums() {
    for (V& v : ref) v = splat(kLowest<A>);
    for (V& v : sum) v = V{};
  }

  // Adds a tile to these rows, and to the columns of the refs and sums given. Below kSpan one exponential serves both.
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

  double log_sum(int i, A scale) const { return log_sum_exp(ref[i / L][i % L], sum_lanes<A>(sum[i]), scale); }
  static double log_sum_exp(A ref, A sum, A scale) { return double(scale) * double(ref) + std::log(double(sum)); }
};

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
    const int64_t panels = ceil_div(n, MR), block = kRows / MR;
    // few stripes, for each holds a line of column sums; but enough to share among threads
    const int64_t per_stripe = ceil_div(panels, panels < 64 * block ? min(panels, 16) : 64);
    stripe_rows = (per_stripe < block ? per_stripe : round_up(per_stripe, block)) * MR;
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
  void stripe(const Pairs<T>& p, const ClipTargets<T>& targets, int64_t s, double* row_lse) const {
    const int64_t Kp = padded_k<P>(p.D), last = min((s + 1) * stripe_rows, p.n);
    const A scale = targets.scale.size;
    A *ref = col_ref + s * columns, *sum = col_sum + s * columns;
    for (int64_t j = 0; j < columns; j++) ref[j] = kLowest<A>, sum[j] = 0;
    double target = 0;
    for (int64_t first = s * stripe_rows; first < last; first += kRows) {
      RowSums<P> rows[kRows / MR];
      gemm<P>(min(kRows, last - first), p.m, p.D, x + first * Kp, y,
              [&](int64_t i, int64_t j, int64_t r, int64_t c, A* u) {
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
    for (int64_t l = 0; l < min(L, m - j); l++) col_lse[j + l] = RowSums<P>::log_sum_exp(ref[l], sum[l], scale);
  }
};

template <class T>
void clip_forward(const ClipInputs<T>& in, double* row_lse, double* col_lse, double* target_sum, void* workspace,
                  int64_t threads) {
  using F = ClipForward<T>;
  const Pairs<T>& p = in.pairs;
  Workspace ws(workspace);
  const F f(ws, p.n, p.m, p.D);
  const ClipTargets<T> targets(ws, in);
  targets.fill(in, threads);
  pack_rows_parallel<F::MR>(f.x, p.x, p.n, p.D, threads);
  pack_rows_parallel<F::NR>(f.y, p.y, p.m, p.D, threads);
  parallel_for(f.stripes, threads, [&](int64_t s, int64_t) { f.stripe(p, targets, s, row_lse); });
  constexpr int64_t kColumns = 16 * F::L;
  parallel_for(ceil_div(p.m, kColumns), threads, [&](int64_t task, int64_t) {
    for (int64_t j = task * kColumns; j < min((task + 1) * kColumns, p.m); j += F::L)
      f.merge_stripes(j, p.m, targets.scale.size, col_lse);
  });
  double sum = 0;
  for (int64_t s = 0; s < f.stripes; s++) sum += f.target_sums[s];
  *target_sum = sum * double(targets.scale.size);
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

void clip_loss_fwd(const void* x, const void* y, const int32_t* row_ids, const int32_t* col_ids,
                   const double* row_targets, const double* col_targets, Maybe<const void> teacher_x,
                   Maybe<const void> teacher_y, double* row_lse, double* col_lse, double* target_sum, void* workspace,
                   double scale, double teacher_scale, double teacher_weight, double row_smoothing,
                   double col_smoothing, int64_t n, int64_t m, int64_t D, int64_t teacher_D, Dtype dtype,
                   int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    ClipInputs<T> in = clip_inputs<T>(x, y, teacher_x.p, teacher_y.p, n, m, D, teacher_D);
    in.row_ids = row_ids, in.col_ids = col_ids, in.row_targets = row_targets, in.col_targets = col_targets;
    in.scale = scale, in.teacher_scale = teacher_scale, in.teacher_weight = teacher_weight;
    in.row_smoothing = row_smoothing, in.col_smoothing = col_smoothing;
    clip_forward(in, row_lse, col_lse, target_sum, workspace, threads);
  });
}

}  // namespace fvm::FVM_ISA
