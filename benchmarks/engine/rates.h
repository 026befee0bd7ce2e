// SPDX-License-Identifier: Apache-2.0
// What is timed on each instruction set. Every function returns the FLOP it did (a multiply-add is two).
#pragma once
#include "kernels.h"

namespace fvm::bench {

struct Work {  // C [m, n] = A [m, K] B [n, K]^T
  Dtype dtype;
  int64_t m, n, K;
  const void *a, *b;
  void *packed_a, *packed_b;
  void* c;  // of the accumulation type
};

struct Rates {
  const char* isa;
  int64_t (*packed_bytes)(Dtype, int64_t n, int64_t K);  // enough for either operand
  double (*peak)(const Work&);                           // multiply-adds in registers, nothing else
  double (*tile)(const Work&);                           // one tile of gemm.h again and again, 128 steps, from L1
  double (*pack)(const Work&);                           // both operands; no FLOP
  double (*product)(const Work&);                        // of the packed operands, copied to C
};

}  // namespace fvm::bench
