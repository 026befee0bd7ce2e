// SPDX-License-Identifier: Apache-2.0
// A block's share of a matrix product: 128 x 128 sums in registers, fed from shared memory in steps of 64 bytes of the
// summed index. Half types are multiplied by the tensor cores, float and double by plain FMA in full precision.
#pragma once
#include "common.cuh"
#include "primitives.cuh"

namespace fvm::cuda {

constexpr int kTile = 128, kTileThreads = 256;
constexpr int kTileShared = 32 << 10;  // bytes: both operands of two steps, later the sums on their way out
template <class T> constexpr int kStep = 64 / sizeof(T);
template <class T> constexpr int kTileBlocks = kIsHalf<T> ? 2 : 1;  // that have to fit into an SM

// ---- An operand in shared memory: [128, kStep] when the summed index is innermost, as in rows of patches, features,
// gradients; [kStep, 128] when tokens or rows are summed. Chunks of 16 bytes change places within a row, so that the
// eight rows (or chunks) that are read at once lie in different banks.

enum class Layout { step_inside, step_outside };

template <class T, Layout kLayout> struct Panel {
  static constexpr bool kInside = kLayout == Layout::step_inside;
  static constexpr int kSize = kTile * kStep<T>, kColumns = kInside ? kStep<T> : kTile;

  __device__ __forceinline__ static int place(int row, int column) {
    constexpr int N = kChunk<T>;
    return row * kColumns + (column / N ^ (kInside ? row / 2 % 4 : row % 8)) * N + column % N;
  }
  // Element k of the step for row (or column) x of the tile
  __device__ __forceinline__ static int at(int x, int k) { return kInside ? place(x, k) : place(k, x); }
};

// ---- Tensor cores: four by two warps with 32 x 64 sums each

template <class T, Layout kA, Layout kB> struct MmaTile {
  using Sum = float;
  static constexpr int kStageRows = 64, kStageSwap = 8;  // see for_each_pack
  float sum[2][8][4] = {};

  static __device__ __forceinline__ int row() { return warp() / 2 * 32; }
  static __device__ __forceinline__ int column() { return warp() % 2 * 64; }

  // Half of a step: 16 of its 32. Lane 8 m + r names row r of ldmatrix's tile m: of a, tiles go down first, of b (two
  // fragments of it) along k first.
  __device__ __forceinline__ void add_half(int half, const T* a, const T* b) {
    const int r = lane() % 8, even = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    const int a_row = row() + even + (kA == Layout::step_inside ? r : 0),
              a_k = high + (kA == Layout::step_inside ? 0 : r);
    const int b_row = column() + high + (kB == Layout::step_inside ? r : 0),
              b_k = even + (kB == Layout::step_inside ? 0 : r);
    const int k = half * 16;
    uint32_t of_a[2][4], of_b[4];
#pragma unroll
    for (int i = 0; i < 2; i++)
      ldmatrix<4, kA == Layout::step_outside>(of_a[i], a + Panel<T, kA>::at(a_row + 16 * i, a_k + k));
#pragma unroll
    for (int j = 0; j < 4; j++) {
      ldmatrix<4, kB == Layout::step_outside>(of_b, b + Panel<T, kB>::at(b_row + 16 * j, b_k + k));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma_m16n8k16<T>(sum[i][2 * j], of_a[i], of_b[0], of_b[1]);
        mma_m16n8k16<T>(sum[i][2 * j + 1], of_a[i], of_b[2], of_b[3]);
      }
    }
  }

  // The tile's row that is row s of the stage in this pass
  static __device__ __forceinline__ int row_of_stage(int pass, int s) { return s / 16 * 32 + pass * 16 + s % 16; }

  template <class Place> __device__ __forceinline__ void write_stage(float* stage, int pass, Place&& place) const {
    const int s = warp() / 2 * 16 + lane() / 4, c = column() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i == pass)
#pragma unroll
        for (int j = 0; j < 8; j++) {
          store(stage + place(s, c + 8 * j), Pack<float, 2>{{sum[i][j][0], sum[i][j][1]}});
          store(stage + place(s + 8, c + 8 * j), Pack<float, 2>{{sum[i][j][2], sum[i][j][3]}});
        }
  }
};

// ---- FMA: 16 x 16 threads with 8 x 8 sums each, 16 apart

template <class T, Layout kA, Layout kB> struct FmaTile {
  using Sum = T;
  static constexpr int kStageRows = kTileShared / kTile / sizeof(T), kStageSwap = 16;
  T sum[8][8] = {};

  // The chunk of steps from k on for row x
  template <Layout kLayout> static __device__ __forceinline__ Pack<T, kChunk<T>> fetch(const T* panel, int x, int k) {
    using Panel = cuda::Panel<T, kLayout>;
    if constexpr (Panel::kInside) {
      return load<kChunk<T>>(panel + Panel::at(x, k));
    } else {
      Pack<T, kChunk<T>> chunk;
#pragma unroll
      for (int n = 0; n < kChunk<T>; n++) chunk.at[n] = panel[Panel::at(x, k + n)];
      return chunk;
    }
  }

  __device__ __forceinline__ void add_half(int half, const T* a, const T* b) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 1
    for (int k = half * kStep<T> / 2; k < (half + 1) * kStep<T> / 2; k += kChunk<T>) {
      Pack<T, kChunk<T>> of_a[8];
#pragma unroll
      for (int i = 0; i < 8; i++) of_a[i] = fetch<kA>(a, ty + 16 * i, k);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const Pack<T, kChunk<T>> of_b = fetch<kB>(b, tx + 16 * j, k);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int n = 0; n < kChunk<T>; n++) sum[i][j] = fma(of_a[i].at[n], of_b.at[n], sum[i][j]);
      }
    }
  }

  static __device__ __forceinline__ int row_of_stage(int pass, int s) { return pass * kStageRows + s; }

  template <class Place> __device__ __forceinline__ void write_stage(T* stage, int pass, Place&& place) const {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (16 * i / kStageRows == pass)
#pragma unroll
        for (int j = 0; j < 8; j++)
          stage[place(threadIdx.x / 16 + 16 * i % kStageRows, threadIdx.x % 16 + 16 * j)] = sum[i][j];
  }
};

template <class T, Layout kA, Layout kB>
using Tile = std::conditional_t<kIsHalf<T>, MmaTile<T, kA, kB>, FmaTile<T, kA, kB>>;

// f(row, column, sums of 16 bytes) for the whole tile, kUnroll rows at a time: a warp takes neighbouring columns of a
// row. The sums go through shared memory in passes of 32 KB, with columns changing places so that writing meets no bank
// twice. All threads call.
template <int kUnroll = 2, class Sums, class F> __device__ __forceinline__ void for_each_pack(const Sums& tile, F&& f) {
  using S = typename Sums::Sum;
  constexpr int N = kChunk<S>, kAcross = kTile / N;
  S* stage = dynamic_shared<S>();
  auto place = [](int s, int column) { return s * kTile + (column ^ s * Sums::kStageSwap % 32); };
  const int column = threadIdx.x % kAcross * N;
#pragma unroll 1
  for (int pass = 0; pass < kTile / Sums::kStageRows; pass++) {
    __syncthreads();
    tile.write_stage(stage, pass, place);
    __syncthreads();
#pragma unroll kUnroll
    for (int s = threadIdx.x / kAcross; s < Sums::kStageRows; s += kTileThreads / kAcross)
      f(Sums::row_of_stage(pass, s), column, load<N>(stage + place(s, column)));
  }
}

}  // namespace fvm::cuda
