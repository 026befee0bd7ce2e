// SPDX-License-Identifier: Apache-2.0
// How each argument of a kernel comes in from Python, and what is refused: Arg<A>::type is what pybind11 hands over, and
// Arg<A>::check makes the argument of it.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fvm {

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
template <class T> struct Arg<FromTensor<T>> {
  using type = T;
  static FromTensor<T> check(type x) { return x; }
};
template <> struct Arg<bool> {
  using type = bool;
  static bool check(type x) { return x; }
};

}  // namespace fvm
