// SPDX-License-Identifier: Apache-2.0
// Accesses whose traffic can be counted by hand. One warp; out and x are floats.
#include "launch.cuh"
#include "primitives.cuh"

namespace {

__global__ void one_a_lane(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x]; }

__global__ void four_a_lane(const float4* x, float4* out) { out[threadIdx.x] = x[threadIdx.x]; }

__global__ void same_for_all(const float* x, float* out) { out[threadIdx.x] = x[0]; }

__global__ void every(const float* x, float* out, int stride) { out[threadIdx.x] = x[stride * threadIdx.x]; }

// Two passes over n values, 32 at a time.
__global__ void two_passes(const float* x, float* out, int n) {
  float sum = 0;
  for (int pass = 0; pass < 2; pass++)
    for (int i = threadIdx.x; i < n; i += 32) sum += x[i];
  out[threadIdx.x] = sum;
}

// Writes words of shared memory `stride` apart, then reads them back.
__global__ void banks(const float* x, float* out, int stride) {
  float* tile = fvm::dynamic_shared<float>();
  tile[stride * threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[stride * threadIdx.x];
}

__global__ void wide_banks(const float4* x, float4* out, int stride) {  // rows of `stride` float4
  float4* tile = fvm::dynamic_shared<float4>();
  tile[stride * threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[stride * threadIdx.x];
}

// Rows of 16 bytes at distances of `row` halves, as ldmatrix reads them.
__global__ void tiles(const uint4* x, float* out, int row) {
  __half* tile = fvm::dynamic_shared<__half>();
  *reinterpret_cast<uint4*>(tile + row * threadIdx.x) = x[threadIdx.x];
  __syncwarp();
  uint32_t received[4];
  fvm::ldmatrix<4>(received, tile + row * threadIdx.x);
  out[threadIdx.x] = float(received[0] + received[1] + received[2] + received[3]);
}

}  // namespace

extern "C" {

cudaError_t run_one_a_lane(const float* x, float* out, int64_t offset, cudaStream_t stream) {
  return FVM_LAUNCH(one_a_lane, 1, 32, 0, stream, x + offset, out);
}
cudaError_t run_four_a_lane(const float* x, float* out, cudaStream_t stream) {
  return FVM_LAUNCH(four_a_lane, 1, 32, 0, stream, reinterpret_cast<const float4*>(x), reinterpret_cast<float4*>(out));
}
cudaError_t run_same_for_all(const float* x, float* out, cudaStream_t stream) {
  return FVM_LAUNCH(same_for_all, 1, 32, 0, stream, x, out);
}
cudaError_t run_every(const float* x, float* out, int stride, cudaStream_t stream) {
  return FVM_LAUNCH(every, 1, 32, 0, stream, x, out, stride);
}
cudaError_t run_two_passes(const float* x, float* out, int n, cudaStream_t stream) {
  return FVM_LAUNCH(two_passes, 1, 32, 0, stream, x, out, n);
}
cudaError_t run_banks(const float* x, float* out, int stride, cudaStream_t stream) {
  return FVM_LAUNCH(banks, 1, 32, 32 * stride * sizeof(float), stream, x, out, stride);
}
cudaError_t run_wide_banks(const float* x, float* out, int stride, cudaStream_t stream) {
  return FVM_LAUNCH(wide_banks, 1, 32, 32 * stride * sizeof(float4), stream, reinterpret_cast<const float4*>(x),
                    reinterpret_cast<float4*>(out), stride);
}
cudaError_t run_tiles(const float* x, float* out, int row, cudaStream_t stream) {
  return FVM_LAUNCH(tiles, 1, 32, 32 * row * 2, stream, reinterpret_cast<const uint4*>(x), out, row);
}

}  // extern "C"
