// SPDX-License-Identifier: Apache-2.0
// Dropout of attention probabilities without a mask in memory: whether one is kept is a hash of where it is.
#pragma once
#include "window_grid.h"

namespace fvm::FVM_ISA {

// Which probabilities dropout keeps: a function of (seed, window, head, query, key) alone
struct Dropout {
  double p = 0;
  uint64_t seed = 0;

  explicit operator bool() const { return p > 0; }
  static uint32_t mix(uint32_t x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
  }

  // factors[N, kQueries]: 1 / (1 - p) or 0 for each key and the queries from `query`. `unit` is window * heads + head.
  template <class S> void factors(int64_t unit, int64_t query, int64_t N, S* factors) const {
    const uint32_t stream = mix(mix(mix(uint32_t(seed)) + uint32_t(seed >> 32)) + uint32_t(unit));
    const double limit = std::floor(p * 4294967296.0);
    const uint32_t threshold = limit < 4294967295.0 ? uint32_t(limit) : 4294967295u;
    const S kept = p < 1 ? S(1 / (1 - p)) : S(0);
    uint32_t rows[kQueries];
    for (int64_t i = 0; i < kQueries; i++) rows[i] = mix(stream + uint32_t(query + i));
    for (int64_t key = 0; key < N; key++, factors += kQueries)
      for (int64_t i = 0; i < kQueries; i++)
        factors[i] = mix(rows[i] + uint32_t(key) * 0x9e3779b9u) >= threshold ? kept : S(0);
  }
};

}  // namespace fvm::FVM_ISA
