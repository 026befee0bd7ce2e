// SPDX-License-Identifier: Apache-2.0
// siglip_loss: a sigmoid for each pair (Zhai et al. 2023, https://arxiv.org/abs/2303.15343). The gradient of a pair
// needs that pair only, so that one pass makes the loss and the gradients.
#include "pair_gradients.cuh"

namespace fvm::cuda {

namespace {

// Of a pair with logit S and sign z (+1 positive, -1 negative): loss log(1 + exp(-z S)), gradient -z sigmoid(-z S).
template <class T> struct SigmoidPairs {
  using A = Acc<T>;
  static constexpr int N = kChunk<A>, kSums = 3;
  Ids ids;
  int64_t m;
  const double *scale, *bias;

  struct Columns {
    int32_t id[N];
    A scale, bias;
  };
  __device__ __forceinline__ bool skips(int64_t, int64_t) const { return false; }
  __device__ __forceinline__ A bigger() const { return kBigger<T>; }
  __device__ __forceinline__ Columns columns(int64_t j) const {
    Columns of{{}, A(*scale), A(*bias)};
#pragma unroll
    for (int k = 0; k < N; k++) of.id[k] = j + k < m ? ids.column(j + k) : -1;
    return of;
  }
  __device__ __forceinline__ void gradient(const Columns& of, int64_t i, int64_t j, const A (&u)[N], A (&g)[N],
                                           A* sums) const {
    const int32_t id = ids.row(i);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A z = id == of.id[k] ? A(-1) : A(1);
      const A v = j + k < m ? z * (of.scale * u[k] + of.bias) : -A(INFINITY);  // no pair: no loss, no gradient
      const A small = exponential(v < 0 ? v : -v), inverse = 1 / (1 + small);
      g[k] = z * (v < 0 ? small * inverse : inverse);
      sums[0] += (v > 0 ? v : 0) + logarithm1p(small);
      sums[1] += g[k] * u[k];
      sums[2] += g[k];
    }
  }
};

}  // namespace

int64_t siglip_loss_workspace(int64_t n, int64_t m, int64_t D, bool want_x, bool want_y, Dtype dtype) {
  Workspace arena(nullptr);
  with_dtype(dtype, [&](auto zero) {
    GradientSpace<decltype(zero)>(arena, n, m, D, want_x, want_y);
    return cudaSuccess;
  });
  return arena.bytes();
}

cudaError_t siglip_loss(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids,
                        const double* scale, const double* bias, double weight, void* loss, void* slopes,
                        Maybe<void> dx, Maybe<void> dy, void* workspace, int64_t n, int64_t m, int64_t D, Dtype dtype,
                        Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    Workspace arena(workspace);
    const GradientSpace<T> space(arena, n, m, D, bool(dx), bool(dy));
    const Pairs<T> pairs{{static_cast<const T*>(x), n, D}, {static_cast<const T*>(y), m, D}};
    const SigmoidPairs<T> sigmoid{{row_ids.p, col_ids.p}, m, scale, bias};
    const Wanted<T> want{static_cast<A*>(dx.p), static_cast<A*>(dy.p), {weight / kBigger<T>, scale}, nullptr};
    FVM_TRY(pair_gradients(pairs, space, sigmoid, want, launch.stream,
                           [](const Chunk&, SigmoidPairs<T>&) { return cudaSuccess; }));
    A *of_loss = static_cast<A*>(loss), *of_slopes = static_cast<A*>(slopes);
    return FVM_LAUNCH(add_totals<A>, 1, kTileThreads, 0, launch.stream, space.sums, space.tiles,
                      Totals<A>{{of_loss, of_slopes, of_slopes + 1}, {{weight}, {weight}, {weight}}});
  });
}

}  // namespace fvm::cuda
