// SPDX-License-Identifier: Apache-2.0
// nt_xent_loss forward: the log-sum-exp of every row without itself, and the sum of the logits of the positive pairs.
// S is symmetric: only tiles with pairs i < j are made, and serve their rows and their columns. See csrc/nt_xent_loss.h.
#include "log_sum_exp.cuh"

namespace fvm::cuda {

namespace {

template <class A> struct Triangle {
  static constexpr int N = kChunk<A>;
  const double* scale;
  int64_t R;

  struct Columns {};
  __device__ __forceinline__ bool skips(int64_t row, int64_t column) const { return column < row; }
  __device__ __forceinline__ bool counts(int64_t i, int64_t j) const { return i < j && j < R; }
  __device__ __forceinline__ Columns columns(int64_t) const { return {}; }
  __device__ __forceinline__ void add_targets(const Columns&, int64_t i, int64_t j, const A (&u)[N], double& target,
                                              A&) const {
    if (i >= R / 2) return;
#pragma unroll
    for (int k = 0; k < N; k++)
      if (j + k == i + R / 2) target += double(u[k]);
  }
};

template <class T> struct NtXentForward {
  using A = Acc<T>;
  int64_t chunk, tiles;
  LogSums<A> sums;
  double* positive_sums;  // [tiles]

  NtXentForward(Workspace& arena, int64_t R)
      : chunk(rows_of_chunk(R, LogSums<A>::bytes_of_tile(R))),
        tiles(ceil_div<int64_t>(R, kTile) * ceil_div<int64_t>(R, kTile)),
        sums(arena, chunk, R, true),
        positive_sums(arena.take<double>(tiles)) {}
};

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    finish_nt_xent_loss(const double* __restrict__ lse, int64_t R, const double* __restrict__ positive_sums,
                        int64_t tiles, const double* scale, double* __restrict__ positive_sum, A* __restrict__ loss) {
  const double positive = double(Scale<A>(scale).size) * sum_over(tiles, [&](int64_t t) { return positive_sums[t]; });
  const double all = sum_over(R, [&](int64_t i) { return lse[i]; });
  if (threadIdx.x == 0) *positive_sum = positive, *loss = A((all - 2 * positive) / double(R));
}

template <class T>
cudaError_t nt_xent_forward(const Pairs<T>& pairs, const NtXentForward<T>& f, const Triangle<Acc<T>>& triangle,
                            double* lse, double* positive_sum, Acc<T>* loss, cudaStream_t stream) {
  using A = Acc<T>;
  const int64_t R = triangle.R;
  for (int64_t first = 0; first < R; first += f.chunk) {
    const Chunk chunk(first, f.chunk, R, R);
    FVM_TRY(FVM_LAUNCH((log_sums<T, Triangle<A>>), chunk.blocks(), kTileThreads, kTileShared, stream, pairs, chunk,
                       triangle, f.sums, f.positive_sums + first / kTile * chunk.column_tiles));
    FVM_TRY(merge_columns(f.sums, chunk, lse, first, Parts::to_own, first > 0, triangle.scale, stream));
    FVM_TRY(merge_rows(f.sums, chunk, lse, Parts::from_own, true, triangle.scale, stream));
  }
  return FVM_LAUNCH(finish_nt_xent_loss<A>, 1, kTileThreads, 0, stream, lse, R, f.positive_sums, f.tiles,
                    triangle.scale, positive_sum, loss);
}

}  // namespace

int64_t nt_xent_loss_fwd_workspace(int64_t R, int64_t D, Dtype dtype) {
  static_cast<void>(D);
  Workspace arena(nullptr);
  with_dtype(dtype, [&](auto zero) {
    NtXentForward<decltype(zero)>(arena, R);
    return cudaSuccess;
  });
  return arena.bytes();
}

cudaError_t nt_xent_loss_fwd(const void* z, double* lse, double* positive_sum, void* loss, void* workspace,
                             const double* scale, int64_t R, int64_t D, Dtype dtype, Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    Workspace arena(workspace);
    const NtXentForward<T> forward(arena, R);
    const Features<T> features(static_cast<const T*>(z), R, D);
    return nt_xent_forward({features, features}, forward, {scale, R}, lse, positive_sum, static_cast<A*>(loss),
                           launch.stream);
  });
}

}  // namespace fvm::cuda
