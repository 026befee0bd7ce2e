// SPDX-License-Identifier: Apache-2.0
// nt_xent_loss backward: G above the diagonal, a chunk of rows at a time, then dZ += G^T Z and dZ += G Z of the chunk.
#include "pair_gradients.cuh"

namespace fvm::cuda {

namespace {

// Of a pair, without the weight of its rows: exp(S_ij - lse_i) + exp(S_ij - lse_j) - 2 [j is the other view of i]
template <class T> struct NtXentGradient {
  using A = Acc<T>;
  static constexpr int N = kChunk<A>, kSums = 1;
  LsePairs<A> lse;
  const double* scale;

  NtXentGradient(Workspace& arena, int64_t R, const double* scale) : lse(arena, R), scale(scale) {}

  struct Columns {
    Pack<A, N> ref, rest;
    Scale<A> scale;
  };
  __device__ __forceinline__ bool skips(int64_t row, int64_t column) const { return column < row; }
  __device__ __forceinline__ A bigger() const { return kBigger<T>; }
  __device__ __forceinline__ Columns columns(int64_t j) const {
    return {load<N>(lse.ref + j), load<N>(lse.rest + j), Scale<A>(scale)};
  }
  __device__ __forceinline__ void gradient(const Columns& of, int64_t i, int64_t j, const A (&similarity)[N], A (&g)[N],
                                           A* sums) const {
    const A ref = lse.ref[i], rest = lse.rest[i];
    const int64_t other = i < lse.n / 2 ? i + lse.n / 2 : -1;
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A u = similarity[k] * of.scale.sign;
      g[k] = probability(u, of.scale.size, ref, rest) + probability(u, of.scale.size, of.ref.at[k], of.rest.at[k]);
      if (j + k == other) g[k] -= 2;
      if (i >= j + k) g[k] = 0;  // the diagonal's similarities are no part of a log-sum-exp, and far above all others
      sums[0] += g[k] * similarity[k];
    }
  }
};

}  // namespace

int64_t nt_xent_loss_bwd_workspace(int64_t R, int64_t D, Dtype dtype) {
  Workspace arena(nullptr);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    GradientSpace<T>(arena, R, R, D, true, true);
    NtXentGradient<T>(arena, R, nullptr);
    return cudaSuccess;
  });
  return arena.bytes();
}

cudaError_t nt_xent_loss_bwd(const void* z, const double* lse, Maybe<void> dz, void* dscale, void* workspace,
                             const double* scale, double weight, const double* dloss, int64_t R, int64_t D, Dtype dtype,
                             Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    Workspace arena(workspace);
    const GradientSpace<T> space(arena, R, R, D, true, true);
    const NtXentGradient<T> gradient(arena, R, scale);
    const Features<T> features(static_cast<const T*>(z), R, D);
    A* to = static_cast<A*>(dz.p);
    const Wanted<T> want{to, to, {weight / kBigger<T>, scale, dloss}, nullptr, true};
    FVM_TRY(split(lse, gradient.lse, gradient.scale, launch.stream));
    FVM_TRY(pair_gradients({features, features}, space, gradient, want, launch.stream,
                           [](const Chunk&, NtXentGradient<T>&) { return cudaSuccess; }));
    return FVM_LAUNCH(add_totals<A>, 1, kTileThreads, 0, launch.stream, space.sums, space.tiles,
                      Totals<A>{{static_cast<A*>(dscale)}, {{weight, dloss}}});
  });
}

}  // namespace fvm::cuda
