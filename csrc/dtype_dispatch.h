// SPDX-License-Identifier: Apache-2.0
// From a dtype code to the storage type of a template: with_dtype(dtype, [&]<class T>() { ... }).
#pragma once
#include "kernels.h"
#include "simd.h"

namespace fvm::FVM_ISA {

template <class F> static inline auto with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64: return f.template operator()<double>();
    case Dtype::bf16: return f.template operator()<bf16>();
    case Dtype::f16: return f.template operator()<fp16>();
    default: return f.template operator()<float>();
  }
}

}  // namespace fvm::FVM_ISA
