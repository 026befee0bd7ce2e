// SPDX-License-Identifier: Apache-2.0
// What the contrastive losses share: similarities x_i . y_j are made in tiles of 128 x 128 by the tensor cores (FMA for
// float and double) and used on their way out of the registers; a chunk of rows at a time, so that workspaces stay of
// bounded size. Formulas are those of csrc/<loss>.
#pragma once
#include "product_tile.cuh"
#include "workspace.cuh"

#ifndef FVM_CHUNK_BYTES  // tests make it small
#define FVM_CHUNK_BYTES (int64_t(128) << 20)
#endif

namespace fvm::cuda {

// ---- operands: rows of features as they lie

template <class T> struct Features {
  const T* values;
  int64_t rows, columns, pitch;
  bool in_chunks;  // of 16 bytes, at aligned addresses

  Features(const T* values, int64_t rows, int64_t columns, int64_t pitch)
      : values(values),
        rows(rows),
        columns(columns),
        pitch(pitch),
        in_chunks(columns % kChunk<T> == 0 && pitch % kChunk<T> == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0) {
  }
  Features(const T* values, int64_t rows, int64_t columns) : Features(values, rows, columns, columns) {}
};

// One step of an operand into its panel, N values at once; zeros where there are no features.
template <class T, Layout kLayout, int N>
__device__ __forceinline__ void copy_step(const Features<T>& from, T* panel, int64_t first, int64_t k) {
  using Panel = cuda::Panel<T, kLayout>;
  constexpr int kAcross = Panel::kColumns / N, kApart = kTileThreads / kAcross, kRows = Panel::kSize / Panel::kColumns;
  const int r = threadIdx.x / kAcross, c = threadIdx.x % kAcross * N;
  const int64_t row = (Panel::kInside ? first : k) + r, column = (Panel::kInside ? k : first) + c;
  const T* at = from.values + row * from.pitch + column;
#pragma unroll(N > 1 ? kRows / kApart : 1)
  for (int i = 0; i < kRows; i += kApart) {
    const bool inside = row + i < from.rows && column < from.columns;
    if constexpr (N > 1)
      cp_async<16>(panel + Panel::place(r + i, c), inside ? at + i * from.pitch : from.values, inside);
    else
      panel[Panel::place(r + i, c)] = inside ? at[i * from.pitch] : narrow<T>(0);
  }
}

template <class T, Layout kLayout>
__device__ __forceinline__ void start_step(const Features<T>& from, T* panel, int64_t first, int64_t k) {
  if (from.in_chunks)
    copy_step<T, kLayout, kChunk<T>>(from, panel, first, k);
  else
    copy_step<T, kLayout, 1>(from, panel, first, k);
}

// tile += a[row :, begin : end] b[column :, begin : end]^T, or with the indices of an operand the other way round where
// its layout has the summed index outside. `end` is a multiple of the step, or the operands end there. All threads call.
template <class T, Layout kA, Layout kB>
__device__ __forceinline__ void multiply_features(Tile<T, kA, kB>& tile, const Features<T>& a, const Features<T>& b,
                                                  int64_t row, int64_t column, int64_t begin, int64_t end) {
  constexpr int kPanel = kTile * kStep<T>;
  T* shared = dynamic_shared<T>();
  int now = 0;  // where the step before the next one is
  auto start = [&](int64_t k, T* panels) {
    if (k < end) start_step<T, kA>(a, panels, row, k), start_step<T, kB>(b, panels + kPanel, column, k);
    cp_async_commit();
  };
  start(begin, shared);
#pragma unroll 1
  for (int64_t k = begin; k < end; k += kStep<T>) {
    cp_async_wait<0>();
    __syncthreads();
    start(k + kStep<T>, shared + (now ^ 2 * kPanel));
#pragma unroll(kIsHalf<T> ? 1 : 2)
    for (int half = 0; half < 2; half++) tile.add_half(half, shared + now, shared + now + kPanel);
    now ^= 2 * kPanel;
  }
}

template <class T> struct Pairs {
  Features<T> x, y;  // [n, D], [m, D]
};

// ---- the tiles of one launch: all columns beside the rows of a chunk

struct Chunk {
  int64_t first, rows;  // `first` is a multiple of the tile
  int64_t row_tiles, column_tiles;

  Chunk(int64_t first, int64_t most, int64_t n, int64_t m)
      : first(first),
        rows(smaller(most, n - first)),
        row_tiles(ceil_div<int64_t>(rows, kTile)),
        column_tiles(ceil_div<int64_t>(m, kTile)) {}
  Grid blocks() const { return {row_tiles * column_tiles}; }
  // Blocks that run at the same time have few columns between them
  __device__ __forceinline__ int64_t tile_row() const { return blockIdx.x % row_tiles; }
  __device__ __forceinline__ int64_t tile_column() const { return blockIdx.x / row_tiles; }
};

// As many rows, in whole tiles, as have room when each tile of rows takes so many bytes.
inline int64_t rows_of_chunk(int64_t n, int64_t bytes_of_tile) {
  const int64_t tiles = larger(1, FVM_CHUNK_BYTES / larger(1, bytes_of_tile));
  return smaller(tiles, larger(1, ceil_div<int64_t>(n, kTile))) * kTile;
}

// What a thread meets of a tile through for_each_pack: N columns, always the same ones, of some rows.
template <class A> struct Lanes {
  static constexpr int N = kChunk<A>, kAcross = kTile / N, kGroups = kTileThreads / kAcross;
  static constexpr int kWide = kWarp * N, kParts = kTile / kWide;  // columns of a warp, and of such parts in a tile
  static __device__ __forceinline__ int column() { return threadIdx.x % kAcross * N; }
  static __device__ __forceinline__ int group() { return threadIdx.x / kAcross; }
};

template <class A> constexpr int kRowsAtOnce = sizeof(A) == 8 ? 1 : 2;

template <class T> using SimilarityTile = Tile<T, Layout::step_inside, Layout::step_inside>;

template <class T>
__device__ __forceinline__ void make_similarities(SimilarityTile<T>& tile, const Pairs<T>& pairs, int64_t row,
                                                  int64_t column) {
  multiply_features<T, Layout::step_inside, Layout::step_inside>(tile, pairs.x, pairs.y, row, column, 0,
                                                                 pairs.x.columns);
}

// ---- numbers

template <class A> constexpr A kLowest = sizeof(A) == 4 ? A(-3e38) : A(-1e308);  // a similarity that no sum notices

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return ::exp(x); }
__device__ __forceinline__ float logarithm1p(float x) { return log1pf(x); }
__device__ __forceinline__ double logarithm1p(double x) { return ::log1p(x); }

// A scale taken apart: `sign` goes to the similarities, so that a larger one is a larger logit. Zero becomes a number
// that changes no logit but still separates the padding from them.
template <class A> struct Scale {
  A size, sign;
  __device__ __forceinline__ explicit Scale(const double* scale)
      : size(A(magnitude(*scale))), sign(*scale < 0 ? -1 : 1) {}
  static __device__ __forceinline__ double magnitude(double scale) {
    const double size = scale < 0 ? -scale : scale;
    return size < 1e-30 ? 1e-30 : size;
  }
};

// A number times those that only the device knows: scales, and the gradient of the loss.
struct Factor {
  double number = 1;
  const double *first = nullptr, *second = nullptr;
  __device__ __forceinline__ double value() const { return number * (first ? *first : 1.0) * (second ? *second : 1.0); }
};

// lse = scale * ref + rest: exp(S - lse) = exp(scale * (similarity - ref) - rest) loses nothing to the size of S
template <class A> struct Lse {
  A ref, rest;
  __device__ __forceinline__ Lse(double lse, Scale<A> scale)
      : ref(A(lse / scale.size)), rest(A(lse - double(scale.size) * double(ref))) {}
};
template <class A> __device__ __forceinline__ A probability(A similarity, A scale, A ref, A rest) {
  return exponential((similarity - ref) * scale - rest);
}

// The log-sum-exps of lines, padded to whole tiles
template <class A> struct LsePairs {
  int64_t n, padded;
  A *ref, *rest;
  LsePairs(Workspace& arena, int64_t n)
      : n(n), padded(round_up(n, kTile)), ref(arena.take<A>(padded)), rest(arena.take<A>(padded)) {}
};

// Which pairs are positive: those of equal ids; null: of equal numbers
struct Ids {
  const int32_t *rows, *columns;
  __device__ __forceinline__ int32_t row(int64_t i) const { return rows ? rows[i] : int32_t(i); }
  __device__ __forceinline__ int32_t column(int64_t j) const { return columns ? columns[j] : int32_t(j); }
};

// The sum over the block, in thread 0; in a fixed order. All threads call.
template <int kCount> __device__ __forceinline__ void block_sum(double (&sum)[kCount]) {
  __shared__ double of_warp[kTileThreads / kWarp][kCount];
#pragma unroll
  for (int k = 0; k < kCount; k++) sum[k] = warp_sum(sum[k]);
  if (lane() == 0)
#pragma unroll
    for (int k = 0; k < kCount; k++) of_warp[warp()][k] = sum[k];
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kTileThreads / kWarp; w++)
#pragma unroll
      for (int k = 0; k < kCount; k++) sum[k] += of_warp[w][k];
  __syncthreads();
}

// Sum of f(i) over i < n by one block, in thread 0.
template <class F> __device__ __forceinline__ double sum_over(int64_t n, F&& f) {
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < n; i += kTileThreads) sum[0] += f(i);
  block_sum(sum);
  return sum[0];
}

namespace {

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    split_lse(const double* __restrict__ lse, LsePairs<A> to, const double* scale) {
  const int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= to.padded) return;
  const Lse<A> of(i < to.n ? lse[i] : 0, Scale<A>(scale));
  to.ref[i] = of.ref, to.rest[i] = of.rest;
}

template <class A>
cudaError_t split(const double* lse, const LsePairs<A>& to, const double* scale, cudaStream_t stream) {
  return FVM_LAUNCH(split_lse<A>, ceil_div<int64_t>(to.padded, kTileThreads), kTileThreads, 0, stream, lse, to, scale);
}

}  // namespace

}  // namespace fvm::cuda
