// SPDX-License-Identifier: Apache-2.0
// What both directions of patch_embed know: where patches lie in images, which patch a token shows, how pixels are
// normalised. The names are those of csrc/patch_embed.h.
#pragma once
#include "patch_operands.cuh"
#include "workspace.cuh"

namespace fvm::cuda {

// Division of 0 <= n < 2^31 by a constant, as a product
class Divisor {
 public:
  explicit Divisor(int64_t d) {
    while ((int64_t(1) << shift_) < d) shift_++;
    multiplier_ = unsigned(((uint64_t(1) << 32) * ((uint64_t(1) << shift_) - d)) / d + 1);
  }
  __device__ __forceinline__ unsigned of(unsigned n) const { return (__umulhi(n, multiplier_) + n) >> shift_; }

 private:
  unsigned multiplier_, shift_ = 0;
};

// Patches of images [C, H, W], or [H, W, C] when `channels_last`. A patch is runs of `run` neighbours; its features count
// them in memory's order: (c, y, x) or (y, x, c).
struct PatchGrid {
  int64_t C, H, W, p;
  bool channels_last;
  int64_t run, line, plane;  // line and plane: from one to the next
  Divisor by_run, by_p;

  PatchGrid(int64_t C, int64_t H, int64_t W, int64_t p, bool channels_last)
      : C(C),
        H(H),
        W(W),
        p(p),
        channels_last(channels_last),
        run(channels_last ? p * C : p),
        line(channels_last ? W * C : W),
        plane(H * W),
        by_run(run),
        by_p(p) {}

  __host__ __device__ int64_t patches() const { return (H / p) * (W / p); }
  __host__ __device__ int64_t features() const { return C * p * p; }
  __host__ __device__ int64_t image_size() const { return C * H * W; }
  __device__ int64_t origin(int64_t patch) const {
    const int64_t columns = W / p;
    return patch / columns * p * line + patch % columns * run;
  }
  // Of a feature's value from the patch's first
  __device__ __forceinline__ int64_t offset(int64_t feature) const {
    const unsigned f = unsigned(feature), y = by_run.of(f), c = by_p.of(y);
    return c * plane + (y - c * unsigned(p)) * line + (f - y * unsigned(run));
  }
  __device__ int64_t channel(int64_t feature) const { return channels_last ? feature % C : feature / (p * p); }
  // The place of a feature in a row of the weight [D, C, p, p]
  __device__ int64_t in_weight(int64_t feature) const {
    return channels_last ? feature % C * p * p + feature / C : feature;
  }
};

// Which patch each of the P + K tokens of an image shows
struct Tokens {
  int64_t B, P, K, L;
  const int64_t* ids;  // [B, K] or null: all patches in order
  const bool* mask;    // [B, L] or null

  __host__ __device__ int64_t rows() const { return P + K; }
  // The row in [B, P + K] of what is the given token in [B, K], of image b
  __device__ int64_t row(int64_t b, int64_t token) const { return token + (b + 1) * P; }
  __device__ int64_t patch(int64_t b, int64_t k) const { return ids ? ids[b * K + k] : k; }
  __device__ bool masked(int64_t b, int64_t patch) const { return mask && mask[b * L + patch]; }
};

// ---- operands

// Normalised pixels: x * scale + shift, if these are not null
template <class T> struct Patches : ListedRows<T> {
  PatchGrid grid;
  const Acc<T>*scale, *shift;  // [F]

  __device__ __forceinline__ int64_t column(int64_t c) const { return grid.offset(c); }
  static constexpr bool kMayBeBytes = true;
  template <class E, int N> __device__ __forceinline__ void finish(Acc<T> (&x)[N], int64_t, int64_t c) const {
    if (!scale) return;
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = x[j] * scale[c + j] + shift[c + j];
  }
};

// Rows whose values are neighbours in runs of `run`
template <class T> Rows<T> rows_of(const void* values, Dtype dtype, int64_t rows, int64_t columns, int64_t run) {
  const int64_t each = dtype == Dtype::u8 ? 1 : dtype == dtype_of<T>() ? sizeof(T) : sizeof(Acc<T>);
  constexpr int64_t N = kChunk<T>;
  const bool in_chunks = run % N == 0 && aligned(N * each < 16 ? N * each : 16, values);
  return {values, dtype, in_chunks, in_chunks && dtype == dtype_of<T>(), rows, columns};
}

template <class T>
Patches<T> patches_of(const PatchGrid& grid, const void* images, Dtype dtype, int64_t rows, const Acc<T>* statistics) {
  const int64_t F = grid.features();
  Patches<T> patches{{rows_of<T>(images, dtype, rows, F, grid.run), nullptr, kTile}, grid, statistics, nullptr};
  if (!statistics) return patches;
  patches.shift = statistics + F;
  patches.direct = false;
  return patches;
}

// ---- N values of a row, or those that are left of it

template <int N, class S>
__device__ __forceinline__ void add_some(Pack<S, N>& sum, const S* values, bool in_chunks, int64_t left) {
  if (in_chunks) return accumulate<S>(sum.at, load<N>(values));
#pragma unroll
  for (int j = 0; j < N; j++)
    if (j < left) sum.at[j] += values[j];
}

template <class O, int N, class S>
__device__ __forceinline__ void write_some(O* out, const Pack<S, N>& sum, bool in_chunks, int64_t left) {
  if (in_chunks) return store(out, narrow<O>(sum.at));
#pragma unroll
  for (int j = 0; j < N; j++)
    if (j < left) out[j] = narrow<O>(sum.at[j]);
}

// ---- what is prepared in the workspace

inline bool is_normalised(Dtype image_dtype, Maybe<const double> mean) { return image_dtype == Dtype::u8 || mean; }

namespace {

// (x / 255 - mean) / std of uint8 and (x - mean) / std of float images as one product and one sum
template <class S>
__global__ void __launch_bounds__(kTileThreads)
    spread_statistics(const double* __restrict__ mean, const double* __restrict__ std, S* __restrict__ statistics,
                      PatchGrid grid, double unit) {
  const int64_t f = int64_t(blockIdx.x) * kTileThreads + threadIdx.x, F = grid.features();
  if (f >= F) return;
  const int64_t c = grid.channel(f);
  statistics[f] = S(unit / (std ? std[c] : 1.0));
  statistics[F + f] = mean ? S(-mean[c] / std[c]) : S(0);
}

// Rows of the weight in the images' order of features, in chunks: zeros behind the last feature
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    copy_weight(const T* __restrict__ weight, T* __restrict__ copy, PatchGrid grid, int64_t D, int64_t row_size) {
  const int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x, F = grid.features();
  const int64_t d = i / row_size, f = i % row_size;
  if (d < D) copy[i] = f < F ? weight[d * F + grid.in_weight(f)] : narrow<T>(0);
}

}  // namespace

inline Grid thread_an_item(int64_t items) { return {ceil_div<int64_t>(items, kTileThreads)}; }

template <class S>
cudaError_t prepare_statistics(S* statistics, const PatchGrid& grid, Dtype image_dtype, Maybe<const double> mean,
                               Maybe<const double> std, cudaStream_t stream) {
  if (!is_normalised(image_dtype, mean)) return cudaSuccess;
  return FVM_LAUNCH(spread_statistics<S>, thread_an_item(grid.features()), kTileThreads, 0, stream, mean.p, std.p,
                    statistics, grid, image_dtype == Dtype::u8 ? 1.0 / 255 : 1.0);
}

template <class T> __host__ __device__ constexpr int64_t in_chunks(int64_t n) {
  return ceil_div<int64_t>(n, kChunk<T>) * kChunk<T>;
}

// The weight as it is, or a copy of it in `space` [D, in_chunks(F)] if it has no chunks or another order than the images
template <class T>
cudaError_t prepare_weight(Matrix<T>& matrix, const T* weight, T* space, const PatchGrid& grid, int64_t D,
                           cudaStream_t stream) {
  const int64_t row_size = in_chunks<T>(grid.features());
  matrix = {weight, D, row_size};
  if (!grid.channels_last && row_size == grid.features() && aligned(16, weight)) return cudaSuccess;
  matrix.values = space;
  return FVM_LAUNCH(copy_weight<T>, thread_an_item(D * row_size), kTileThreads, 0, stream, weight, space, grid, D,
                    row_size);
}

}  // namespace fvm::cuda
