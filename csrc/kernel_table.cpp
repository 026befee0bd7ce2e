// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set. Compiled once for each, like the kernels themselves.
#include <type_traits>

#include "kernels.h"

#define FVM_JOIN_(a, b) a##b
#define FVM_JOIN(a, b) FVM_JOIN_(a, b)
#define FVM_STRING_(a) #a
#define FVM_STRING(a) FVM_STRING_(a)

namespace fvm {

namespace FVM_ISA {
#define FVM_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
FVM_KERNELS(FVM_DECLARE)
}  // namespace FVM_ISA

#define FVM_ENTRY(name) .name = FVM_ISA::name,
extern const Kernels FVM_JOIN(kernels_, FVM_ISA) = {.isa = FVM_STRING(FVM_ISA), FVM_KERNELS(FVM_ENTRY)};

}  // namespace fvm
