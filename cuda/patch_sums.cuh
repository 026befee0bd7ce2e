// SPDX-License-Identifier: Apache-2.0
// The gradients of what is added to tokens (bias, positions, prefix and mask token): sums of dout over images.
#pragma once
#include "patch_links.cuh"

namespace fvm::cuda {

namespace {

constexpr int kWarps = kTileThreads / kWarp;

template <class S> struct ParameterGradients {
  S *dpos, *dprefix;           // [pos_rows, D], [P, D] or null
  S *kept_sums, *masked_sums;  // [L, D] or null: of patches, and of mask tokens, in their places
};

// Row l of all images, a block for 32 packs of it
template <class O, int N>
__global__ void __launch_bounds__(kTileThreads) sum_images(const O* __restrict__ dout, Tokens tokens, Links links,
                                                           ParameterGradients<Acc<O>> to, int64_t D, int64_t pos_from) {
  using S = Acc<O>;
  const int64_t slices = ceil_div<int64_t>(D, kWarp * N), l = blockIdx.x / slices, patch = l - tokens.P;
  const int64_t d = (blockIdx.x % slices * kWarp + lane()) * N;
  S kept[N] = {}, masked[N] = {};
  for (int64_t b = warp(); b < tokens.B && d < D; b += kWarps) {
    if (patch < 0) {
      accumulate(kept, load<N>(dout + (b * tokens.rows() + l) * D + d));
      continue;
    }
    const bool is_masked = tokens.masked(b, patch);
    for (int64_t token = links.of_patch(tokens, b, patch); token >= 0; token = links.after(token)) {
      const Pack<O, N> pack = load<N>(dout + tokens.row(b, token) * D + d);
      if (is_masked)
        accumulate(masked, pack);
      else
        accumulate(kept, pack);
    }
  }
  add_warps<kWarps>(kept);
  if (tokens.mask) add_warps<kWarps>(masked);
  if (warp() != 0 || d >= D) return;
  auto write = [&](S* rows, int64_t row, const S(&values)[N]) {
    if (rows) store(rows + row * D + d, narrow<S>(values));
  };
  write(patch < 0 ? to.dprefix : nullptr, l, kept);
  write(patch < 0 ? nullptr : to.kept_sums, patch, kept);
  write(patch < 0 ? nullptr : to.masked_sums, patch, masked);
#pragma unroll
  for (int j = 0; j < N; j++) kept[j] += masked[j];
  write(l < pos_from ? nullptr : to.dpos, l - pos_from, kept);
}

// out[d] = sum of rows [n, D], a block for 32 columns
template <class S>
__global__ void __launch_bounds__(kTileThreads)
    sum_rows(const S* __restrict__ rows, S* __restrict__ out, int64_t n, int64_t D) {
  const int64_t d = int64_t(blockIdx.x) * kWarp + lane();
  S sum[1] = {};
  for (int64_t r = warp(); d < D && r < n; r += kWarps) sum[0] += rows[r * D + d];
  add_warps<kWarps>(sum);
  if (warp() == 0 && d < D) out[d] = sum[0];
}

template <class O>
cudaError_t differentiate_parameters(const Tokens& tokens, const Links& links, const O* dout,
                                     ParameterGradients<Acc<O>> to, Acc<O>* dbias, Acc<O>* dmask_token, int64_t D,
                                     int64_t pos_rows, cudaStream_t stream) {
  using S = Acc<O>;
  auto sum = [&](auto N) {
    const Grid blocks{(tokens.P + tokens.L) * ceil_div<int64_t>(D, kWarp * N)};
    return FVM_LAUNCH(sum_images<O, N>, blocks, kTileThreads, 0, stream, dout, tokens, links, to, D,
                      tokens.P + tokens.L - pos_rows);
  };
  constexpr int N = kChunk<S>;
  if (D % N == 0 && aligned(16, dout, to.dpos, to.dprefix))
    FVM_TRY(sum(std::integral_constant<int, N>{}));
  else
    FVM_TRY(sum(std::integral_constant<int, 1>{}));
  const Grid columns{ceil_div<int64_t>(D, kWarp)};
  if (dbias) FVM_TRY(FVM_LAUNCH(sum_rows<S>, columns, kTileThreads, 0, stream, to.kept_sums, dbias, tokens.L, D));
  if (dmask_token)
    FVM_TRY(FVM_LAUNCH(sum_rows<S>, columns, kTileThreads, 0, stream, to.masked_sums, dmask_token, tokens.L, D));
  return cudaSuccess;
}

}  // namespace

}  // namespace fvm::cuda
