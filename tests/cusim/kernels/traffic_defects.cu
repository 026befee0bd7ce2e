// SPDX-License-Identifier: Apache-2.0
// Right results, wasted traffic: what only the counters see. n = 1024.
#include "defects.h"

namespace {

template <bool kRight> __global__ void strided_loads(const float* x, float* out) {
  const int i = kRight ? threadIdx.x : threadIdx.x % 32 * 32 + threadIdx.x / 32;
  out[1023 - i] = x[i];
}

// A tile of 32 x 32, written by rows and read by columns: without the pad all lanes meet in one bank.
template <bool kRight> __global__ void bank_conflicts(const float* x, float* out) {
  __shared__ float tile[32][kRight ? 33 : 32];
  const int row = threadIdx.y, column = threadIdx.x;
  tile[column][row] = x[32 * row + column];
  __syncthreads();
  out[1023 - (32 * row + column)] = tile[column][row];
}

// Every value is fetched by two threads.
template <bool kRight> __global__ void reads_twice(const float* x, float* out) {
  const int i = threadIdx.x, partner = kRight ? 0 : i ^ 512;
  const float seen = kRight ? 0 : x[partner];
  out[1023 - i] = x[i] + (seen - seen);
}

}  // namespace

extern "C" {

cudaError_t run_strided_loads(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(strided_loads, 1, 1024, 0);
}
cudaError_t run_bank_conflicts(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(bank_conflicts, 1, dim3(32, 32), 0);
}
cudaError_t run_reads_twice(bool right, const float* x, float* out, cudaStream_t stream) {
  RUN(reads_twice, 1, 1024, 0);
}

}  // extern "C"
