// SPDX-License-Identifier: Apache-2.0
// The engine of one instruction set (simd.h, gemm.h, row_panels.h) behind plain functions, as the kernels are: what is
// compiled with the flags of an instruction set stays in its namespace, and the tests are compiled without them.
#pragma once
#include "kernels.h"

namespace fvm::test {

// How an operand [rows, K] of a product lies in memory: element (i, k) at i * ld + k, or at k * ld + i.
enum class Layout : int { rows, columns };

// How the tiles are made: from two packed panels; with A in row panels; or straight into `out`, twice with `add`.
enum class Path : int { packed, row_panels, partial_added };

struct Operands {
  const void* a;  // [m, K] or [K, m]
  const void* b;  // [n, K] or [K, n]
  Layout a_layout, b_layout;
  int64_t m, n, K;
};

struct Engine {
  const char* isa;
  int64_t lanes;                                          // floats of a vector
  void (*exp)(Dtype, const void* x, void* y, int64_t n);  // f64 or f32; n a multiple of `lanes`
  void (*log1p)(Dtype, const void* x, void* y, int64_t n);
  void (*transpose)(Dtype, void* rows);  // f64 [lanes / 2, lanes / 2] or f32 [lanes, lanes], in place
  void (*widen)(Dtype, const void* x, void* y, int64_t n);                     // y has the accumulation type
  void (*narrow)(Dtype, const void* x, void* y, int64_t n);                    // x has it
  void (*accumulate)(Dtype, const void* x, void* sum, int64_t n);              // sum has it
  int64_t (*product_workspace)(Dtype, int64_t m, int64_t n, int64_t K, Path);  // bytes
  void (*product)(Dtype, Path, const Operands&, void* workspace, void* out);   // out [m, n] of the accumulation type
};

const Engine& engine();  // of the active instruction set

}  // namespace fvm::test
