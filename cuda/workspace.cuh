// SPDX-License-Identifier: Apache-2.0
// One block of memory cut into arrays. The same cutting, started from null, tells how large the block has to be.
#pragma once
#include <cstdint>

namespace fvm::cuda {

class Workspace {
 public:
  explicit Workspace(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)), at_(begin_) {}

  template <class T> T* take(int64_t n) {
    T* array = reinterpret_cast<T*>(at_);
    at_ += (uintptr_t(n) * sizeof(T) + 255) / 256 * 256;
    return array;
  }
  int64_t bytes() const { return int64_t(at_ - begin_); }

 private:
  uintptr_t begin_, at_;
};

}  // namespace fvm::cuda
