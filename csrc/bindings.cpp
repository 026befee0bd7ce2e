// SPDX-License-Identifier: Apache-2.0
// The Python module `_C`: the kernels of kernels.h with addresses for pointers. It is private to fvm_fast/ops/_backend.py,
// which checks what an address stands for; here null and negative arguments are refused all the same.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "python_arguments.h"

namespace py = pybind11;
using fvm::Arg;
using fvm::Kernels;

namespace {

template <class R, class... A> void def(py::module_& m, const char* name, R (*Kernels::*kernel)(A...)) {
  m.def(name, [kernel](typename Arg<A>::type... args) -> R {
    auto call = [&](auto... checked) {
      py::gil_scoped_release release;
      return (fvm::kernels().*kernel)(checked...);
    };
    return call(Arg<A>::check(args)...);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fvm_fast's compiled core (private: use fvm_fast.ops)";
  m.def("isa", [] { return std::string(fvm::kernels().isa); });
  m.def("isa_error", &fvm::isa_error);
  m.def("set_isa", &fvm::set_isa);
  m.def("isas_built", &fvm::isas_built);
  m.def("isas_usable", &fvm::isas_usable);
#define FVM_BIND(name) def(m, #name, &Kernels::name);
  FVM_KERNELS(FVM_BIND)
}
