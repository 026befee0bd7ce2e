// SPDX-License-Identifier: Apache-2.0
// Asking the memory for the tokens of the next window while this one is computed: its rows lie too far apart for the
// processor to foresee. A few lines at a time, between exponentials: there is room for some dozens on their way.
#pragma once
#include "simd.h"

namespace fvm::FVM_ISA {

struct RowStream {  // rows of `bytes` bytes at base + places[j] * stride bytes
  uintptr_t base = 0;
  const int64_t* places = nullptr;
  int64_t stride = 0, bytes = 0;

  template <class T> static RowStream of(const T* base, const int64_t* places, int64_t stride, int64_t d) {
    return {uintptr_t(base), places, stride * int64_t(sizeof(T)), d * int64_t(sizeof(T))};
  }
  // Inlined by force: GCC drops calls of functions that only prefetch.
  template <int ROWS> __attribute__((always_inline)) void prefetch(int64_t j) const {
    for (int64_t at = 0; at < bytes; at += 64)
      for (int u = 0; u < ROWS; u++)
        __builtin_prefetch(reinterpret_cast<const void*>(base + uintptr_t(places[j + u] * stride + at)), 0, 2);
  }
};

// Two streams, a group of lanes' share
struct Prefetch {
  RowStream a, b;
  template <int ROWS> __attribute__((always_inline)) void rows(int64_t j) const {
    a.prefetch<ROWS>(j);
    b.prefetch<ROWS>(j);
  }
};

}  // namespace fvm::FVM_ISA
