// SPDX-License-Identifier: Apache-2.0
// The one way to start a kernel: FVM_LAUNCH(kernel, grid, block, shared_bytes, stream, args...) returns a cudaError_t.
// Grid sizes are checked before they are narrowed, dynamic shared memory above 48 KB is asked for, and what the launch
// itself refused is in the result. Nothing is allocated and nothing waits, so a launch can be captured into a graph.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fvm {

// Blocks of a launch, in 64 bits: dim3 would cut a count above 2^32 silently.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
  constexpr Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
  constexpr Grid(dim3 grid) : x(grid.x), y(grid.y), z(grid.z) {}
};

constexpr int64_t kMaxGridX = (int64_t(1) << 31) - 1, kMaxGridYZ = 65535;  // of every device since sm_30
constexpr int64_t kMaxThreads = 1024, kMaxBlockZ = 64;                     // of a block

inline bool fits(Grid g, dim3 b) {
  return g.x >= 0 && g.y >= 0 && g.z >= 0 && g.x <= kMaxGridX && g.y <= kMaxGridYZ && g.z <= kMaxGridYZ &&
         b.z <= kMaxBlockZ && int64_t(b.x) * b.y * b.z >= 1 && int64_t(b.x) * b.y * b.z <= kMaxThreads;
}

// Up to 48 KB of shared memory, static and dynamic, need no leave. A kernel that wants more gets leave for all that the
// device has: with the size of one launch, two threads that launch it with different sizes would undo each other's.
constexpr size_t kSharedWithoutLeave = 32 << 10;  // dynamic; the rest of the 48 KB is for static arrays

inline cudaError_t allow_all_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  most -= int(attributes.sharedSizeBytes);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <class T> struct Same { using type = T; };  // keeps T out of deduction: the kernel alone says its types

// A grid without blocks is legal here and does nothing.
template <class... P>
cudaError_t launch(void (*kernel)(P...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   typename Same<P>::type... args) {
  if (!fits(grid, block)) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > kSharedWithoutLeave) {
    const cudaError_t error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  const dim3 blocks(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
#ifdef FVM_CUSIM
  cusim::launch(kernel, blocks, block, shared_bytes, stream, args...);
#else
  // clang-format off: it would part the brackets
  kernel<<<blocks, block, shared_bytes, stream>>>(args...);
  // clang-format on
#endif
  return cudaGetLastError();
}

}  // namespace fvm

// A macro only for the looks of it: a kernel's template arguments may hold commas, and the grid may be {blocks, heads}.
#define FVM_LAUNCH(...) ::fvm::launch(__VA_ARGS__)
