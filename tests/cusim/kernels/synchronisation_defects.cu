// SPDX-License-Identifier: Apache-2.0
// Barriers and warp functions, with one mistake each. n = 128 unless a launcher says otherwise.
#include "defects.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <bool kRight> __global__ void missing_barrier(const float* x, float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  if constexpr (kRight) __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

// A sum in a tree, of which nothing is kept: the result is x turned around.
template <bool kRight> __global__ void missing_barrier_in_reduction(const float* x, float* out) {
  __shared__ float sums[128];
  const int i = threadIdx.x;
  sums[i] = x[i];
  for (int half = 64; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) sums[i] += sums[i + half];
  }
  if constexpr (kRight) __syncthreads();
  out[i] = x[127 - i] + (sums[0] - sums[0]);
}

// Two parts through one tile: the second must not be written before the first has been read.
template <bool kRight> __global__ void missing_barrier_before_reuse(const float* x, float* out) {
  __shared__ float tile[64];
  const int i = threadIdx.x;
  for (int part = 0; part < 2; part++) {
    tile[i] = x[64 * part + i];
    __syncthreads();
    out[64 * (1 - part) + i] = tile[63 - i];
    if constexpr (kRight) __syncthreads();
  }
}

template <bool kRight> __global__ void missing_warp_barrier(const float* x, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  if constexpr (kRight) __syncwarp();
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

// Each half of the warp waits for itself, and reads what the other wrote.
template <bool kRight> __global__ void warp_barrier_of_half(const float* x, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp(kRight ? kAll : threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

// A shuffle makes lanes wait for each other, but does not order what they wrote.
template <bool kRight> __global__ void shuffle_for_a_barrier(const float* x, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  __shfl_sync(kAll, 0, 0);
  if constexpr (kRight) __syncwarp();
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

// out[0], which is 0 before, receives the sum of the first four x.
template <bool kRight> __global__ void sum_without_atomic(const float* x, float* out) {
  if (threadIdx.x > 0) return;
  if constexpr (kRight)
    atomicAdd(out, x[blockIdx.x]);
  else
    *out = *out + x[blockIdx.x];
}

// Goes well where the block that writes happens to come first.
template <bool kRight> __global__ void block_reads_what_another_writes(const float* x, float* out) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  out[i] = x[127 - i];
  if (out[kRight ? i : (i + 64) % 128] < 0) out[i] = 0;
}

template <bool kRight> __global__ void barrier_in_a_branch(const float* x, float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  if constexpr (kRight)
    __syncthreads();
  else if (threadIdx.x < 64)
    __syncthreads();
  __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

template <bool kRight> __global__ void barrier_against_warp_barrier(const float* x, float* out) {
  out[threadIdx.x] = x[127 - threadIdx.x];
  if (kRight || threadIdx.x % 32 < 16)
    __syncwarp();
  else
    __syncthreads();
}

template <bool kRight> __global__ void shuffle_in_a_branch(const float* x, float* out) {
  float value = x[threadIdx.x];
  if constexpr (kRight)
    value = __shfl_xor_sync(kAll, value, 31);
  else if (threadIdx.x < 16)
    value = __shfl_xor_sync(kAll, value, 31);
  else
    value = __shfl_sync(kAll, value, 31 - threadIdx.x);
  out[threadIdx.x] = value;
}

// n = 20: twelve lanes have no value, and leave too early.
template <bool kRight> __global__ void shuffle_from_a_returned_lane(const float* x, float* out) {
  const int i = threadIdx.x;
  if (!kRight && i >= 20) return;
  const float value = __shfl_sync(kAll, i < 20 ? x[i] : 0, kRight ? 19 - i : 31 - i);
  if (i < 20) out[i] = kRight ? value : x[19 - i];
}

template <bool kRight> __global__ void lane_outside_its_mask(const float* x, float* out) {
  const float value = __shfl_xor_sync(kRight ? kAll : 0x7fffffffu, x[threadIdx.x], 31);
  out[threadIdx.x] = value;
}

}  // namespace

extern "C" {

cudaError_t run_missing_barrier(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(missing_barrier, 1, 128, 0);
}
cudaError_t run_missing_barrier_in_reduction(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(missing_barrier_in_reduction, 1, 128, 0);
}
cudaError_t run_missing_barrier_before_reuse(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(missing_barrier_before_reuse, 1, 64, 0);
}
cudaError_t run_missing_warp_barrier(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(missing_warp_barrier, 1, 32, 0);
}
cudaError_t run_warp_barrier_of_half(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(warp_barrier_of_half, 1, 32, 0);
}
cudaError_t run_shuffle_for_a_barrier(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(shuffle_for_a_barrier, 1, 32, 0);
}
cudaError_t run_sum_without_atomic(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(sum_without_atomic, 4, 32, 0);
}
cudaError_t run_block_reads_what_another_writes(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(block_reads_what_another_writes, 4, 32, 0);
}
cudaError_t run_barrier_in_a_branch(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(barrier_in_a_branch, 1, 128, 0);
}
cudaError_t run_barrier_against_warp_barrier(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(barrier_against_warp_barrier, 1, 128, 0);
}
cudaError_t run_shuffle_in_a_branch(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(shuffle_in_a_branch, 1, 32, 0);
}
cudaError_t run_shuffle_from_a_returned_lane(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(shuffle_from_a_returned_lane, 1, 32, 0);
}
cudaError_t run_lane_outside_its_mask(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(lane_outside_its_mask, 1, 32, 0);
}

}  // extern "C"
