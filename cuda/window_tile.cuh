// SPDX-License-Identifier: Apache-2.0
// Products of blocks in shared memory, a warp for 16 rows of the result: half types on the tensor cores, float and double
// by FMA in full precision. In both a lane has the same places of the result, those of an mma fragment, so that all that
// follows a product (softmax, sums, gradients) is written once.
#pragma once
#include "common.cuh"
#include "primitives.cuh"

namespace fvm::cuda {

namespace {

// Queries, and keys, of a block: as many as leave room for head dims of 128 in 99 KB
template <class T> constexpr int kBlock = kIsHalf<T> ? 64 : sizeof(T) == 4 ? 32 : 16;
template <class T> constexpr int kThreads = kBlock<T> / 16 * kWarp;
template <class T> constexpr int kBlocksOnSM = kIsHalf<T> ? 3 : sizeof(T) == 4 ? 6 : 8;  // that registers have to allow

// Rows in shared memory are an odd number of chunks apart: what eight rows have in the same chunk is in different banks.
__host__ __device__ constexpr int padded(int d) { return (d + 15) / 16 * 16; }
template <class T> __host__ __device__ constexpr int row_stride(int d) { return padded(d) + kChunk<T>; }

// ---- a lane's places in a result of 16 rows and tiles of 8 columns: value e of tile j is that of (row_of(e), column_of(j,
// e)); a quad of lanes has two rows

__device__ __forceinline__ int row_of(int e) { return lane() / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int j, int e) { return 8 * j + lane() % 4 * 2 + e % 2; }

template <class A> __device__ __forceinline__ A quad_sum(A x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
template <class A> __device__ __forceinline__ A quad_max(A x) {  // a NaN is left out
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x || x != x ? other : x;
  }
  return x;
}

// ---- products. An operand's rows in shared memory are those that are kept, or those that are summed over.

enum class RowsAre { kept, summed };

template <class T> constexpr int kStep = kIsHalf<T> ? 16 : kChunk<T>;  // of the summed index

// The left operand of a step: a fragment, or the chunks of two rows
template <class T> struct LeftStep { std::conditional_t<kIsHalf<T>, uint32_t[4], Pack<T, kChunk<T>>[2]> at; };

template <RowsAre kA, class T> __device__ __forceinline__ LeftStep<T> left_step(const T* a, int stride, int k) {
  LeftStep<T> step;
  if constexpr (kIsHalf<T>) {
    const int r = lane() % 8, even = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    if constexpr (kA == RowsAre::kept)
      ldmatrix<4>(step.at, a + (even + r) * stride + k + high);
    else
      ldmatrix<4, true>(step.at, a + (k + high + r) * stride + even);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++)
      if constexpr (kA == RowsAre::kept) {
        step.at[i] = load<kChunk<T>>(a + row_of(2 * i) * stride + k);
      } else {
#pragma unroll
        for (int n = 0; n < kChunk<T>; n++) step.at[i].at[n] = a[(k + n) * stride + row_of(2 * i)];
      }
  }
  return step;
}

template <RowsAre kB, int kTiles, class T>
__device__ __forceinline__ void multiply_step(float (&sum)[kTiles][4], const uint32_t (&a)[4], const T* b, int stride,
                                              int k, int columns) {
  const int r = lane() % 8, even = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    if (8 * j >= columns) break;
    uint32_t of_b[4];
    if constexpr (kB == RowsAre::kept)
      ldmatrix<4>(of_b, b + (8 * j + high + r) * stride + k + even);
    else
      ldmatrix<4, true>(of_b, b + (k + even + r) * stride + 8 * j + high);
    mma_m16n8k16<T>(sum[j], a, of_b[0], of_b[1]);
    mma_m16n8k16<T>(sum[j + 1], a, of_b[2], of_b[3]);
  }
}

template <RowsAre kB, int kTiles, class T, int N>
__device__ __forceinline__ void multiply_step(T (&sum)[kTiles][4], const Pack<T, N> (&a)[2], const T* b, int stride,
                                              int k, int columns) {
#pragma unroll
  for (int j = 0; j < kTiles; j++) {
    if (8 * j >= columns) break;
    Pack<T, N> of_b[2];
    if constexpr (kB == RowsAre::kept) {
#pragma unroll
      for (int i = 0; i < 2; i++) of_b[i] = load<N>(b + column_of(j, i) * stride + k);
    } else {
#pragma unroll
      for (int n = 0; n < N; n++) {
        const Pack<T, 2> pair = load<2>(b + (k + n) * stride + column_of(j, 0));
        of_b[0].at[n] = pair.at[0], of_b[1].at[n] = pair.at[1];
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
      for (int n = 0; n < N; n++) sum[j][e] = fma(a[e / 2].at[n], of_b[e % 2].at[n], sum[j][e]);
  }
}

// sum += A B over `steps` of the summed index, a multiple of 16, for the first `columns` columns, also a multiple
template <RowsAre kA, RowsAre kB, int kTiles, class T>
__device__ __forceinline__ void multiply(Acc<T> (&sum)[kTiles][4], const T* a, int a_stride, const T* b, int b_stride,
                                         int steps, int columns) {
#pragma unroll 1
  for (int k = 0; k < steps; k += kStep<T>)
    multiply_step<kB>(sum, left_step<kA>(a, a_stride, k).at, b, b_stride, k, columns);
}

// ---- results to shared memory

template <class T, int kTiles>
__device__ __forceinline__ void write_tile(T* to, int stride, const Acc<T> (&value)[kTiles][4], int columns) {
#pragma unroll
  for (int j = 0; j < kTiles; j++) {
    if (8 * j >= columns) break;
#pragma unroll
    for (int i = 0; i < 2; i++)
      store(to + row_of(2 * i) * stride + column_of(j, 0),
            Pack<T, 2>{{narrow<T>(value[j][2 * i]), narrow<T>(value[j][2 * i + 1])}});
  }
}

}  // namespace

}  // namespace fvm::cuda
