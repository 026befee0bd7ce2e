// SPDX-License-Identifier: Apache-2.0
// log(sum(exp(scale * similarity))) of the rows and columns of a matrix of similarities that is made tile by tile. A tile
// leaves for each of its rows and columns the largest similarity and a sum relative to it; these are merged in the order
// of the tiles. No bound of the similarities is assumed, and differences are taken before they are scaled.
#pragma once
#include "contrastive_loss.cuh"

namespace fvm::cuda {

// Of the tiles of a chunk: for the rows [parts, rows], a part being the columns of a warp; for the columns [tiles, m]
template <class A> struct LogSums {
  A *row_ref, *row_sum;
  A *col_ref, *col_sum;  // null where columns are not wanted
  int64_t row_pitch, parts, m;

  LogSums(Workspace& arena, int64_t chunk_rows, int64_t m, bool want_columns)
      : row_pitch(chunk_rows), parts(ceil_div<int64_t>(m, Lanes<A>::kWide)), m(m) {
    row_ref = arena.take<A>(parts * row_pitch), row_sum = arena.take<A>(parts * row_pitch);
    const int64_t tiles = chunk_rows / kTile;
    col_ref = want_columns ? arena.take<A>(tiles * m) : nullptr;
    col_sum = want_columns ? arena.take<A>(tiles * m) : nullptr;
  }
  static int64_t bytes_of_tile(int64_t m) { return (2 * kTile / Lanes<A>::kWide + 2) * round_up(m, kTile) * sizeof(A); }
};

namespace {

// Adds one similarity to a sum relative to a reference that follows the largest. A NaN stays in the sum.
template <class A> __device__ __forceinline__ void add_exponential(A& ref, A& sum, A u, A scale) {
  const A ahead = (u - ref) * scale;
  const A e = exponential(ahead > 0 ? -ahead : ahead);
  sum = ahead > 0 ? sum * e + 1 : sum + e;
  ref = ahead > 0 ? u : ref;
}

// The columns' sums of a tile, which each group of threads has of its rows: merged through shared memory, first to last.
template <class A, int N>
__device__ __forceinline__ void merge_groups(const A (&ref)[N], const A (&sum)[N], A scale, int64_t left, A* to_ref,
                                             A* to_sum) {
  using L = Lanes<A>;
  A *refs = dynamic_shared<A>(), *sums = refs + L::kGroups * kTile;
  __syncthreads();
  Pack<A, N> pack;
#pragma unroll
  for (int k = 0; k < N; k++) pack.at[k] = ref[k];
  store(refs + L::group() * kTile + L::column(), pack);
#pragma unroll
  for (int k = 0; k < N; k++) pack.at[k] = sum[k];
  store(sums + L::group() * kTile + L::column(), pack);
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= kTile || c >= left) return;
  A top = kLowest<A>, total = 0;
  for (int g = 0; g < L::kGroups; g++) top = refs[g * kTile + c] > top ? refs[g * kTile + c] : top;
  for (int g = 0; g < L::kGroups; g++) total += sums[g * kTile + c] * exponential((refs[g * kTile + c] - top) * scale);
  to_ref[c] = top, to_sum[c] = total;
}

// For a tile of pairs: the log-sums of its rows and columns, and the sum of targets times similarities. A loss says
// which tiles it skips, which places count as pairs, and adds its targets.
template <class T, class Loss>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    log_sums(Pairs<T> pairs, Chunk chunk, Loss loss, LogSums<Acc<T>> to, double* __restrict__ target_sums) {
  using A = Acc<T>;
  using L = Lanes<A>;
  constexpr int N = L::N;
  __shared__ A row_ref[L::kParts][kTile], row_sum[L::kParts][kTile];
  const int64_t row = chunk.first + chunk.tile_row() * kTile, column = chunk.tile_column() * kTile;
  if (loss.skips(row, column)) {
    if (target_sums && threadIdx.x == 0) target_sums[blockIdx.x] = 0;
    return;
  }
  SimilarityTile<T> tile;
  make_similarities(tile, pairs, row, column);
  const Scale<A> of_logits(loss.scale);
  const A scale = of_logits.size, sign = of_logits.sign;
  const auto columns = loss.columns(column + L::column());
  A col_ref[N], col_sum[N] = {}, dense = 0;
#pragma unroll
  for (int k = 0; k < N; k++) col_ref[k] = kLowest<A>;
  double target[1] = {};
  for_each_pack<2>(tile, [&](int r, int c, Pack<A, N> u) {
    const int64_t i = row + r, j = column + c;
    A high = kLowest<A>, sum = 0;
#pragma unroll
    for (int k = 0; k < N; k++) u.at[k] *= sign;
    loss.add_targets(columns, i, j, u.at, target[0], dense);
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (!loss.counts(i, j + k)) u.at[k] = kLowest<A>;
      high = u.at[k] > high ? u.at[k] : high;
    }
    high = warp_max(high);
#pragma unroll
    for (int k = 0; k < N; k++) sum += exponential((u.at[k] - high) * scale);
    sum = warp_sum(sum);
    if (lane() == 0) row_ref[c / L::kWide][r] = high, row_sum[c / L::kWide][r] = sum;
    if (to.col_ref)
#pragma unroll
      for (int k = 0; k < N; k++) add_exponential(col_ref[k], col_sum[k], u.at[k], scale);
  });
  const int64_t columns_at = chunk.tile_row() * to.m + column;
  if (to.col_ref)
    merge_groups(col_ref, col_sum, scale, to.m - column, to.col_ref + columns_at, to.col_sum + columns_at);
  __syncthreads();
  const int part = threadIdx.x / kTile, r = threadIdx.x % kTile;
  const int64_t part_at = column / L::kWide + part, at = part_at * to.row_pitch + row - chunk.first + r;
  if (part < L::kParts && part_at < to.parts && row - chunk.first + r < chunk.rows)
    to.row_ref[at] = row_ref[part][r], to.row_sum[at] = row_sum[part][r];
  if (!target_sums) return;
  target[0] += double(dense);
  block_sum(target);
  if (threadIdx.x == 0) target_sums[blockIdx.x] = target[0];
}

// ---- merging

// log(exp(a) + exp(b)); NaN stays NaN
__device__ __forceinline__ double log_add_exp(double a, double b) {
  const double top = a > b ? a : b, low = a > b ? b : a;
  return top + ::log1p(::exp(low - top));
}

// The log-sum-exp of every line (row or column) over the parts begin to end, which a triangle leaves some of out:
// for rows those of its own tile and after, for columns those of its own tile and before.
enum class Parts { all, from_own, to_own };

template <class A> struct Merged {
  double ref, sum;
  __device__ __forceinline__ double lse(A scale) const { return double(scale) * ref + ::log(sum); }
};
template <class A>
__device__ __forceinline__ Merged<A> merge_parts(const A* ref, const A* sum, int64_t at, int64_t pitch, int64_t begin,
                                                 int64_t end, A scale) {
  A top = kLowest<A>;
  for (int64_t p = begin; p < end; p++) top = ref[p * pitch + at] > top ? ref[p * pitch + at] : top;
  double total = 0;
  for (int64_t p = begin; p < end; p++)
    total += double(sum[p * pitch + at]) * double(exponential((ref[p * pitch + at] - top) * scale));
  return {double(top), total};
}

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    merge_log_sums(const A* __restrict__ ref, const A* __restrict__ sum, double* __restrict__ lse, int64_t first,
                   int64_t lines, int64_t pitch, int64_t parts, int64_t part_size, int64_t part_first, Parts which,
                   bool add, const double* scale) {
  const int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= lines) return;
  const int64_t own = (first + i) / kTile * kTile;  // the first line of its tile
  const int64_t begin = which == Parts::from_own ? own / part_size : 0;
  const int64_t end = which == Parts::to_own ? smaller(parts, (own - part_first) / part_size + 1) : parts;
  const A size = Scale<A>(scale).size;
  const double value = merge_parts(ref, sum, i, pitch, begin, end, size).lse(size);
  lse[first + i] = add ? log_add_exp(lse[first + i], value) : value;
}

// Rows of the chunk, over all columns of the launch.
template <class A>
cudaError_t merge_rows(const LogSums<A>& sums, const Chunk& chunk, double* lse, Parts which, bool add,
                       const double* scale, cudaStream_t stream) {
  return FVM_LAUNCH(merge_log_sums<A>, ceil_div<int64_t>(chunk.rows, kTileThreads), kTileThreads, 0, stream,
                    sums.row_ref, sums.row_sum, lse, chunk.first, chunk.rows, sums.row_pitch, sums.parts,
                    Lanes<A>::kWide, 0, which, add, scale);
}

// Columns from `from` on, over the rows of the chunk.
template <class A>
cudaError_t merge_columns(const LogSums<A>& sums, const Chunk& chunk, double* lse, int64_t from, Parts which, bool add,
                          const double* scale, cudaStream_t stream) {
  return FVM_LAUNCH(merge_log_sums<A>, ceil_div<int64_t>(sums.m - from, kTileThreads), kTileThreads, 0, stream,
                    sums.col_ref + from, sums.col_sum + from, lse, from, sums.m - from, sums.m, chunk.row_tiles,
                    int64_t(kTile), chunk.first, which, add, scale);
}

}  // namespace

}  // namespace fvm::cuda
