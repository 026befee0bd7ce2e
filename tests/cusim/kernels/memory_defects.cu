// SPDX-License-Identifier: Apache-2.0
// Addresses, contents and launches, with one mistake each. n = 128 unless a launcher says otherwise.
#include "defects.h"

namespace {

// n = 100, which the blocks of 32 do not divide.
template <bool kRight> __global__ void one_too_many(const float* x, float* out) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (kRight ? i < 100 : i <= 100) out[i] = x[kRight ? 99 - i : (200 - i) % 101];
}

template <bool kRight> __global__ void before_the_start(const float* x, float* out) {
  out[127 - int(threadIdx.x) - (kRight ? 0 : 1)] = x[threadIdx.x];
}

// Far behind its end is another buffer on a real machine.
template <bool kRight> __global__ void far_behind_the_end(const float* x, float* out) {
  out[threadIdx.x] = x[127 - threadIdx.x + (kRight ? 0 : 100000)];
}

template <bool kRight> __global__ void dynamic_shared_too_small(const float* x, float* out) {
  float* tile = fvm::dynamic_shared<float>();
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

// The second half lands in the other array, where it happens to be looked for.
template <bool kRight> __global__ void behind_a_shared_array(const float* x, float* out) {
  __shared__ float first[64], second[64];
  const int i = threadIdx.x;
  if (kRight && i >= 64)
    second[i - 64] = x[i];
  else
    first[i] = x[i];
  __syncthreads();
  out[i] = i < 64 ? second[63 - i] : first[127 - i];
}

template <bool kRight> __global__ void behind_a_local_array(const float* x, float* out) {
  float four[4];
  for (int i = 0; i < 4; i++) four[i] = x[4 * threadIdx.x + i];
  const int last = kRight ? 3 : 3 + int(x[0]);
  for (int i = 0; i < 4; i++) out[124 - 4 * threadIdx.x + i] = four[last - i];
}

template <bool kRight> __global__ void adds_to_blank_output(const float* x, float* out) {
  if constexpr (kRight) out[threadIdx.x] = 0;
  out[threadIdx.x] += x[127 - threadIdx.x];
}

template <bool kRight> __global__ void blank_shared(const float* x, float* out) {
  __shared__ float tile[128];
  if (threadIdx.x < (kRight ? 128 : 127)) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

template <bool kRight> __global__ void forgets_the_last(const float* x, float* out) {
  if (kRight || threadIdx.x < 127) out[threadIdx.x] = x[127 - threadIdx.x];
}

template <bool kRight> __global__ void misaligned_vector(const float* x, float* out) {
  const int i = 4 * threadIdx.x;
  if (!kRight && threadIdx.x == 31) return;
  const float4 four = *reinterpret_cast<const float4*>(x + i + (kRight ? 0 : 1));
  *reinterpret_cast<float4*>(out + 124 - i) = make_float4(four.w, four.z, four.y, four.x);
}

template <bool kRight> __global__ void writes_to_its_input(const float* x, float* out) {
  out[threadIdx.x] = x[127 - threadIdx.x];
  if constexpr (!kRight) const_cast<float*>(x)[127 - threadIdx.x] = 0;
}

template <bool kRight> __global__ void turn_around(const float* x, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < 128) out[i] = x[127 - i];
}

// 20 KB of static shared memory.
template <bool kRight> __global__ void static_and_dynamic_shared(const float* x, float* out) {
  __shared__ float rows[40][128];
  for (int row = 0; row < 40; row++) rows[row][threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = rows[39][127 - threadIdx.x];
}

}  // namespace

extern "C" {

cudaError_t run_one_too_many(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(one_too_many, 4, 32, 0);
}
cudaError_t run_before_the_start(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(before_the_start, 1, 128, 0);
}
cudaError_t run_far_behind_the_end(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(far_behind_the_end, 1, 128, 0);
}
cudaError_t run_dynamic_shared_too_small(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(dynamic_shared_too_small, 1, 128, right ? 512 : 508);
}
cudaError_t run_behind_a_shared_array(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(behind_a_shared_array, 1, 128, 0);
}
cudaError_t run_behind_a_local_array(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(behind_a_local_array, 1, 32, 0);
}
cudaError_t run_adds_to_blank_output(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(adds_to_blank_output, 1, 128, 0);
}
cudaError_t run_blank_shared(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(blank_shared, 1, 128, 0);
}
cudaError_t run_forgets_the_last(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(forgets_the_last, 1, 128, 0);
}
cudaError_t run_misaligned_vector(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(misaligned_vector, 1, 32, 0);
}
cudaError_t run_writes_to_its_input(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(writes_to_its_input, 1, 128, 0);
}
cudaError_t run_block_too_large(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(turn_around, 1, right ? 1024 : 1056, 0);
}
cudaError_t run_grid_too_high(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(turn_around, fvm::Grid(1, right ? 1 : 65536), 128, 0);
}
cudaError_t run_shared_beyond_the_device(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(turn_around, 1, 128, (right ? 99 : 100) << 10);
}
cudaError_t run_static_and_dynamic_shared(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(static_and_dynamic_shared, 1, 128, (right ? 28 : 29) << 10);
}

// What FVM_LAUNCH does for others, forgotten here.
cudaError_t run_large_shared_without_leave(bool right, const float* x, float* out, cudaStream_t stream) {
  if (right) return FVM_LAUNCH(turn_around<true>, 1, 128, 60000, stream, x, out);
  cusim::launch(turn_around<false>, dim3(1), dim3(128), 60000, stream, x, out);
  return cudaGetLastError();
}

}  // extern "C"
