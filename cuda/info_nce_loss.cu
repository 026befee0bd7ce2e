// SPDX-License-Identifier: Apache-2.0
// info_nce_loss: each query against its own positive key and a long queue of negative ones. See csrc/info_nce_loss.cpp.
//
//   L_i = lse_i - S_i+,  lse_i over the keys and the positive one,  miss_i = 1 - p_i+
//   pull_i = miss_i (sum_j q_ij k_j - k_i+),  q_ij = exp(S_ij - log-sum-exp of the keys): the gradient over the scale
//
// One pass over the queue makes the log-sum-exps, a second one the q, which are near 1 in sum and so lose nothing to
// half types: 6 n K D operations. What a query misses is summed, never a difference.
#include "log_sum_exp.cuh"
#include "pair_gradients.cuh"

namespace fvm::cuda {

namespace {

// ---- log-sum-exps over the keys

template <class A> struct Queue {
  static constexpr int N = kChunk<A>;
  const double* scale;
  int64_t n, K;

  struct Columns {};
  __device__ __forceinline__ bool skips(int64_t, int64_t) const { return false; }
  __device__ __forceinline__ bool counts(int64_t i, int64_t j) const { return i < n && j < K; }
  __device__ __forceinline__ Columns columns(int64_t) const { return {}; }
  __device__ __forceinline__ void add_targets(const Columns&, int64_t, int64_t, const A (&)[N], double&, A&) const {}
};

// ---- probabilities exp(S_ij - lse_i), from which positive keys have their shares off

template <class T> struct Probabilities {
  using A = Acc<T>;
  static constexpr int N = kChunk<A>, kSums = 0;
  LsePairs<A> lse;
  const double* scale;
  int64_t K;
  Ids ids = {};
  const double* share = nullptr;  // [n]; null: no key is a positive one

  Probabilities(Workspace& arena, int64_t n, int64_t K, const double* scale) : lse(arena, n), scale(scale), K(K) {}

  struct Columns {
    int32_t id[N];
    Scale<A> scale;
  };
  __device__ __forceinline__ bool skips(int64_t, int64_t) const { return false; }
  __device__ __forceinline__ A bigger() const { return kBigger<T>; }
  __device__ __forceinline__ Columns columns(int64_t j) const {
    Columns of{{}, Scale<A>(scale)};
#pragma unroll
    for (int k = 0; k < N; k++) of.id[k] = share && j + k < K ? ids.column(j + k) : -1;
    return of;
  }
  __device__ __forceinline__ void gradient(const Columns& of, int64_t i, int64_t, const A (&similarity)[N], A (&g)[N],
                                           A*) const {
    const A ref = lse.ref[i], rest = lse.rest[i], part = share ? A(share[i]) : 0;
    const int32_t id = share ? ids.row(i) : -2;
#pragma unroll
    for (int k = 0; k < N; k++) {
      g[k] = probability(similarity[k] * of.scale.sign, of.scale.size, ref, rest);
      if (id == of.id[k]) g[k] -= part;
    }
  }
};

// ---- a query's own key: a warp a query

template <class T> struct Finish {
  using A = Acc<T>;
  const T *query, *positive;  // positive: may be null
  const double* lse;          // [n]: over the keys
  double* stats;              // [3, n]
  A* pull;                    // [n, D]: the mean of the keys, or null
  const double* scale;
  int64_t n, D;
};

template <class T> __global__ void __launch_bounds__(kTileThreads) finish_queries(Finish<T> f) {
  using A = Acc<T>;
  const int64_t i = warp_of_grid();
  if (i >= f.n) return;
  double miss = 1, lse = f.lse[i], loss = lse;
  if (f.positive) {
    double similarity = 0;
    for (int64_t d = lane(); d < f.D; d += kWarp)
      similarity += double(widen(f.query[i * f.D + d])) * double(widen(f.positive[i * f.D + d]));
    const double own = *f.scale * warp_sum(similarity), ahead = own - lse;
    const double odds = ::exp(-ahead);  // of all others against the positive key
    miss = 1 / (1 + 1 / odds);
    loss = ahead > -600 ? ::log1p(odds) : -ahead;
    lse = loss + own;
  }
  if (lane() == 0) f.stats[i] = loss, f.stats[f.n + i] = miss, f.stats[2 * f.n + i] = lse;
  if (!f.pull || !f.positive) return;
  for (int64_t d = lane(); d < f.D; d += kWarp) {
    A* pull = f.pull + i * f.D + d;
    *pull = A(miss) * (*pull - A(widen(f.positive[i * f.D + d])));
  }
}

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    mean_loss(const double* __restrict__ losses, int64_t n, A* __restrict__ loss) {
  const double sum = sum_over(n, [&](int64_t i) { return losses[i]; });
  if (threadIdx.x == 0) *loss = A(sum / double(n));
}

template <class T> struct InfoNceForward {
  using A = Acc<T>;
  int64_t chunk;
  LogSums<A> sums;
  double* lse;  // [n]
  Probabilities<T> probabilities;
  GradientSpace<T> space;

  InfoNceForward(Workspace& arena, int64_t n, int64_t K, int64_t D, bool want_pull, const double* scale)
      : chunk(rows_of_chunk(n, LogSums<A>::bytes_of_tile(K))),
        sums(arena, chunk, K, false),
        lse(arena.take<double>(n)),
        probabilities(arena, n, K, scale),
        space(arena, n, K, D, want_pull, false) {}
};

template <class T>
cudaError_t info_nce_forward(const Pairs<T>& pairs, const InfoNceForward<T>& f, const Finish<T>& finish, Acc<T>* loss,
                             cudaStream_t stream) {
  using A = Acc<T>;
  const Probabilities<T>& p = f.probabilities;
  const int64_t n = finish.n;
  for (int64_t first = 0; first < n; first += f.chunk) {
    const Chunk chunk(first, f.chunk, n, p.K);
    FVM_TRY(FVM_LAUNCH((log_sums<T, Queue<A>>), chunk.blocks(), kTileThreads, kTileShared, stream, pairs, chunk,
                       Queue<A>{p.scale, n, p.K}, f.sums, nullptr));
    FVM_TRY(merge_rows(f.sums, chunk, f.lse, Parts::all, false, p.scale, stream));
  }
  if (finish.pull) {
    FVM_TRY(split(f.lse, p.lse, p.scale, stream));
    const Wanted<T> want{finish.pull, nullptr, {1.0 / kBigger<T>}, nullptr};
    FVM_TRY(
        pair_gradients(pairs, f.space, p, want, stream, [](const Chunk&, Probabilities<T>&) { return cudaSuccess; }));
  }
  FVM_TRY(FVM_LAUNCH(finish_queries<T>, ceil_div<int64_t>(n, kTileThreads / kWarp), kTileThreads, 0, stream, finish));
  return FVM_LAUNCH(mean_loss<A>, 1, kTileThreads, 0, stream, finish.stats, n, loss);
}

}  // namespace

int64_t info_nce_loss_fwd_workspace(int64_t n, int64_t K, int64_t D, bool want_pull, Dtype dtype) {
  Workspace arena(nullptr);
  with_dtype(dtype, [&](auto zero) {
    InfoNceForward<decltype(zero)>(arena, n, K, D, want_pull, nullptr);
    return cudaSuccess;
  });
  return arena.bytes();
}

cudaError_t info_nce_loss_fwd(const void* query, Maybe<const void> positive, Maybe<const void> keys, double* stats,
                              void* loss, Maybe<void> pull, void* workspace, const double* scale, int64_t n, int64_t K,
                              int64_t D, Dtype dtype, Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    Workspace arena(workspace);
    const InfoNceForward<T> forward(arena, n, K, D, bool(pull), scale);
    const T* of_queries = static_cast<const T*>(query);
    const Pairs<T> pairs{{of_queries, n, D}, {static_cast<const T*>(keys.p), K, D}};
    const Finish<T> finish{
        of_queries, static_cast<const T*>(positive.p), forward.lse, stats, static_cast<A*>(pull.p), scale, n, D};
    return info_nce_forward(pairs, forward, finish, static_cast<A*>(loss), launch.stream);
  });
}

int64_t info_nce_loss_bwd_workspace(int64_t n, int64_t K, int64_t D, Dtype dtype) {
  Workspace arena(nullptr);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    GradientSpace<T>(arena, n, K, D, false, true);
    Probabilities<T>(arena, n, K, nullptr);
    return cudaSuccess;
  });
  return arena.bytes();
}

cudaError_t info_nce_loss_bwd(const void* query, const void* keys, Maybe<const int32_t> row_ids,
                              Maybe<const int32_t> key_ids, const double* lse, Maybe<const double> share, void* dkeys,
                              void* workspace, const double* scale, const double* dloss, int64_t n, int64_t K,
                              int64_t D, Dtype dtype, Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Workspace arena(workspace);
    const GradientSpace<T> space(arena, n, K, D, false, true);
    Probabilities<T> gradient(arena, n, K, scale);
    gradient.ids = {row_ids.p, key_ids.p}, gradient.share = share.p;
    const Pairs<T> pairs{{static_cast<const T*>(query), n, D}, {static_cast<const T*>(keys), K, D}};
    const Wanted<T> want{nullptr, static_cast<Acc<T>*>(dkeys), {1.0 / double(n) / kBigger<T>, scale, dloss}, nullptr};
    FVM_TRY(split(lse, gradient.lse, gradient.scale, launch.stream));
    return pair_gradients(pairs, space, gradient, want, launch.stream,
                          [](const Chunk&, Probabilities<T>&) { return cudaSuccess; });
  });
}

}  // namespace fvm::cuda
