// SPDX-License-Identifier: Apache-2.0
// What the tests of the contrastive losses share: features, and the gradients of L(s X Y^T) from G = dL/dS.
#pragma once
#include <cmath>

#include "arrays.h"

namespace fvm::test {

using Matrix = std::vector<double>;

// Rows of unit length, rounded to the dtype
inline Array unit_rows(Dtype dtype, int64_t n, int64_t D, uint64_t seed) {
  Matrix x = uniform(n * D, seed);
  for (int64_t i = 0; i < n; i++) {
    double sum = 0;
    for (int64_t d = 0; d < D; d++) sum += x[i * D + d] * x[i * D + d];
    for (int64_t d = 0; d < D; d++) x[i * D + d] /= std::sqrt(sum);
  }
  return Array(dtype, x);
}

// [n, m]: x_i . y_j
inline Matrix similarities(const Matrix& x, const Matrix& y, int64_t D) {
  const int64_t n = int64_t(x.size()) / D, m = int64_t(y.size()) / D;
  Matrix s(n * m);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++)
      for (int64_t d = 0; d < D; d++) s[i * m + j] += x[i * D + d] * y[j * D + d];
  return s;
}

// factor G Y [n, D], from G [n, m]; with G transposed and X for Y, the gradient of the other side
inline Matrix product(const Matrix& g, const Matrix& y, int64_t n, int64_t m, int64_t D, double factor) {
  Matrix dx(n * D);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++)
      for (int64_t d = 0; d < D; d++) dx[i * D + d] += factor * g[i * m + j] * y[j * D + d];
  return dx;
}

inline Matrix transposed(const Matrix& g, int64_t n, int64_t m) {
  Matrix t(n * m);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) t[j * n + i] = g[i * m + j];
  return t;
}

inline double log_sum_exp(const double* s, int64_t n, int64_t step, double factor) {
  double top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; i++) top = std::fmax(top, factor * s[i * step]);
  for (int64_t i = 0; i < n; i++) sum += std::exp(factor * s[i * step] - top);
  return top + std::log(sum);
}

// Of each row, and of each column, of factor S [n, m]
inline Matrix row_lses(const Matrix& s, int64_t n, int64_t m, double factor) {
  Matrix lse(n);
  for (int64_t i = 0; i < n; i++) lse[i] = log_sum_exp(&s[i * m], m, 1, factor);
  return lse;
}
inline Matrix column_lses(const Matrix& s, int64_t n, int64_t m, double factor) {
  Matrix lse(m);
  for (int64_t j = 0; j < m; j++) lse[j] = log_sum_exp(&s[j], n, m, factor);
  return lse;
}

// Ids that make (i, i) the positive pair, or a few classes that rows and columns share
inline std::vector<int32_t> pair_ids(int64_t n, int64_t classes, uint64_t seed) {
  if (classes) return random_ids<int32_t>(n, classes, seed);
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; i++) ids[i] = int32_t(i);
  return ids;
}

}  // namespace fvm::test
