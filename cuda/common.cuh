// SPDX-License-Identifier: Apache-2.0
// What all CUDA kernels share: storage types, vectors of 16 bytes, sums in a fixed order, and the way from a dtype code
// to a template. A launcher reads: with_dtype(dtype, [&](auto zero) { using T = decltype(zero); ... }).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "launch.cuh"

// Leaves the launcher with the first error.
#define FVM_TRY(expression)                         \
  do {                                              \
    const cudaError_t fvm_error = (expression);     \
    if (fvm_error != cudaSuccess) return fvm_error; \
  } while (false)

namespace fvm::cuda {

// ---- storage types: half types are computed in float

using bf16 = __nv_bfloat16;
using fp16 = __half;
template <class T> using Acc = std::conditional_t<std::is_same<T, double>::value, double, float>;
template <class T> constexpr bool kIsHalf = sizeof(T) == 2;
template <class T> constexpr int kChunk = 16 / sizeof(T);  // values that are moved at once

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(fp16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T narrow(Acc<T> x) {
  if constexpr (std::is_same<T, bf16>::value)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same<T, fp16>::value)
    return __float2half_rn(x);
  else
    return x;
}

template <class T> __device__ __forceinline__ T not_a_number() { return narrow<T>(static_cast<Acc<T>>(NAN)); }

template <class F> cudaError_t with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64: return f(double{});
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(fp16{});
    default: return cudaErrorInvalidValue;
  }
}

// ---- sizes

template <class T> __host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Whether all these addresses are multiples of so many bytes; null is one.
template <class... P> bool aligned(int64_t bytes, const P*... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) % bytes == 0) && ...);
}

// ---- vectors: N neighbours that are moved at once

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <int N, class T> __device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <class T, int N> __device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class T, int N> __device__ __forceinline__ void widen(Acc<T> (&wide)[N], const Pack<T, N>& pack) {
#pragma unroll
  for (int j = 0; j < N; j++) wide[j] = widen(pack.at[j]);
}
template <class T, int N> __device__ __forceinline__ void accumulate(Acc<T> (&sum)[N], const Pack<T, N>& pack) {
#pragma unroll
  for (int j = 0; j < N; j++) sum[j] += widen(pack.at[j]);
}
template <class T, int N> __device__ __forceinline__ Pack<T, N> narrow(const Acc<T> (&wide)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; j++) pack.at[j] = narrow<T>(wide[j]);
  return pack;
}

// Calls f with the width of a pack: 16 bytes where rows of D values can be cut so at all these addresses, else one value.
template <class T, class F, class... P> cudaError_t with_width(int64_t D, F&& f, const P*... rows) {
  if (D % kChunk<T> == 0 && aligned(16, rows...)) return f(std::integral_constant<int, kChunk<T>>{});
  return f(std::integral_constant<int, 1>{});
}

// ---- threads

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// For blocks of one dimension.
__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int64_t warp_of_grid() { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; }

// ---- sums in an order that does not depend on timing

template <class A> __device__ __forceinline__ A warp_sum(A x) {  // in every lane
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <class A> __device__ __forceinline__ A warp_max(A x) {  // in every lane; a NaN is left out
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x || x != x ? other : x;
  }
  return x;
}

// Adds each lane's N values over the warps of the block, first to last; the first warp has the result. All threads call.
template <int kWarps, int N, class A> __device__ __forceinline__ void add_warps(A (&sum)[N]) {
  __shared__ A of_warp[kWarps][N][kWarp];
#pragma unroll
  for (int j = 0; j < N; j++) of_warp[warp()][j][lane()] = sum[j];
  __syncthreads();
  if (warp() == 0)
    for (int w = 1; w < kWarps; w++)
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += of_warp[w][j][lane()];
  __syncthreads();  // the next call writes there
}

// ---- indices

__device__ __forceinline__ bool is_index(int64_t id, int64_t size) { return uint64_t(id) < uint64_t(size); }

// Keeps the smallest flat position of a bad index. kOk is -1, the largest of unsigned numbers.
__device__ __forceinline__ void report_bad(int64_t* bad_id, int64_t position) {
  static_assert(kOk == -1, "atomicMin relies on it");
  if (bad_id) atomicMin(reinterpret_cast<unsigned long long*>(bad_id), static_cast<unsigned long long>(position));
}

}  // namespace fvm::cuda
