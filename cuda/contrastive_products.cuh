// SPDX-License-Identifier: Apache-2.0
// The matrix products of the contrastive losses, on the tile of contrastive_loss.cuh: disjoint tiles of the result,
// whose terms are added in a fixed order.
#pragma once
#include "contrastive_loss.cuh"

namespace fvm::cuda {

// A chunk of rows of G, [rows, pitch] with zeros from column m on; what it is to be multiplied by is in `unscale` too
// where that is not null (the device knows it).
template <class T> struct Gradient {
  const T* values;
  int64_t rows, m, pitch;
  Factor factor;
  const Acc<T>* unscale;
  bool triangle;  // of a square matrix, rows from its diagonal on: what is left of the diagonal's tile is not read
};

// out [n, pitch] = X Y^T, zero from column m on; pitch - m is less than the tile
template <class T>
cudaError_t similarities(const Features<T>& x, const Features<T>& y, Acc<T>* out, int64_t pitch, cudaStream_t stream);

// dx [rows, D] (+)= G Y. With few tiles the columns are cut into parts, whose sums lie in `partials`.
template <class T>
cudaError_t multiply_by_y(const Gradient<T>& g, const T* y, int64_t D, Acc<T>* dx, bool add, Acc<T>* partials,
                          cudaStream_t stream);
int64_t partials_size(int64_t rows, int64_t m, int64_t D);

// dy [m, D] (+)= G^T X
template <class T>
cudaError_t multiply_by_x(const Gradient<T>& g, const T* x, int64_t D, Acc<T>* dy, bool add, cudaStream_t stream);

}  // namespace fvm::cuda
