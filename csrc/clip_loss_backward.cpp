// SPDX-License-Identifier: Apache-2.0
// clip_loss backward: G = dL/dS of every tile from the log-sum-exps of the forward; the products are pair_gradients'.
#include "clip_loss.h"
#include "pair_gradients.h"

namespace fvm::FVM_ISA {

namespace {

template <class T> struct ClipGradient {
  using P = Operand<T>;
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>, RV = (MR + L - 1) / L;
  const ClipTargets<T>& targets;

  // exp(S - lse) = exp(S - high) exp(high - lse), the second a number for each row and column
  void narrow(const A* similarities, A* g, int64_t i0, int64_t j0, A high) const {
    const A scale = targets.scale.size, sign = targets.scale.sign;
    A of_row[RV * L], of_column[NR];
    auto factors = [&](const Side<A>& side, int64_t first, int n, A* out) {
      for (int v = 0; v < n; v += L) {
        const V p = probability(splat(high), scale, load(side.lse.ref + first + v), load(side.lse.rest + first + v));
        store(out + v, load(side.weight + first + v) * p);
      }
    };
    factors(targets.row, i0, RV * L, of_row), factors(targets.column, j0, NR, of_column);
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += L) {
        const V e = vexp((load(similarities + i * NR + j) * sign - high) * scale);
        store(g + i * NR + j, e * (load(of_column + j) + of_row[i]));
      }
  }

  void wide(const A* similarities, A* g, int64_t i0, int64_t j0) const {
    const A scale = targets.scale.size, sign = targets.scale.sign;
    const Side<A>&row = targets.row, &column = targets.column;
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += L) {
        const V u = load(similarities + i * NR + j) * sign;
        const V by_row = probability(u, scale, splat(row.lse.ref[i0 + i]), splat(row.lse.rest[i0 + i]));
        const V by_column = probability(u, scale, load(column.lse.ref + j0 + j), load(column.lse.rest + j0 + j));
        store(g + i * NR + j, by_row * row.weight[i0 + i] + by_column * load(column.weight + j0 + j));
      }
  }

  void operator()(int64_t i0, int64_t j0, int64_t rows, int64_t columns, const A* similarities, A* g,
                  Sums& sums) const {
    A low, high;
    range(similarities, MR * NR, low, high);
    if ((high - low) * targets.scale.size < kSpan<A>)
      narrow(similarities, g, i0, j0, targets.scale.sign < 0 ? -low : high);
    else
      wide(similarities, g, i0, j0);
    targets.for_each_dense(i0, j0, [&](int e, V q) { store(g + e, load(g + e) - q); });
    targets.for_each_positive(i0, j0, [&](int e, double q) { g[e] -= A(q); });
    if (is_partial<P>(rows, columns)) fill_outside<P>(g, rows, columns, 0);
    V dscale = {};
    for (int e = 0; e < MR * NR; e += L) dscale += load(g + e) * load(similarities + e);
    sums.scale += sum_lanes<A>(dscale);
  }
};

template <class T>
void clip_backward(const ClipInputs<T>& in, double dloss, const Kept<Operand<T>>& kept, Acc<T>* dx, Acc<T>* dy,
                   Acc<T>* dscale, void* workspace, int64_t threads) {
  Workspace space(workspace);
  const GradientSpace<T> ws(space, in.pairs.n, in.pairs.m, in.pairs.D, dx != nullptr, dy != nullptr);
  const ClipTargets<T> targets(space, in);
  targets.fill(in, threads);
  const Acc<T> factor = Acc<T>(in.scale * dloss);
  *dscale = Acc<T>(dloss * pair_gradients(in.pairs, ws, dx, dy, factor, threads, ClipGradient<T>{targets}, kept).scale);
}

}  // namespace

int64_t clip_loss_bwd_workspace(int64_t n, int64_t m, int64_t D, int64_t teacher_D, bool want_x, bool want_y,
                                Dtype dtype, int64_t) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace ws(nullptr);
    GradientSpace<T>(ws, n, m, D, want_x, want_y);
    ClipTargets<T>(ws, clip_inputs<T>(nullptr, nullptr, nullptr, nullptr, n, m, D, teacher_D));
    return ws.bytes();
  });
}

void clip_loss_bwd(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids,
                   Maybe<const double> row_targets, Maybe<const double> col_targets, Maybe<const void> teacher_x,
                   Maybe<const void> teacher_y, const double* lse, Maybe<const void> kept, Maybe<void> dx,
                   Maybe<void> dy, void* dscale, void* workspace, double scale, double dloss, double teacher_scale,
                   double teacher_weight, double row_smoothing, double col_smoothing, int64_t n, int64_t m, int64_t D,
                   int64_t teacher_D, int64_t kept_size, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    using A = Acc<T>;
    ClipInputs<T> in = clip_inputs<T>(x, y, teacher_x.p, teacher_y.p, n, m, D, teacher_D);
    in.row_ids = row_ids.p, in.col_ids = col_ids.p, in.row_targets = row_targets.p, in.col_targets = col_targets.p;
    in.lse = lse, in.scale = scale, in.teacher_scale = teacher_scale, in.teacher_weight = teacher_weight;
    in.row_smoothing = row_smoothing, in.col_smoothing = col_smoothing;
    const Kept<Operand<T>> had(const_cast<void*>(kept.p), kept_size, n, m);
    clip_backward(in, dloss, had, static_cast<A*>(dx.p), static_cast<A*>(dy.p), static_cast<A*>(dscale), workspace,
                  team(threads, n * m * D));
  });
}

}  // namespace fvm::FVM_ISA
