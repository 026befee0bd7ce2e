// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma with their registers laid open, so that a test can put them beside the published layouts.
#include "launch.cuh"
#include "primitives.cuh"

namespace {

// a [32, 4], b [32, 2] and c [32, 4] are what each lane holds.
template <class T> __global__ void mma(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int lane = threadIdx.x;
  uint32_t of_a[4];
  float d[4];
  for (int i = 0; i < 4; i++) of_a[i] = a[4 * lane + i];
  for (int i = 0; i < 4; i++) d[i] = c[4 * lane + i];
  fvm::mma_m16n8k16<T>(d, of_a, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; i++) out[4 * lane + i] = d[i];
}

// tiles [matrices, 8, 8] of 16-bit numbers; out [32, matrices] is what each lane receives
template <int kMatrices, bool kTransposed> __global__ void load_tiles(const uint4* tiles, uint32_t* out) {
  __shared__ uint4 rows[32];
  const int lane = threadIdx.x;
  if (lane < 8 * kMatrices) rows[lane] = tiles[lane];
  __syncwarp();
  uint32_t received[kMatrices];
  fvm::ldmatrix<kMatrices, kTransposed>(received, &rows[lane]);
  for (int i = 0; i < kMatrices; i++) out[kMatrices * lane + i] = received[i];
}

template <int kMatrices> cudaError_t launch_load(const void* tiles, uint32_t* out, bool transposed) {
  const uint4* rows = static_cast<const uint4*>(tiles);
  return transposed ? FVM_LAUNCH(load_tiles<kMatrices, true>, 1, 32, 0, nullptr, rows, out)
                    : FVM_LAUNCH(load_tiles<kMatrices, false>, 1, 32, 0, nullptr, rows, out);
}

// kBytes a thread, of which the last thread's are outside and become zero
template <int kBytes> __global__ void copy_async(const unsigned char* x, unsigned char* out) {
  unsigned char* shared = fvm::dynamic_shared<unsigned char>();
  const int at = threadIdx.x * kBytes;
  fvm::cp_async<kBytes>(shared + at, threadIdx.x < 31 ? x + at : x, threadIdx.x < 31);
  fvm::cp_async_commit();
  fvm::cp_async_wait<0>();
  __syncwarp();
  const int other = (31 - threadIdx.x) * kBytes;
  for (int i = 0; i < kBytes; i++) out[other + i] = shared[other + i];
}

__global__ void pack(const float* x, uint32_t* out) {  // x [32, 2], out [2, 32]
  const int lane = threadIdx.x;
  out[lane] = fvm::pack_halves<__nv_bfloat16>(x[2 * lane], x[2 * lane + 1]);
  out[32 + lane] = fvm::pack_halves<__half>(x[2 * lane], x[2 * lane + 1]);
}

}  // namespace

extern "C" {

cudaError_t run_mma(const void* a, const void* b, const float* c, float* out, bool bf16, cudaStream_t stream) {
  const auto *of_a = static_cast<const uint32_t*>(a), *of_b = static_cast<const uint32_t*>(b);
  return bf16 ? FVM_LAUNCH(mma<__nv_bfloat16>, 1, 32, 0, stream, of_a, of_b, c, out)
              : FVM_LAUNCH(mma<__half>, 1, 32, 0, stream, of_a, of_b, c, out);
}
cudaError_t run_ldmatrix(const void* tiles, void* out, int matrices, bool transposed) {
  uint32_t* to = static_cast<uint32_t*>(out);
  if (matrices == 1) return launch_load<1>(tiles, to, transposed);
  if (matrices == 2) return launch_load<2>(tiles, to, transposed);
  return launch_load<4>(tiles, to, transposed);
}
cudaError_t run_copy_async(const unsigned char* x, unsigned char* out, int bytes, cudaStream_t stream) {
  if (bytes == 4) return FVM_LAUNCH(copy_async<4>, 1, 32, 32 * 4, stream, x, out);
  if (bytes == 8) return FVM_LAUNCH(copy_async<8>, 1, 32, 32 * 8, stream, x, out);
  return FVM_LAUNCH(copy_async<16>, 1, 32, 32 * 16, stream, x, out);
}
cudaError_t run_pack(const float* x, void* out, cudaStream_t stream) {
  return FVM_LAUNCH(pack, 1, 32, 0, stream, x, static_cast<uint32_t*>(out));
}

}  // extern "C"
