// SPDX-License-Identifier: Apache-2.0
// The gradients of patch_embed. Pixels are read from the images again; whatever is summed over tokens or images is summed
// in a fixed order, in two stages where one block could not do it alone. Nothing is added by atomics.
#include "patch_sums.cuh"

namespace fvm::cuda {

namespace {

// ---- the weight: dweight = sum over tokens of dout^T pixels

// Tokens are cut into parts, so that there are blocks for all of a large GPU: two for each SM of an A100. The number does
// not depend on the GPU at hand, and so the result does not. A part has less than 2^31 tokens.
struct Parts {
  int64_t n, tokens;  // of one

  Parts(int64_t D, int64_t F, int64_t all) {
    const int64_t tiles = ceil_div<int64_t>(D, kTile) * ceil_div<int64_t>(F, kTile);
    const int64_t most = max(ceil_div<int64_t>(216, tiles), all >> 30);
    tokens = ceil_div<int64_t>(all, most * kTile) * kTile;
    n = all > 0 ? ceil_div(all, tokens) : 1;
  }
};

template <class T> struct WeightGradient {
  ListedRows<T> dout;  // [tokens, D]
  Patches<T> patches;  // [tokens, F]
  const int64_t *dout_of, *pixels_of;
  int64_t part_tokens;
  Acc<T>* sums;    // [parts, D, F]
  bool in_chunks;  // rows of sums can be cut into chunks at aligned addresses
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    weight_gradient(const __grid_constant__ WeightGradient<T> g) {
  using S = Acc<T>;
  constexpr int kSlots = 2 * kStep<T>;
  __shared__ int64_t dout_of[kSlots], pixels_of[kSlots];
  const int64_t D = g.dout.columns, F = g.patches.columns;
  const int64_t f0 = int64_t(blockIdx.x) * kTile, d0 = int64_t(blockIdx.y) * kTile, begin = blockIdx.z * g.part_tokens;
  const int count = int(min(g.part_tokens, g.dout.rows - begin));
  ListedRows<T> dout = g.dout;
  Patches<T> patches = g.patches;
  dout.begins = dout_of, patches.begins = pixels_of;
  dout.slots = patches.slots = kSlots;
  Tile<T, Layout::step_outside, Layout::step_outside> tile;
  multiply<T, Layout::step_outside, Layout::step_outside>(tile, dout, patches, d0, f0, count, [&](int k) {
    if (threadIdx.x >= kStep<T> || k >= count) return;
    const int i = k + threadIdx.x, from = i < count ? i : 0;
    cp_async<8>(&dout_of[i % kSlots], g.dout_of + begin + from, i < count);
    cp_async<8>(&pixels_of[i % kSlots], g.pixels_of + begin + from, i < count);
  });
  S* sums = g.sums + blockIdx.z * D * F;
  for_each_pack(tile, [&](int row, int column, auto sum) {
    const int64_t d = d0 + row, f = f0 + column;
    if (d < D && f < F) write_some(sums + d * F + f, sum, g.in_chunks, F - f);
  });
}

// out = the sum of `parts` arrays, in order
template <class S>
__global__ void __launch_bounds__(kTileThreads)
    sum_parts(const S* __restrict__ parts, S* __restrict__ out, int64_t n, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= size) return;
  S sum = parts[i];
#pragma unroll 8
  for (int64_t part = 1; part < n; part++) sum += parts[part * size + i];
  out[i] = sum;
}

// ---- the images: patch by patch, scale * (sum of dout over the tokens that show it) W

// Rows of dout, with those of later tokens of the same patch added
template <class T> struct SummedRows : ListedRows<T> {
  Links links;

  template <class E, int N> __device__ __forceinline__ void finish(Acc<T> (&sum)[N], int64_t r, int64_t c) const {
    for (int64_t token = links.after(r); token >= 0; token = links.after(token)) {
      const E* row = static_cast<const E*>(this->values) + this->row(r) + (token - r) * this->columns + c;
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += widen(row[j]);
    }
  }
};

template <class T> struct ImageGradient {
  SummedRows<T> dout;  // [tokens, D]
  Matrix<T> weight;    // [D, F], in chunks
  Tokens tokens;
  PatchGrid grid;
  int64_t F;
  const int64_t *dout_of, *pixels_of;
  const Acc<T>* scale;  // [F] or null
  void* dimages;
  bool is_wide;    // of S, not T
  bool in_chunks;  // runs can be cut into chunks at aligned addresses
};

// The tokens of a block that are the first of their patch; the others are zeros and write nothing
template <class T>
__device__ void look_up(const ImageGradient<T>& g, int64_t token, int64_t& dout, int64_t& pixels) {
  const int64_t b = token / g.tokens.K;
  const bool embedded = g.dout_of[token] > 0;
  const bool is_first = embedded && g.dout.links.of_patch(g.tokens, b, g.tokens.patch(b, token % g.tokens.K)) == token;
  dout = is_first ? g.dout_of[token] : 0;
  pixels = is_first ? g.pixels_of[token] : 0;
}

template <class T, class I>
__device__ __forceinline__ void write_pixels(const ImageGradient<T>& g, int64_t at, int64_t f,
                                             const Pack<Acc<T>, kChunk<Acc<T>>>& sum) {
  I* pixels = static_cast<I*>(g.dimages) + at;
  if (g.in_chunks) return store(pixels + g.grid.offset(f), narrow<I>(sum.at));
#pragma unroll
  for (int j = 0; j < kChunk<Acc<T>>; j++)
    if (f + j < g.F) pixels[g.grid.offset(f + j)] = narrow<I>(sum.at[j]);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    image_gradient(const __grid_constant__ ImageGradient<T> g) {
  using S = Acc<T>;
  __shared__ int64_t dout_of[kTile], pixels_of[kTile];
  const int64_t F = g.F, D = g.weight.rows, tokens = g.dout.rows, across = ceil_div<int64_t>(F, kTile);
  const int64_t token0 = blockIdx.x / across * kTile, f0 = blockIdx.x % across * kTile;
  if (const int i = threadIdx.x; i < kTile) {
    dout_of[i] = 0;
    if (token0 + i < tokens) look_up(g, token0 + i, dout_of[i], pixels_of[i]);
  }
  __syncthreads();
  SummedRows<T> dout = g.dout;
  dout.begins = dout_of;
  Tile<T, Layout::step_inside, Layout::step_outside> tile;
  multiply<T, Layout::step_inside, Layout::step_outside>(tile, dout, g.weight, token0, f0, int(D), [](int) {});
  for_each_pack(tile, [&](int row, int column, auto sum) {
    const int64_t f = f0 + column;
    if (dout_of[row] == 0 || f >= F) return;
    const int64_t at = pixels_of[row] - 1;
    if (g.scale)
#pragma unroll
      for (int j = 0; j < kChunk<S>; j++) sum.at[j] *= f + j < F ? g.scale[f + j] : S(0);
    if (g.is_wide)
      write_pixels<T, S>(g, at, f, sum);
    else
      write_pixels<T, T>(g, at, f, sum);
  });
}

// Zeros where no token looked, a warp a patch
template <class I>
__global__ void __launch_bounds__(kTileThreads) clear_unseen(Tokens tokens, Links links, PatchGrid grid, I* dimages) {
  const int64_t at = warp_of_grid(), b = at / tokens.L, patch = at % tokens.L, F = grid.features();
  if (b >= tokens.B || (links.of_patch(tokens, b, patch) >= 0 && !tokens.masked(b, patch))) return;
  I* pixels = dimages + b * grid.image_size() + grid.origin(patch);
  for (int64_t f = lane(); f < F; f += kWarp) pixels[grid.offset(f)] = narrow<I>(0);
}

// ---- launchers

template <class T> struct BackwardSpace {
  using S = Acc<T>;
  S* statistics;  // scale and shift of each feature
  Links links;
  int64_t *dout_of, *pixels_of;  // of each token
  S *kept_sums, *masked_sums;    // [L, D]
  T* weight;                     // a copy
  S* parts;                      // of dweight

  BackwardSpace(Workspace& space, const Tokens& tokens, int64_t F, int64_t D) {
    const int64_t all = tokens.B * tokens.K, parts_n = Parts(D, F, all).n;
    statistics = space.take<S>(2 * F);
    links = {space.take<int64_t>(tokens.B * tokens.L), space.take<int64_t>(all)};
    dout_of = space.take<int64_t>(all);
    pixels_of = space.take<int64_t>(all);
    kept_sums = space.take<S>(tokens.L * D);
    masked_sums = space.take<S>(tokens.L * D);
    weight = space.take<T>(D * in_chunks<T>(F));
    parts = parts_n == 1 ? nullptr : space.take<S>(parts_n * D * F);
  }
};

// What the launchers share
template <class T> struct Backward {
  PatchGrid grid;
  Tokens tokens;
  Links links;
  BackwardSpace<T> space;
  const Acc<T>* statistics;  // null if images are taken as they are
  const void* dout;
  Dtype out_dtype, dtype, image_dtype;
  int64_t D;
  cudaStream_t stream;

  int64_t all() const { return tokens.B * tokens.K; }
};

template <class T> cudaError_t find(const Backward<T>& of) {
  if (of.tokens.ids) FVM_TRY(FVM_LAUNCH(link_tokens, of.tokens.B, kWarp, 0, of.stream, of.tokens, of.links));
  return FVM_LAUNCH(find_tokens, thread_an_item(of.all()), kTileThreads, 0, of.stream, of.tokens, of.grid, of.D,
                    of.space.pixels_of, of.space.dout_of);
}

template <class T> cudaError_t differentiate_weight(const Backward<T>& of, const void* images, Acc<T>* dweight) {
  using S = Acc<T>;
  const int64_t F = of.grid.features(), D = of.D, size = D * F;
  const Parts parts(D, F, of.all());
  S* sums = parts.n == 1 ? dweight : of.space.parts;
  const WeightGradient<T> gradient{{rows_of<T>(of.dout, of.out_dtype, of.all(), D, D), nullptr, kTile},
                                   patches_of<T>(of.grid, images, of.image_dtype, of.all(), of.statistics),
                                   of.space.dout_of,
                                   of.space.pixels_of,
                                   parts.tokens,
                                   sums,
                                   F % kChunk<S> == 0 && aligned(16, sums)};
  const Grid blocks{ceil_div<int64_t>(F, kTile), ceil_div<int64_t>(D, kTile), parts.n};
  FVM_TRY(FVM_LAUNCH(weight_gradient<T>, blocks, kTileThreads, kTileShared, of.stream, gradient));
  if (parts.n == 1) return cudaSuccess;
  return FVM_LAUNCH(sum_parts<S>, thread_an_item(size), kTileThreads, 0, of.stream, sums, dweight, parts.n, size);
}

template <class T> cudaError_t differentiate_images(const Backward<T>& of, const void* weight, void* dimages) {
  using S = Acc<T>;
  const int64_t F = of.grid.features(), D = of.D;
  const bool is_wide = of.image_dtype != of.dtype;
  Matrix<T> matrix;
  FVM_TRY(prepare_weight(matrix, static_cast<const T*>(weight), of.space.weight, of.grid, D, of.stream));
  SummedRows<T> dout{{rows_of<T>(of.dout, of.out_dtype, of.all(), D, D), nullptr, kTile}, of.links};
  dout.direct &= !of.tokens.ids;
  const ImageGradient<T> gradient{dout,
                                  matrix,
                                  of.tokens,
                                  of.grid,
                                  F,
                                  of.space.dout_of,
                                  of.space.pixels_of,
                                  of.statistics,
                                  dimages,
                                  is_wide,
                                  of.grid.run % kChunk<S> == 0 && aligned(16, dimages)};
  const Grid blocks{ceil_div<int64_t>(of.all(), kTile) * ceil_div<int64_t>(F, kTile)};
  FVM_TRY(FVM_LAUNCH(image_gradient<T>, blocks, kTileThreads, kTileShared, of.stream, gradient));
  if (!of.tokens.ids && !of.tokens.mask) return cudaSuccess;
  const Grid warps = thread_an_item(of.tokens.B * of.tokens.L * kWarp);
  if (is_wide)
    return FVM_LAUNCH(clear_unseen<S>, warps, kTileThreads, 0, of.stream, of.tokens, of.links, of.grid,
                      static_cast<S*>(dimages));
  return FVM_LAUNCH(clear_unseen<T>, warps, kTileThreads, 0, of.stream, of.tokens, of.links, of.grid,
                    static_cast<T*>(dimages));
}

}  // namespace

int64_t patch_embed_bwd_workspace(Dtype dtype, int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D,
                                  int64_t P, int64_t K) {
  Workspace space(nullptr);
  const Tokens tokens{B, P, K, (H / p) * (W / p), nullptr, nullptr};
  if (dtype == Dtype::f64)
    BackwardSpace<double>(space, tokens, C * p * p, D);
  else
    BackwardSpace<float>(space, tokens, C * p * p, D);  // half types need less
  return space.bytes();
}

cudaError_t patch_embed_bwd(const void* dout, Dtype out_dtype, const void* images, Dtype image_dtype,
                            bool channels_last, const void* weight, Dtype dtype, Maybe<const int64_t> ids,
                            Maybe<const double> mean, Maybe<const double> std, Maybe<const bool> mask,
                            Maybe<void> dimages, Maybe<void> dweight, Maybe<void> dbias, Maybe<void> dpos,
                            Maybe<void> dprefix, Maybe<void> dmask_token, void* workspace, int64_t B, int64_t C,
                            int64_t H, int64_t W, int64_t p, int64_t D, int64_t P, int64_t K, int64_t pos_rows,
                            Launch launch) {
  const PatchGrid grid(C, H, W, p, channels_last);
  const Tokens tokens{B, P, K, grid.patches(), ids.p, mask.p};
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Acc<T>;
    auto as = [](Maybe<void> values) { return static_cast<S*>(values.p); };
    Workspace arena(workspace);
    const BackwardSpace<T> space(arena, tokens, grid.features(), D);
    const Backward<T> of{grid,
                         tokens,
                         ids ? space.links : Links{nullptr, nullptr},
                         space,
                         is_normalised(image_dtype, mean) ? space.statistics : nullptr,
                         dout,
                         out_dtype,
                         dtype,
                         image_dtype,
                         D,
                         launch.stream};
    FVM_TRY(find(of));
    FVM_TRY(prepare_statistics(space.statistics, grid, image_dtype, mean, std, launch.stream));
    if (dweight) FVM_TRY(differentiate_weight(of, images, as(dweight)));
    if (dimages) FVM_TRY(differentiate_images(of, weight, dimages.p));
    if (!dbias && !dpos && !dprefix && !dmask_token) return cudaSuccess;
    const ParameterGradients<S> to{as(dpos), as(dprefix), dbias ? space.kept_sums : nullptr,
                                   dmask_token ? space.masked_sums : nullptr};
    auto sums = [&](auto* rows) {
      return differentiate_parameters(tokens, of.links, rows, to, as(dbias), as(dmask_token), D, pos_rows,
                                      launch.stream);
    };
    return out_dtype == dtype ? sums(static_cast<const T*>(dout)) : sums(static_cast<const S*>(dout));
  });
}

}  // namespace fvm::cuda
