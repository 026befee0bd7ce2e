// SPDX-License-Identifier: Apache-2.0
// CUDA C++ for g++: included before every .cu file, it gives the keywords, built-in variables and functions of device
// code a meaning on the CPU. Types (dim3, float4, __half, ...) come from the toolkit's own headers in host mode.
//
// `__shared__` becomes thread_local: inside a function that means one instance, `extern __shared__ T x[]` parses as
// well, and as all threads of a block run on one OS thread, the library's thread-local storage is exactly the shared
// memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ thread_local
// As with nvcc, a kernel has everything inlined. The detector needs it: it does not see what a called function returns
// straight into memory, and finds the kernel's line in the chain of inlined functions.
#define __global__ __attribute__((noinline, flatten))
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define warpSize 32
#define threadIdx (cusim::thread_index())
#define blockIdx (cusim::block_index())
#define blockDim (cusim::block_dim())
#define gridDim (cusim::grid_dim())

// Where a function was called from, as the defaults of its last two parameters; and always inlined, so that the return
// address of what it calls lies in the kernel.
#define CUSIM_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CUSIM_INLINE inline __attribute__((always_inline))

namespace cusim {

enum class Access : int { read = 0, write = 1, atomic = 2 };
enum class Vote : int { none = 0, any = 1, all = 2, count = 3 };
enum class Shuffle : int { index = 0, up = 1, down = 2, exclusive_or = 3 };

// Constant for a fiber, which is why the compiler may keep them.
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
dim3 block_dim() __attribute__((const));
dim3 grid_dim() __attribute__((const));

int barrier(int predicate, Vote vote, const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);
unsigned ballot(unsigned mask, int predicate, const char* file, int line);
unsigned match_any(unsigned mask, uint64_t value, const char* file, int line);
void shuffle(unsigned mask, Shuffle how, int operand, int width, void* value, unsigned bytes, const char* file,
             int line);
unsigned active_lanes();

void cp_async(void* shared, const void* global, int bytes, int from_global);
void cp_async_commit();
void cp_async_wait(int groups_under_way);
void ldmatrix(uint32_t* tiles, const void* row, int matrices, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16);

// What a plain access at `pc` would be.
void touch(const void* pc, const void* address, unsigned bytes, Access access);
void touch_range(const void* pc, const void* address, size_t bytes, Access access);

// Runs every block of the grid; what was wrong is in the findings, and in cudaGetLastError when the launch was cut
// short.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
         const void* arguments, size_t arguments_bytes);

template <class T> struct Same { using type = T; };
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            typename Same<P>::type... args) {
  auto body = [=] { kernel(args...); };
  run(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* closure) { (*static_cast<const decltype(body)*>(closure))(); }, &body, sizeof body);
}

template <class T> CUSIM_INLINE T shuffled(unsigned mask, T value, Shuffle how, int operand, int width,
                                           const char* file, int line) {
  static_assert(sizeof(T) <= 16, "a shuffle moves up to 16 bytes");
  shuffle(mask, how, operand, width, &value, sizeof(T), file, line);
  return value;
}

// Atomics: nothing else runs meanwhile, so a plain update does; `touch` tells the detector.
template <class T, class F> __attribute__((no_sanitize("thread"), noinline)) T update(T* p, F f) {
  touch(__builtin_return_address(0), p, sizeof(T), Access::atomic);
  const T old = *p;
  *p = f(old);
  return old;
}

__attribute__((no_sanitize("thread"), noinline)) inline void* copy_bytes(void* to, const void* from, size_t bytes) {
  touch_range(__builtin_return_address(0), from, bytes, Access::read);
  touch_range(__builtin_return_address(0), to, bytes, Access::write);
  return ::memcpy(to, from, bytes);
}
__attribute__((no_sanitize("thread"), noinline)) inline void* set_bytes(void* to, int value, size_t bytes) {
  touch_range(__builtin_return_address(0), to, bytes, Access::write);
  return ::memset(to, value, bytes);
}

}  // namespace cusim

// ---- Barriers and warp functions

CUSIM_INLINE void __syncthreads(CUSIM_FROM) { cusim::barrier(0, cusim::Vote::none, file, line); }
CUSIM_INLINE int __syncthreads_or(int p, CUSIM_FROM) { return cusim::barrier(p, cusim::Vote::any, file, line); }
CUSIM_INLINE int __syncthreads_and(int p, CUSIM_FROM) { return cusim::barrier(p, cusim::Vote::all, file, line); }
CUSIM_INLINE int __syncthreads_count(int p, CUSIM_FROM) { return cusim::barrier(p, cusim::Vote::count, file, line); }
CUSIM_INLINE void __syncwarp(unsigned mask = 0xffffffffu, CUSIM_FROM) { cusim::warp_barrier(mask, file, line); }
CUSIM_INLINE unsigned __activemask() { return cusim::active_lanes(); }
CUSIM_INLINE unsigned __ballot_sync(unsigned mask, int p, CUSIM_FROM) { return cusim::ballot(mask, p, file, line); }
CUSIM_INLINE int __any_sync(unsigned mask, int p, CUSIM_FROM) { return cusim::ballot(mask, p, file, line) != 0; }
CUSIM_INLINE int __all_sync(unsigned mask, int p, CUSIM_FROM) { return cusim::ballot(mask, p, file, line) == mask; }

template <class T> CUSIM_INLINE unsigned __match_any_sync(unsigned mask, T value, CUSIM_FROM) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "values of 4 or 8 bytes are matched");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return cusim::match_any(mask, bits, file, line);
}

template <class T> CUSIM_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUSIM_FROM) {
  return cusim::shuffled(mask, value, cusim::Shuffle::index, lane, width, file, line);
}
template <class T> CUSIM_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUSIM_FROM) {
  return cusim::shuffled(mask, value, cusim::Shuffle::up, int(delta), width, file, line);
}
template <class T> CUSIM_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUSIM_FROM) {
  return cusim::shuffled(mask, value, cusim::Shuffle::down, int(delta), width, file, line);
}
template <class T> CUSIM_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUSIM_FROM) {
  return cusim::shuffled(mask, value, cusim::Shuffle::exclusive_or, lanes, width, file, line);
}

// Fences order nothing here: what needs one between blocks is reported as a race, use a second launch.
CUSIM_INLINE void __threadfence() {}
CUSIM_INLINE void __threadfence_block() {}

// ---- Atomics

template <class T> CUSIM_INLINE T atomicAdd(T* p, typename cusim::Same<T>::type v) {
  return cusim::update(p, [=](T old) { return T(old + v); });
}
template <class T> CUSIM_INLINE T atomicMin(T* p, typename cusim::Same<T>::type v) {
  return cusim::update(p, [=](T old) { return v < old ? v : old; });
}
template <class T> CUSIM_INLINE T atomicMax(T* p, typename cusim::Same<T>::type v) {
  return cusim::update(p, [=](T old) { return v > old ? v : old; });
}
template <class T> CUSIM_INLINE T atomicAnd(T* p, typename cusim::Same<T>::type v) {
  return cusim::update(p, [=](T old) { return old & v; });
}
template <class T> CUSIM_INLINE T atomicOr(T* p, typename cusim::Same<T>::type v) {
  return cusim::update(p, [=](T old) { return old | v; });
}
template <class T> CUSIM_INLINE T atomicExch(T* p, typename cusim::Same<T>::type v) {
  return cusim::update(p, [=](T) { return v; });
}
template <class T> CUSIM_INLINE T atomicCAS(T* p, typename cusim::Same<T>::type expected,
                                            typename cusim::Same<T>::type v) {
  return cusim::update(p, [=](T old) { return old == expected ? v : old; });
}

// ---- Arithmetic that is built into device code

template <class T> CUSIM_INLINE T __ldg(const T* p) { return *p; }
template <class T> CUSIM_INLINE void __stcs(T* p, typename cusim::Same<T>::type v) { *p = v; }
template <class T> CUSIM_INLINE T __ldcs(const T* p) { return *p; }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
CUSIM_INLINE float __expf(float x) { return ::expf(x); }
CUSIM_INLINE float __logf(float x) { return ::logf(x); }
CUSIM_INLINE float __exp10f(float x) { return ::powf(10.0f, x); }
CUSIM_INLINE float __fdividef(float a, float b) { return a / b; }
CUSIM_INLINE float __frcp_rn(float x) { return 1.0f / x; }
CUSIM_INLINE float __fsqrt_rn(float x) { return ::sqrtf(x); }
CUSIM_INLINE float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
CUSIM_INLINE float __fmul_rn(float a, float b) { return a * b; }
CUSIM_INLINE float __fadd_rn(float a, float b) { return a + b; }
CUSIM_INLINE float rsqrtf(float x) { return 1.0f / ::sqrtf(x); }
CUSIM_INLINE double rsqrt(double x) { return 1.0 / ::sqrt(x); }
CUSIM_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
CUSIM_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CUSIM_INLINE int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
CUSIM_INLINE int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
CUSIM_INLINE int __ffs(int x) { return __builtin_ffs(x); }
CUSIM_INLINE unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
CUSIM_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
template <class To, class From> To cusim_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
CUSIM_INLINE unsigned __float_as_uint(float x) { return cusim_bits<unsigned>(x); }
CUSIM_INLINE int __float_as_int(float x) { return cusim_bits<int>(x); }
CUSIM_INLINE float __uint_as_float(unsigned x) { return cusim_bits<float>(x); }
CUSIM_INLINE float __int_as_float(int x) { return cusim_bits<float>(x); }
CUSIM_INLINE long long __double_as_longlong(double x) { return cusim_bits<long long>(x); }
CUSIM_INLINE double __longlong_as_double(long long x) { return cusim_bits<double>(x); }

// g++ does not instrument calls of these; from here on the detector sees them.
namespace std {
using cusim::copy_bytes;
using cusim::set_bytes;
}  // namespace std
using cusim::copy_bytes;
using cusim::set_bytes;
#define memcpy copy_bytes
#define memset set_bytes
