// SPDX-License-Identifier: Apache-2.0
// What the hardware offers beyond CUDA C++, at the level of sm_80: asynchronous copies into shared memory, ldmatrix and
// the tensor cores. The only file with inline PTX; under FVM_CUSIM each function is its emulated twin (tests/cusim).
// Layouts are those of the PTX manual, "Warp-level matrix instructions".
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fvm {

// The dynamic shared memory of the block. Every kernel takes it from here, so that it has one name in a library.
template <class T> __device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// ---- Asynchronous copies: copy, commit a group, wait until at most N groups are under way, then __syncthreads

// Copies kBytes (4, 8 or 16; both addresses are multiples of it), or writes zeros when `inside` is false and reads
// nothing. Copies of 16 bytes bypass L1.
template <int kBytes> __device__ __forceinline__ void cp_async(void* shared, const void* global, bool inside = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async moves 4, 8 or 16 bytes");
  const int from_global = inside ? kBytes : 0;
#ifdef FVM_CUSIM
  cusim::cp_async(shared, global, kBytes, from_global);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(from_global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(from_global)
                 : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef FVM_CUSIM
  cusim::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// This thread's copies of all but the newest N groups have arrived.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifdef FVM_CUSIM
  cusim::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- ldmatrix: kMatrices (1, 2 or 4) tiles of 8 x 8 halves from shared memory

// Lane 8 m + r gives the address of row r of tile m (16 bytes, a multiple of 16; the rest of the lanes' are ignored).
// Lane l receives of each tile the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or of column l / 4 when
// kTransposed.
template <int kMatrices, bool kTransposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&tiles)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "ldmatrix loads 1, 2 or 4 tiles");
#ifdef FVM_CUSIM
  cusim::ldmatrix(tiles, row, kMatrices, kTransposed);
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
#define FVM_LDMATRIX(shape, outputs, address, ...)                                                   \
  if constexpr (kTransposed)                                                                         \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16 " outputs ", [" address "];" \
                 : __VA_ARGS__                                                                       \
                 : "r"(from)                                                                         \
                 : "memory");                                                                        \
  else                                                                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".shared.b16 " outputs ", [" address "];"       \
                 : __VA_ARGS__                                                                       \
                 : "r"(from)                                                                         \
                 : "memory")
  if constexpr (kMatrices == 1) {
    FVM_LDMATRIX("x1", "{%0}", "%1", "=r"(tiles[0]));
  } else if constexpr (kMatrices == 2) {
    FVM_LDMATRIX("x2", "{%0, %1}", "%2", "=r"(tiles[0]), "=r"(tiles[1]));
  } else {
    FVM_LDMATRIX("x4", "{%0, %1, %2, %3}", "%4", "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3]));
  }
#undef FVM_LDMATRIX
#endif
}

// ---- mma: d[16, 8] += a[16, 16] b[16, 8] in float; T is __nv_bfloat16 or __half. With g = lane / 4, t = lane % 4:

//   a[0] holds (g, 2t) and (g, 2t+1), a[1] (g+8, ..), a[2] (g, 2t+8 ..), a[3] (g+8, 2t+8 ..)
//   b[0] holds (2t, g) and (2t+1, g), b[1] (2t+8, g) and (2t+9, g)
//   d[0], d[1] are (g, 2t), (g, 2t+1); d[2], d[3] are (g+8, 2t), (g+8, 2t+1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr bool kBf16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBf16 || std::is_same<T, __half>::value, "mma_m16n8k16 multiplies bfloat16 or half");
#ifdef FVM_CUSIM
  cusim::mma_m16n8k16(d, a, b0, b1, kBf16);
#else
#define FVM_MMA(type)                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type            \
               ".f32 "                                                           \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kBf16)
    FVM_MMA("bf16");
  else
    FVM_MMA("f16");
#undef FVM_MMA
#endif
}

// Two floats rounded into one register of a fragment, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    __builtin_memcpy(&both, &pair, sizeof both);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    __builtin_memcpy(&both, &pair, sizeof both);
  }
  return both;
}

}  // namespace fvm
