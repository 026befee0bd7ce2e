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
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>;
  const ClipTargets<T>& targets;
  WeightedProbabilities<P> probabilities;

  explicit ClipGradient(const ClipTargets<T>& targets)
      : targets(targets),
        probabilities{
            {targets.row.weight, targets.row.lse}, {targets.column.weight, targets.column.lse}, targets.scale} {}

  void operator()(int64_t i0, int64_t j0, int64_t rows, int64_t columns, const A* similarities, A* g,
                  Sums& sums) const {
    probabilities(similarities, g, i0, j0);
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
  *dscale = Acc<T>(dloss * pair_gradients(in.pairs, ws, dx, dy, factor, threads, ClipGradient<T>(targets), kept).scale);
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
                   Maybe<void> dy, void* dscale, void* workspace, Scalar scale, Scalar dloss, Scalar teacher_scale,
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
