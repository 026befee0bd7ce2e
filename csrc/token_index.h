// SPDX-License-Identifier: Apache-2.0
// Indices of tokens: the check of their range, and their inverse, through which gradients are summed in a fixed order.
#pragma once
#include "kernels.h"

namespace fvm::FVM_ISA {

// Flat position of the first id outside [0, size), or kOk.
static inline int64_t first_out_of_range(const int64_t* ids, int64_t n, int64_t size) {
  for (int64_t i = 0; i < n; i++)
    if (uint64_t(ids[i]) >= uint64_t(size)) return i;
  return kOk;
}

// The inverse of one image's index: `order` lists the positions i with ids[i] = 0, then 1, ..., each in rising order;
// those of target t are order[start[t]] .. order[start[t + 1]]. Ids of `targets` and more are left out.
struct Inverse {
  int64_t *start, *order;
  Inverse(int64_t* workspace, int64_t targets) : start(workspace), order(workspace + targets + 1) {}
  static int64_t size(int64_t targets, int64_t n) { return targets + 1 + n; }

  void build(const int64_t* ids, int64_t n, int64_t targets) {
    for (int64_t t = 0; t <= targets; t++) start[t] = 0;
    for (int64_t i = 0; i < n; i++)
      if (ids[i] < targets) start[ids[i] + 1]++;
    for (int64_t t = 0; t < targets; t++) start[t + 1] += start[t];
    for (int64_t i = 0; i < n; i++)
      if (ids[i] < targets) order[start[ids[i]]++] = i;
    for (int64_t t = targets; t > 0; t--) start[t] = start[t - 1];  // filling moved every start to its end
    start[0] = 0;
  }
};

}  // namespace fvm::FVM_ISA
