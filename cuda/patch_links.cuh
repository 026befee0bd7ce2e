// SPDX-License-Identifier: Apache-2.0
// Which tokens show a patch, once ids pick and repeat them: lists through which the gradients are summed in a fixed order.
#pragma once
#include "patch_embed.cuh"

namespace fvm::cuda {

namespace {

struct Links {
  int64_t *first, *next;  // [B, L], [B, K], or null without ids; positions in [B, K], -1: none

  __device__ int64_t of_patch(const Tokens& tokens, int64_t b, int64_t patch) const {
    return first ? first[b * tokens.L + patch] : b * tokens.K + patch;
  }
  __device__ int64_t after(int64_t token) const { return next ? next[token] : -1; }
};

// A warp an image goes through its ids from the last to the first, 32 at a time
__global__ void __launch_bounds__(kWarp) link_tokens(Tokens tokens, Links links) {
  const int64_t b = blockIdx.x, K = tokens.K;
  int64_t* first = links.first + b * tokens.L;
  for (int64_t l = lane(); l < tokens.L; l += kWarp) first[l] = -1;
  __syncwarp();
  for (int64_t k0 = (K - 1) / kWarp * kWarp; k0 >= 0; k0 -= kWarp) {
    const int64_t token = b * K + k0 + lane(), id = k0 + lane() < K ? tokens.ids[token] : -1;
    const unsigned equal = __match_any_sync(kAllLanes, id), later = equal & ~((2u << lane()) - 1);
    const bool good = is_index(id, tokens.L);
    if (good) links.next[token] = later ? b * K + k0 + __ffs(later) - 1 : first[id];
    __syncwarp();
    if (good && (equal & ((1u << lane()) - 1)) == 0) first[id] = token;
    __syncwarp();
  }
}

// For each token: 1 + where its patch begins in the images, and its row in dout; both 0 if it embeds no patch
__global__ void __launch_bounds__(kTileThreads)
    find_tokens(Tokens tokens, PatchGrid grid, int64_t D, int64_t* pixels_of, int64_t* dout_of) {
  const int64_t token = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  if (token >= tokens.B * tokens.K) return;
  const int64_t b = token / tokens.K, patch = tokens.patch(b, token % tokens.K);
  const bool embedded = is_index(patch, tokens.L) && !tokens.masked(b, patch);
  pixels_of[token] = embedded ? 1 + b * grid.image_size() + grid.origin(patch) : 0;
  dout_of[token] = embedded ? 1 + tokens.row(b, token) * D : 0;
}

}  // namespace

}  // namespace fvm::cuda
