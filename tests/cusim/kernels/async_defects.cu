// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies, ldmatrix and mma, with one mistake each. n = 128; x holds integers, so that halves are exact.
#include "defects.h"

namespace {

using bf16 = __nv_bfloat16;

// 32 threads copy 4 floats each into the tile.
__device__ __forceinline__ void copy_four(float* tile, const float* x) {
  fvm::cp_async<16>(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
}

template <bool kRight> __global__ void missing_wait(const float* x, float* out) {
  __shared__ __align__(16) float tile[128];
  copy_four(tile, x);
  fvm::cp_async_commit();
  if constexpr (kRight) fvm::cp_async_wait<0>();
  __syncwarp();
  for (int i = threadIdx.x; i < 128; i += 32) out[i] = tile[127 - i];
  fvm::cp_async_wait<0>();
}

// Two groups under way, of which the second is needed too.
template <bool kRight> __global__ void wait_for_too_few(const float* x, float* out) {
  __shared__ __align__(16) float tile[128];
  for (int part = 0; part < 2; part++) {
    if (threadIdx.x / 16 == part) copy_four(tile, x);
    fvm::cp_async_commit();
  }
  fvm::cp_async_wait<kRight ? 0 : 1>();
  __syncwarp();
  for (int i = threadIdx.x; i < 128; i += 32) out[i] = tile[127 - i];
  fvm::cp_async_wait<0>();
}

// The wait is for this thread's copies only.
template <bool kRight> __global__ void wait_without_barrier(const float* x, float* out) {
  __shared__ __align__(16) float tile[128];
  copy_four(tile, x);
  fvm::cp_async_commit();
  fvm::cp_async_wait<0>();
  if constexpr (kRight) __syncwarp();
  for (int i = threadIdx.x; i < 128; i += 32) out[i] = tile[127 - i];
}

template <bool kRight> __global__ void returns_with_a_copy_under_way(const float* x, float* out) {
  __shared__ __align__(16) float tile[128];
  for (int i = threadIdx.x; i < 128; i += 32) out[i] = x[127 - i];
  copy_four(tile, x);
  fvm::cp_async_commit();
  if constexpr (kRight) fvm::cp_async_wait<0>();
}

template <bool kRight> __global__ void misaligned_copy(const float* x, float* out) {
  __shared__ __align__(16) float tile[132];
  fvm::cp_async<16>(tile + (kRight ? 0 : 2) + 4 * threadIdx.x, x + 4 * threadIdx.x);
  fvm::cp_async_commit();
  fvm::cp_async_wait<0>();
  __syncwarp();
  for (int i = threadIdx.x; i < 128; i += 32) out[i] = tile[(kRight ? 0 : 2) + 127 - i];
}

// out = turn x turned: a is the 16 x 16 matrix that turns rows around, b is x as 16 x 8; columns turn at the store.
template <class F> __device__ __forceinline__ void turn_by_mma(const float* x, float* out, F&& multiply) {
  __shared__ __align__(16) bf16 a[16][16], b[16][8];
  for (int i = threadIdx.x; i < 256; i += 32) a[i / 16][i % 16] = __float2bfloat16_rn(i / 16 + i % 16 == 15 ? 1 : 0);
  for (int i = threadIdx.x; i < 128; i += 32) b[i / 8][i % 8] = __float2bfloat16_rn(x[i]);
  __syncwarp();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t of_a[4], of_b[2];
  fvm::ldmatrix<4>(of_a, &a[lane % 16][lane / 16 * 8]);
  fvm::ldmatrix<2, true>(of_b, &b[lane % 16][0]);
  float d[4] = {};
  multiply(d, of_a, of_b);
  for (int i = 0; i < 4; i++) out[8 * (g + i / 2 * 8) + 7 - (2 * t + i % 2)] = d[i];
}

template <bool kRight> __global__ void swapped_fragments(const float* x, float* out) {
  turn_by_mma(x, out, [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    fvm::mma_m16n8k16<bf16>(d, a, b[kRight ? 0 : 1], b[kRight ? 1 : 0]);
  });
}

template <bool kRight> __global__ void mma_in_a_branch(const float* x, float* out) {
  turn_by_mma(x, out, [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if (kRight || threadIdx.x < 16) fvm::mma_m16n8k16<bf16>(d, a, b[0], b[1]);
  });
}

template <bool kRight> __global__ void mma_in_half_a_warp(const float* x, float* out) {
  if (!kRight && threadIdx.x >= 16) return;
  turn_by_mma(x, out, [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    fvm::mma_m16n8k16<bf16>(d, a, b[0], b[1]);
  });
}

template <bool kRight> __global__ void misaligned_rows_for_ldmatrix(const float* x, float* out) {
  __shared__ __align__(16) bf16 tile[16 * 12];
  constexpr int kRow = kRight ? 8 : 12;  // 24 bytes
  for (int i = threadIdx.x; i < 128; i += 32) tile[i / 8 * kRow + i % 8] = __float2bfloat16_rn(x[i]);
  __syncwarp();
  uint32_t both[2];
  fvm::ldmatrix<2>(both, &tile[threadIdx.x % 16 * kRow]);
  for (int m = 0; m < 2; m++)
    for (int half = 0; half < 2; half++)
      out[127 - (64 * m + 2 * threadIdx.x + half)] = __uint_as_float((both[m] >> 16 * half) << 16);
}

}  // namespace

extern "C" {

cudaError_t run_missing_wait(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(missing_wait, 1, 32, 0);
}
cudaError_t run_wait_for_too_few(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(wait_for_too_few, 1, 32, 0);
}
cudaError_t run_wait_without_barrier(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(wait_without_barrier, 1, 32, 0);
}
cudaError_t run_returns_with_a_copy_under_way(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(returns_with_a_copy_under_way, 1, 32, 0);
}
cudaError_t run_misaligned_copy(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(misaligned_copy, 1, 32, 0);
}
cudaError_t run_swapped_fragments(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(swapped_fragments, 1, 32, 0);
}
cudaError_t run_mma_in_a_branch(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(mma_in_a_branch, 1, 32, 0);
}
cudaError_t run_mma_in_half_a_warp(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(mma_in_half_a_warp, 1, 32, 0);
}
cudaError_t run_misaligned_rows_for_ldmatrix(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(misaligned_rows_for_ldmatrix, 1, 32, 0);
}

}  // extern "C"
