// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs: the best that was built and that this processor has, unless FVM_FAST_ISA says otherwise.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fvm {

const Kernels& kernels();                // the active table
void set_isa(const std::string& name);   // throws std::invalid_argument with a sentence when it cannot run here
std::string isa_error();                 // applies FVM_FAST_ISA; why it cannot be had, or ""
std::vector<std::string> isas_built();   // from the plainest to the widest
std::vector<std::string> isas_usable();  // those of them that this processor runs

}  // namespace fvm
