// SPDX-License-Identifier: Apache-2.0
// The Python module `_C`: the kernels of kernels.h with addresses for pointers. It is private to fvm_fast/ops/_backend.py,
// which checks what an address stands for; here null and negative arguments are refused all the same.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "dispatch.h"

namespace py = pybind11;
using fvm::Dtype;
using fvm::Kernels;
using fvm::Maybe;

namespace {

// How each argument type of a kernel comes in from Python, and what is refused.
template <class T> struct Arg;
template <class T> struct Arg<T*> {
  using type = std::uintptr_t;
  static T* check(type address) {
    if (address == 0) throw std::invalid_argument("_C: expected the address of a tensor, got null");
    return reinterpret_cast<T*>(address);
  }
};
template <class T> struct Arg<Maybe<T>> {
  using type = std::uintptr_t;
  static Maybe<T> check(type address) { return {reinterpret_cast<T*>(address)}; }
};
template <> struct Arg<int64_t> {
  using type = int64_t;
  static int64_t check(type n) {
    if (n < 0) throw std::invalid_argument("_C: expected a size that is not negative, got " + std::to_string(n));
    return n;
  }
};
template <> struct Arg<Dtype> {
  using type = int;
  static Dtype check(type code) {
    if (code < 0 || code > int(Dtype::u8))
      throw std::invalid_argument("_C: expected a dtype code of 0 to 4, got " + std::to_string(code));
    return Dtype(code);
  }
};
template <> struct Arg<double> {
  using type = double;
  static double check(type x) { return x; }
};
template <> struct Arg<bool> {
  using type = bool;
  static bool check(type x) { return x; }
};

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
