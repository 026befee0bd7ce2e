// SPDX-License-Identifier: Apache-2.0
// The Python module `_C_cuda`: the kernels of cuda/kernels.h with addresses for pointers and, last, what a launch needs:
// (device, stream, bad_id). Private to fvm_fast/ops/_backend.py. It links the CUDA runtime statically and can be
// imported where there is no driver.
#include <pybind11/pybind11.h>

#include <tuple>
#include <vector>

#include "../csrc/python_arguments.h"
#include "kernels.h"

#ifndef FVM_CUDA_ARCHS  // given by the build; kernels that were compiled for the emulator have none
#define FVM_CUDA_ARCHS ""
#define FVM_CUDA_COMPILER ""
#endif

namespace py = pybind11;
using fvm::cuda::Launch;

template <> struct fvm::Arg<Launch> {
  using type = std::tuple<int, std::uintptr_t, std::uintptr_t>;
  static Launch check(const type& launch) {
    const auto [device, stream, bad_id] = launch;
    if (device < 0)
      throw std::invalid_argument("_C_cuda: expected a device of 0 or more, got " + std::to_string(device));
    return {device, reinterpret_cast<cudaStream_t>(stream), {reinterpret_cast<int64_t*>(bad_id)}};
  }
};

namespace {

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(doing) + ": expected CUDA to do it, got the error '" +
                           cudaGetErrorString(error) + "'");
}

// Makes a device current in this module's own CUDA runtime, and the one before again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class... A> cudaError_t on_its_device(cudaError_t (*kernel)(A...), A... args) {
  const DeviceGuard guard(std::get<sizeof...(A) - 1>(std::tie(args...)).device);
  return kernel(args...);
}

template <class... A> void def(py::module_& m, const char* name, cudaError_t (*kernel)(A...)) {
  m.def(name, [kernel, name](const typename fvm::Arg<A>::type&... args) {
    auto call = [&](auto... checked) {
      py::gil_scoped_release release;
      return on_its_device(kernel, checked...);
    };
    check(call(fvm::Arg<A>::check(args)...), name);
  });
}
template <class... A> void def(py::module_& m, const char* name, int64_t (*size)(A...)) {
  m.def(name, [size](typename fvm::Arg<A>::type... args) { return size(fvm::Arg<A>::check(args)...); });
}

// The first use of a device by this module's runtime joins the device's context, which is not allowed during a capture.
void set_up(int device) {
  int before = 0;
  check(cudaGetDevice(&before), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaSetDevice(before), "cudaSetDevice");
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "fvm_fast's CUDA kernels (private: use fvm_fast.ops)";
  m.def("architectures", [] { return std::string(FVM_CUDA_ARCHS); });
  m.def("compiler", [] { return std::string(FVM_CUDA_COMPILER); });
  m.def("set_up", &set_up, py::call_guard<py::gil_scoped_release>());
  py::list kernels;
#define FVM_BIND(name)             \
  def(m, #name, &fvm::cuda::name); \
  kernels.append(#name);
  FVM_CUDA_KERNELS(FVM_BIND)
  m.attr("kernels") = py::tuple(kernels);
}
