// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime's interface that launchers call, for one device with the limits that sm_80 to sm_120
// share.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstring>

#include "emulation.h"
#include "report.h"

namespace {

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) cusim::last_error = error;
  return error;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = cusim::last_error;
  cusim::last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return cusim::last_error; }

const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorInvalidValue) return "invalid argument";
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  if (error == cudaErrorIllegalAddress) return "the emulator cut the launch short; see its findings";
  return "an error";
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(cusim::kSharedOptIn); return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(cusim::kSharedDefault); return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 3;
      return cudaSuccess;  // few and odd, so that tests see partial waves
    case cudaDevAttrComputeCapabilityMajor: *value = 8; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = cusim::kLanes; return cudaSuccess;
    default: return remember(cudaErrorInvalidValue);
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(static_cast<void*>(attributes), 0, sizeof *attributes);  // static shared memory is looked at after the fact
  attributes->maxThreadsPerBlock = cusim::kMaxThreads;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > cusim::kSharedOptIn) return remember(cudaErrorInvalidValue);
  cusim::allow_shared(kernel, size_t(value));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 1, cudaSuccess;
}

// A launch of its own, of one block: 32 threads store 16 bytes each at a time.
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  auto kernel = [](std::byte* to, int value, size_t bytes) {
    for (size_t at = 16 * cusim::thread_index().x; at < bytes; at += 512) {
      const size_t n = bytes - at < 16 ? bytes - at : 16;
      cusim::touch_range(nullptr, to + at, n, cusim::Access::write);
      memset(to + at, value, n);
    }
  };
  void (*function)(std::byte*, int, size_t) = kernel;
  if (bytes > 0) cusim::launch(function, dim3(1), dim3(32), 0, stream, static_cast<std::byte*>(to), value, bytes);
  return cusim::last_error;
}

}  // extern "C"

// ---- What emulator.py calls

// Room for buffers, of which only what is touched takes memory.
extern "C" void* cusim_place(size_t bytes) {
  void* room = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return room == MAP_FAILED ? nullptr : room;
}
extern "C" void cusim_unplace(void* room, size_t bytes) { munmap(room, bytes); }

// Where the library was loaded, to which the addresses in its debug information are relative.
extern "C" size_t cusim_start() {
  Dl_info library;
  dladdr(reinterpret_cast<void*>(&cusim_start), &library);
  return reinterpret_cast<size_t>(library.dli_fbase);
}

extern "C" void cusim_configure(int schedule, uint32_t seed, int check) {
  cusim::config = {cusim::Schedule(schedule), seed, check != 0};
}

extern "C" void cusim_clear() {
  cusim::clear_findings();
  cusim::clear_traffic();
  cusim::forget_allowances();
  cusim::last_error = cudaSuccess;
}
