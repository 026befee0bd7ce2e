// SPDX-License-Identifier: Apache-2.0
// One small kernel for each part of CUDA C++ that kernels use.
#include "launch.cuh"
#include "primitives.cuh"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void shuffles(const int* x, int* out, int width, int operand) {  // out [4, 32]
  const int lane = threadIdx.x, value = x[lane];
  out[lane] = __shfl_sync(kAll, value, operand, width);
  out[32 + lane] = __shfl_up_sync(kAll, value, operand, width);
  out[64 + lane] = __shfl_down_sync(kAll, value, operand, width);
  out[96 + lane] = __shfl_xor_sync(kAll, value, operand, width);
}

// Half-warps shuffle on their own, and wide values travel whole.
__global__ void shuffle_halves(const double* x, double* out) {  // out [32]
  const int lane = threadIdx.x;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  double value = x[lane];
  for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step);
  out[lane] = value;
}

__global__ void votes(const int* x, int* out) {  // out [7, threads]
  const int i = threadIdx.x, n = blockDim.x, p = x[i];
  out[i] = int(__ballot_sync(kAll, p));
  out[n + i] = __any_sync(kAll, p);
  out[2 * n + i] = __all_sync(kAll, p);
  out[3 * n + i] = int(__match_any_sync(kAll, p));
  out[4 * n + i] = __syncthreads_count(p);
  out[5 * n + i] = __syncthreads_or(p);
  out[6 * n + i] = __syncthreads_and(p);
}

// Every thread of a grid of three dimensions writes its flat number where it belongs.
__global__ void three_dimensions(int* out) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * threads + thread] = int(blockIdx.z * 100 + blockIdx.y * 10 + blockIdx.x) * 1000 +
                                  int(threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x);
}

// Atomics from all threads of all blocks into out [8], and into shared memory before.
__global__ void atomics(const int* x, int* out, double* sum, unsigned long long* smallest, int n) {
  __shared__ int of_block;
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    atomicAdd(&of_block, x[i]);
    atomicMin(&out[1], x[i]);
    atomicMax(&out[2], x[i]);
    atomicOr(&out[3], 1 << x[i] % 31);
    atomicAnd(&out[4], ~(1 << x[i] % 31));
    atomicAdd(sum, 0.5);
    atomicMin(smallest, static_cast<unsigned long long>(i + 5));
    int seen = atomicAdd(&out[5], 0);
    while (atomicCAS(&out[5], seen, seen + 2) != seen) seen = atomicAdd(&out[5], 0);
    atomicExch(&out[6], 7);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&out[0], of_block);
}

// Dynamic shared memory of any type, and a type and a size as template arguments.
template <class T, int kFactor> __global__ void turn_dynamic(const T* x, T* out, int n) {
  T* all = fvm::dynamic_shared<T>();
  for (int i = threadIdx.x; i < n; i += blockDim.x) all[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = T(kFactor) * all[n - 1 - i];
}

// Halves in shared memory, which g++ guards against being constructed twice.
template <class T> __global__ void turn_halves(const float* x, float* out) {
  __shared__ T tile[2][16];
  tile[threadIdx.x / 16][threadIdx.x % 16] = T(x[threadIdx.x]);
  __syncwarp();
  out[threadIdx.x] = float(tile[1 - threadIdx.x / 16][15 - threadIdx.x % 16]);
}

struct Numbers { int at[12]; };  // passed on the stack

__global__ void takes_a_struct(Numbers numbers, int* out) { out[threadIdx.x] = numbers.at[threadIdx.x]; }

__global__ void integers(const int* x, int* out) {  // out [4, 32]
  const int i = threadIdx.x;
  out[i] = __popc(x[i]);
  out[32 + i] = __clz(x[i]);
  out[64 + i] = __ffs(x[i]);
  out[96 + i] = int(__umulhi(unsigned(x[i]), 0x80000000u));
}

// A counter that grows with each block: legal, as atomics need no order; what others wrote would be.
__global__ void copy_by_bytes(const unsigned char* x, unsigned char* out, int n) {
  if (threadIdx.x == 0) memcpy(out, x, n);
}

}  // namespace

extern "C" {

cudaError_t run_shuffles(const int* x, int* out, int width, int operand, cudaStream_t stream) {
  return FVM_LAUNCH(shuffles, 1, 32, 0, stream, x, out, width, operand);
}
cudaError_t run_shuffle_halves(const double* x, double* out, cudaStream_t stream) {
  return FVM_LAUNCH(shuffle_halves, 1, 32, 0, stream, x, out);
}
cudaError_t run_votes(const int* x, int* out, int threads, cudaStream_t stream) {
  return FVM_LAUNCH(votes, 1, threads, 0, stream, x, out);
}
cudaError_t run_three_dimensions(int* out, cudaStream_t stream) {
  return FVM_LAUNCH(three_dimensions, fvm::Grid(2, 3, 4), dim3(5, 3, 2), 0, stream, out);
}
cudaError_t run_atomics(const int* x, int* out, double* sum, unsigned long long* smallest, int n, cudaStream_t stream) {
  return FVM_LAUNCH(atomics, (n + 31) / 32, 32, 0, stream, x, out, sum, smallest, n);
}
cudaError_t run_turn_dynamic_f64(const double* x, double* out, int n, cudaStream_t stream) {
  return FVM_LAUNCH(turn_dynamic<double, 3>, 1, 64, n * sizeof(double), stream, x, out, n);
}
cudaError_t run_turn_dynamic_i32(const int* x, int* out, int n, cudaStream_t stream) {
  return FVM_LAUNCH(turn_dynamic<int, 2>, 1, 64, n * sizeof(int), stream, x, out, n);
}
cudaError_t run_turn_halves(const float* x, float* out, bool bf16, cudaStream_t stream) {
  return bf16 ? FVM_LAUNCH(turn_halves<__nv_bfloat16>, 1, 32, 0, stream, x, out)
              : FVM_LAUNCH(turn_halves<__half>, 1, 32, 0, stream, x, out);
}
cudaError_t run_takes_a_struct(int* out, cudaStream_t stream) {
  Numbers numbers;
  for (int i = 0; i < 12; i++) numbers.at[i] = 7 * i;
  return FVM_LAUNCH(takes_a_struct, 1, 12, 0, stream, numbers, out);
}
cudaError_t run_integers(const int* x, int* out, cudaStream_t stream) {
  return FVM_LAUNCH(integers, 1, 32, 0, stream, x, out);
}
cudaError_t run_copy_by_bytes(const unsigned char* x, unsigned char* out, int n, cudaStream_t stream) {
  return FVM_LAUNCH(copy_by_bytes, 1, 32, 0, stream, x, out, n);
}
cudaError_t run_memset(float* out, size_t bytes, cudaStream_t stream) { return cudaMemsetAsync(out, 0, bytes, stream); }
cudaError_t run_empty_grid(float* out, int64_t blocks, cudaStream_t stream) {
  return FVM_LAUNCH(copy_by_bytes, blocks, 32, 0, stream, nullptr, reinterpret_cast<unsigned char*>(out), 0);
}

}  // extern "C"
