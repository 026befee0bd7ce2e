// SPDX-License-Identifier: Apache-2.0
// clip_loss forward: the log-sum-exp of every row and column of logits, the sum of targets times logits, and the loss.
#include "clip_loss.cuh"
#include "log_sum_exp.cuh"

namespace fvm::cuda {

namespace {

template <class T> struct ClipForward {
  using A = Acc<T>;
  int64_t chunk;
  ClipTargets<A> targets;
  LogSums<A> sums;
  double* target_sums;  // [tiles]
  int64_t tiles;

  ClipForward(Workspace& arena, int64_t n, int64_t m, int64_t teacher_D, const double* scale,
              const double* teacher_scale)
      : chunk(rows_of_chunk(n, LogSums<A>::bytes_of_tile(m) + ClipTargets<A>::dense_bytes_of_tile(m, teacher_D))),
        targets(arena, n, m, scale, teacher_scale),
        sums(arena, chunk, m, true),
        tiles(ceil_div<int64_t>(n, kTile) * ceil_div<int64_t>(m, kTile)) {
    targets.dense = teacher_D ? arena.take<A>(chunk * targets.pitch) : nullptr;
    target_sums = arena.take<double>(tiles);
  }
};

// The mean weights its terms, in double: the loss is what is left of large numbers.
template <class A>
__global__ void __launch_bounds__(kTileThreads)
    finish_clip_loss(const double* __restrict__ lse, Side<A> row, Side<A> column,
                     const double* __restrict__ target_sums, int64_t tiles, const double* scale, double* target_sum,
                     A* loss) {
  auto weighted = [&](const Side<A>& side, const double* lse) {
    return sum_over(side.n,
                    [&](int64_t i) { return lse[i] * (side.targets ? side.targets[i] : 0.5 / double(side.n)); });
  };
  const double sum = double(Scale<A>(scale).size) * sum_over(tiles, [&](int64_t t) { return target_sums[t]; });
  if (target_sum && threadIdx.x == 0) *target_sum = sum;
  if (!loss) return;
  const double of_rows = weighted(row, lse), of_columns = weighted(column, lse + row.n);
  if (threadIdx.x == 0) *loss = A(of_rows + of_columns - sum);
}

template <class T>
cudaError_t clip_forward(const ClipInputs<T>& in, ClipForward<T>& f, double* lse, double* target_sum, Acc<T>* loss,
                         cudaStream_t stream) {
  using A = Acc<T>;
  const int64_t n = in.x.rows, m = in.y.rows;
  ClipTargets<A>& targets = f.targets;
  set_options(targets, in);
  FVM_TRY(fill(targets.row, nullptr, targets.scale, targets.teacher_scale, stream));
  FVM_TRY(fill(targets.column, nullptr, targets.scale, targets.teacher_scale, stream));
  for (int64_t first = 0; first < n; first += f.chunk) {
    const Chunk chunk(first, f.chunk, n, m);
    FVM_TRY(ask_teacher(targets, in, chunk, stream));
    FVM_TRY(FVM_LAUNCH((log_sums<T, ClipTargets<A>>), chunk.blocks(), kTileThreads, kTileShared, stream, in.pairs(),
                       chunk, targets, f.sums, f.target_sums + first / kTile * chunk.column_tiles));
    FVM_TRY(merge_rows(f.sums, chunk, lse, Parts::all, false, targets.scale, stream));
    FVM_TRY(merge_columns(f.sums, chunk, lse + n, 0, Parts::all, first > 0, targets.scale, stream));
  }
  if (!target_sum && !loss) return cudaSuccess;
  return FVM_LAUNCH(finish_clip_loss<A>, 1, kTileThreads, 0, stream, lse, targets.row, targets.column, f.target_sums,
                    f.tiles, targets.scale, target_sum, loss);
}

}  // namespace

int64_t clip_loss_fwd_workspace(int64_t n, int64_t m, int64_t D, int64_t teacher_D, Dtype dtype) {
  static_cast<void>(D);
  Workspace arena(nullptr);
  with_dtype(dtype, [&](auto zero) {
    ClipForward<decltype(zero)>(arena, n, m, teacher_D, nullptr, nullptr);
    return cudaSuccess;
  });
  return arena.bytes();
}

// Nothing is kept for the backward: tensor cores make the similarities again in less time than memory would bring them.
cudaError_t clip_loss_fwd(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids,
                          Maybe<const double> row_targets, Maybe<const double> col_targets, Maybe<const void> teacher_x,
                          Maybe<const void> teacher_y, double* lse, Maybe<double> target_sum, Maybe<void> loss,
                          Maybe<void> kept, void* workspace, const double* scale, const double* teacher_scale,
                          double teacher_weight, double row_smoothing, double col_smoothing, int64_t n, int64_t m,
                          int64_t D, int64_t teacher_D, int64_t kept_size, Dtype dtype, Launch launch) {
  if (kept || kept_size) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto in = clip_inputs<T>(x, y, row_ids, col_ids, row_targets, col_targets, teacher_x, teacher_y, scale,
                                   teacher_scale, teacher_weight, row_smoothing, col_smoothing, n, m, D, teacher_D);
    Workspace arena(workspace);
    ClipForward<T> forward(arena, n, m, teacher_D, scale, teacher_scale);
    return clip_forward(in, forward, lse, target_sum.p, static_cast<Acc<T>*>(loss.p), launch.stream);
  });
}

}  // namespace fvm::cuda
