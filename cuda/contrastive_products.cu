// SPDX-License-Identifier: Apache-2.0
// The matrix products of the contrastive losses, see contrastive_products.cuh.
#include "contrastive_products.cuh"

#ifndef FVM_TERMS_OF_PART  // tests make it small
#define FVM_TERMS_OF_PART 1024
#endif

namespace fvm::cuda {

namespace {

constexpr int64_t kTermsOfPart = FVM_TERMS_OF_PART, kBlocks = 256;  // cut as long as there are fewer blocks

template <class A> struct Product {
  A* out;  // [parts, rows, pitch]
  int64_t rows, columns, pitch, terms, terms_of_part = 0;
  Factor factor = {};
  const A* unscale = nullptr;
  bool add = false, packed = false, triangle = false;
  int64_t row_tiles = 0, column_tiles = 0;
};

// One tile of out (+)= factor A B^T over the terms of one part. In a triangle, terms of a row begin at its tile where
// they lie within rows, and end there where rows are summed.
template <class T, Layout kA, Layout kB>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    product(Features<T> a, Features<T> b, Product<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int N = kChunk<A>;
  const int64_t block = blockIdx.x / p.row_tiles;
  const int64_t row = blockIdx.x % p.row_tiles * kTile, column = block % p.column_tiles * kTile;
  const int64_t part = block / p.column_tiles;
  int64_t begin = part * p.terms_of_part, end = smaller(begin + p.terms_of_part, p.terms);
  if (p.triangle && kA == Layout::step_inside) begin = larger(begin, row);
  if (p.triangle && kA == Layout::step_outside) end = smaller(end, row + kTile);
  Tile<T, kA, kB> tile;
  multiply_features<T, kA, kB>(tile, a, b, row, column, begin, end);
  const A number = A(p.factor.value()), factor = p.unscale ? number * *p.unscale : number;
  for_each_pack<1>(tile, [&](int r, int c, Pack<A, N> sum) {
    const int64_t i = row + r, j = column + c;
    if (i >= p.rows || j >= p.columns) return;
    A* at = p.out + (part * p.rows + i) * p.pitch + j;
#pragma unroll
    for (int k = 0; k < N; k++) sum.at[k] *= factor;
    if (p.packed) {
      if (p.add) accumulate<A, N>(sum.at, load<N>(at));
      store(at, sum);
      return;
    }
#pragma unroll
    for (int k = 0; k < N; k++)
      if (j + k < p.columns) at[k] = p.add ? at[k] + sum.at[k] : sum.at[k];
  });
}

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    sum_parts(const A* __restrict__ partials, A* __restrict__ out, int64_t size, int64_t parts, bool add) {
  const int64_t e = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  if (e >= size) return;
  A sum = add ? out[e] : 0;
  for (int64_t p = 0; p < parts; p++) sum += partials[p * size + e];
  out[e] = sum;
}

int64_t parts_of(int64_t rows, int64_t m, int64_t D) {
  const int64_t tiles = ceil_div<int64_t>(rows, kTile) * ceil_div<int64_t>(D, kTile);
  return larger(1, smaller(kBlocks / larger(1, tiles), m / kTermsOfPart));
}

template <Layout kA, Layout kB, class T>
cudaError_t run(const Features<T>& a, const Features<T>& b, Product<Acc<T>> p, int64_t parts, cudaStream_t stream) {
  constexpr int N = kChunk<Acc<T>>;
  p.packed = p.columns % N == 0 && p.pitch % N == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  p.row_tiles = ceil_div<int64_t>(p.rows, kTile), p.column_tiles = ceil_div<int64_t>(p.columns, kTile);
  p.terms_of_part = round_up(ceil_div(larger(p.terms, 1), parts), kTile);
  return FVM_LAUNCH((product<T, kA, kB>), p.row_tiles * p.column_tiles * parts, kTileThreads, kTileShared, stream, a, b,
                    p);
}

}  // namespace

int64_t partials_size(int64_t rows, int64_t m, int64_t D) {
  int64_t most = 0;  // the last chunk has fewer rows, and more parts
  for (int64_t r = rows; r > 0; r -= kTile) {
    const int64_t parts = parts_of(r, m, D);
    most = larger(most, parts > 1 ? parts * r * D : 0);
  }
  return most;
}

template <class T>
cudaError_t similarities(const Features<T>& x, const Features<T>& y, Acc<T>* out, int64_t pitch, cudaStream_t stream) {
  Product<Acc<T>> p = {out, x.rows, pitch, pitch, x.columns};
  return run<Layout::step_inside, Layout::step_inside>(x, y, p, 1, stream);
}

template <class T>
cudaError_t multiply_by_y(const Gradient<T>& g, const T* y, int64_t D, Acc<T>* dx, bool add, Acc<T>* partials,
                          cudaStream_t stream) {
  const int64_t parts = parts_of(g.rows, g.m, D);
  Product<Acc<T>> p = {parts > 1 ? partials : dx, g.rows, D, D, g.m};
  p.factor = g.factor, p.unscale = g.unscale, p.add = add && parts == 1, p.triangle = g.triangle;
  const Features<T> of_g(g.values, g.rows, round_up(g.m, kChunk<T>), g.pitch);
  FVM_TRY((run<Layout::step_inside, Layout::step_outside>(of_g, Features<T>(y, g.m, D), p, parts, stream)));
  if (parts == 1) return cudaSuccess;
  return FVM_LAUNCH(sum_parts<Acc<T>>, ceil_div<int64_t>(g.rows * D, kTileThreads), kTileThreads, 0, stream, partials,
                    dx, g.rows * D, parts, add);
}

template <class T>
cudaError_t multiply_by_x(const Gradient<T>& g, const T* x, int64_t D, Acc<T>* dy, bool add, cudaStream_t stream) {
  Product<Acc<T>> p = {dy, g.m, D, D, g.rows};
  p.factor = g.factor, p.unscale = g.unscale, p.add = add, p.triangle = g.triangle;
  const Features<T> of_g(g.values, g.rows, round_up(g.m, kChunk<T>), g.pitch);
  return run<Layout::step_outside, Layout::step_outside>(of_g, Features<T>(x, g.rows, D), p, 1, stream);
}

#define FVM_INSTANTIATE(T)                                                                                            \
  template cudaError_t similarities<T>(const Features<T>&, const Features<T>&, Acc<T>*, int64_t, cudaStream_t);       \
  template cudaError_t multiply_by_y<T>(const Gradient<T>&, const T*, int64_t, Acc<T>*, bool, Acc<T>*, cudaStream_t); \
  template cudaError_t multiply_by_x<T>(const Gradient<T>&, const T*, int64_t, Acc<T>*, bool, cudaStream_t);
FVM_INSTANTIATE(double)
FVM_INSTANTIATE(float)
FVM_INSTANTIATE(bf16)
FVM_INSTANTIATE(fp16)
#undef FVM_INSTANTIATE

}  // namespace fvm::cuda
