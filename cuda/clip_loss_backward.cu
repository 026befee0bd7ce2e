// SPDX-License-Identifier: Apache-2.0
// clip_loss backward: G = dL/dS of every tile from the log-sum-exps of the forward; the products are pair_gradients'.
#include "clip_loss.cuh"
#include "pair_gradients.cuh"

namespace fvm::cuda {

namespace {

template <class A> struct ClipGradient : ClipTargets<A> {
  static constexpr int kSums = 1, N = ClipTargets<A>::N;
  A* bounds;  // [2]: what G is multiplied by where it is stored, and the inverse

  using ClipTargets<A>::ClipTargets;

  struct Columns {
    typename ClipTargets<A>::Columns base;
    Pack<A, N> ref, rest;
    Scale<A> scale;
  };
  __device__ __forceinline__ A bigger() const { return bounds[0]; }
  __device__ __forceinline__ Columns columns(int64_t j) const {
    return {ClipTargets<A>::columns(j), load<N>(this->column.ref + j), load<N>(this->column.rest + j),
            Scale<A>(this->scale)};
  }
  __device__ __forceinline__ void gradient(const Columns& of, int64_t i, int64_t j, const A (&similarity)[N], A (&g)[N],
                                           A* sums) const {
    const A scale = of.scale.size, weight = this->row.weight[i], ref = this->row.ref[i], rest = this->row.rest[i];
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A u = similarity[k] * of.scale.sign;
      g[k] = weight * probability(u, scale, ref, rest) +
             of.base.weight.at[k] * probability(u, scale, of.ref.at[k], of.rest.at[k]);
    }
    if (this->has_dense()) {
      const Pack<A, N> q = this->targets(of.base, i, j);
#pragma unroll
      for (int k = 0; k < N; k++) g[k] -= q.at[k];
    }
    const int32_t id = this->row.id(i);
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (id == of.base.id[k]) g[k] -= A(this->positive(i, j + k));
      sums[0] += g[k] * similarity[k];
    }
  }
};

// |G| <= twice the largest weight: the power of two that brings it to kBigger, and the inverse.
template <class A>
__global__ void __launch_bounds__(kTileThreads)
    bound_gradient(Side<A> row, Side<A> column, A bigger, A* __restrict__ bounds) {
  __shared__ A of_warp[kTileThreads / kWarp];
  A most = 0;
  for (int64_t i = threadIdx.x; i < row.n; i += kTileThreads) most = row.weight[i] > most ? row.weight[i] : most;
  for (int64_t j = threadIdx.x; j < column.n; j += kTileThreads)
    most = column.weight[j] > most ? column.weight[j] : most;
  most = warp_max(most);
  if (lane() == 0) of_warp[warp()] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (A other : of_warp) most = other > most ? other : most;
  A power = 1;
  while (power * most < A(0.5) && power < A(1 << 30)) power *= 2;
  bounds[0] = power * bigger, bounds[1] = 1 / bounds[0];
}

template <class T> struct ClipBackward {
  using A = Acc<T>;
  GradientSpace<T> space;
  ClipGradient<A> gradient;

  ClipBackward(Workspace& arena, int64_t n, int64_t m, int64_t D, int64_t teacher_D, bool want_x, bool want_y,
               const double* scale, const double* teacher_scale)
      : space(arena, n, m, D, want_x, want_y, ClipTargets<A>::dense_bytes_of_tile(m, teacher_D)),
        gradient(arena, n, m, scale, teacher_scale) {
    gradient.dense = teacher_D ? arena.take<A>(space.chunk * gradient.pitch) : nullptr;
    gradient.bounds = arena.take<A>(2);
  }
};

template <class T>
cudaError_t clip_backward(const ClipInputs<T>& in, ClipBackward<T>& b, const double* lse, const double* dloss,
                          Acc<T>* dx, Acc<T>* dy, Acc<T>* dscale, cudaStream_t stream) {
  using A = Acc<T>;
  ClipGradient<A>& gradient = b.gradient;
  const Side<A>&row = gradient.row, &column = gradient.column;
  set_options(gradient, in);
  FVM_TRY(fill(row, lse, gradient.scale, gradient.teacher_scale, stream));
  FVM_TRY(fill(column, lse + in.x.rows, gradient.scale, gradient.teacher_scale, stream));
  FVM_TRY(FVM_LAUNCH(bound_gradient<A>, 1, kTileThreads, 0, stream, row, column, kBigger<T>, gradient.bounds));
  const Wanted<T> want{dx, dy, {1, in.scale, dloss}, gradient.bounds + 1};
  FVM_TRY(pair_gradients(in.pairs(), b.space, gradient, want, stream, [&](const Chunk& chunk, ClipGradient<A>& loss) {
    return ask_teacher(loss, in, chunk, stream);
  }));
  return FVM_LAUNCH(add_totals<A>, 1, kTileThreads, 0, stream, b.space.sums, b.space.tiles,
                    Totals<A>{{dscale}, {{1, dloss}}});
}

}  // namespace

int64_t clip_loss_bwd_workspace(int64_t n, int64_t m, int64_t D, int64_t teacher_D, bool want_x, bool want_y,
                                Dtype dtype) {
  Workspace arena(nullptr);
  with_dtype(dtype, [&](auto zero) {
    ClipBackward<decltype(zero)>(arena, n, m, D, teacher_D, want_x, want_y, nullptr, nullptr);
    return cudaSuccess;
  });
  return arena.bytes();
}

cudaError_t clip_loss_bwd(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids,
                          Maybe<const double> row_targets, Maybe<const double> col_targets, Maybe<const void> teacher_x,
                          Maybe<const void> teacher_y, const double* lse, Maybe<const void> kept, Maybe<void> dx,
                          Maybe<void> dy, void* dscale, void* workspace, const double* scale, const double* dloss,
                          const double* teacher_scale, double teacher_weight, double row_smoothing,
                          double col_smoothing, int64_t n, int64_t m, int64_t D, int64_t teacher_D, int64_t kept_size,
                          Dtype dtype, Launch launch) {
  if (kept || kept_size) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto in = clip_inputs<T>(x, y, row_ids, col_ids, row_targets, col_targets, teacher_x, teacher_y, scale,
                                   teacher_scale, teacher_weight, row_smoothing, col_smoothing, n, m, D, teacher_D);
    Workspace arena(workspace);
    ClipBackward<T> backward(arena, n, m, D, teacher_D, bool(dx), bool(dy), scale, teacher_scale);
    return clip_backward(in, backward, lse, dloss, static_cast<A*>(dx.p), static_cast<A*>(dy.p),
                         static_cast<A*>(dscale), launch.stream);
  });
}

}  // namespace fvm::cuda
