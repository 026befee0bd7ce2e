// SPDX-License-Identifier: Apache-2.0
// The forward of window_attention: a block of threads for some queries of a window and head, which goes over the keys in
// blocks and keeps the softmax up to date (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). The map is
// read and written in place: what the window's tokens are is index arithmetic.
#include "window_attention.cuh"

namespace fvm::cuda {

namespace {

// Shared memory of a block; from null, how large it is
template <class T> struct ForwardSpace {
  using S = Acc<T>;
  T *q, *k, *v;  // [kBlock, row_stride(d)]; q is later the output
  T* p;          // [kBlock, kBlock] of probabilities, where these are no fragments
  S* norms;      // [kBlock]
  int64_t* places;
  uint8_t* parts;
  size_t bytes;

  __host__ __device__ ForwardSpace(unsigned char* memory, int N, int d) {
    const int rows = kBlock<T> * row_stride<T>(d);
    q = reinterpret_cast<T*>(memory), k = q + rows, v = k + rows, p = v + rows;
    norms = reinterpret_cast<S*>(p + (kIsHalf<T> ? 0 : kBlock<T> * row_stride<T>(kBlock<T>)));
    places = reinterpret_cast<int64_t*>(norms + kBlock<T>);
    parts = reinterpret_cast<uint8_t*>(places + N);
    bytes = reinterpret_cast<uintptr_t>(parts + N) - reinterpret_cast<uintptr_t>(memory);
  }
};

// out += P V over a block of keys. On tensor cores the results of q k^T are, rounded, the left operand as they are.
template <class T, int kKeys, int kTiles>
__device__ __forceinline__ void add_values(Acc<T> (&out)[kTiles][4], const Acc<T> (&p)[kKeys][4], T* space, const T* v,
                                           int d) {
  if constexpr (kIsHalf<T>) {
#pragma unroll
    for (int j = 0; j < kKeys; j += 2) {
      const uint32_t a[4] = {pack_halves<T>(p[j][0], p[j][1]), pack_halves<T>(p[j][2], p[j][3]),
                             pack_halves<T>(p[j + 1][0], p[j + 1][1]), pack_halves<T>(p[j + 1][2], p[j + 1][3])};
      multiply_step<RowsAre::summed>(out, a, v, row_stride<T>(d), 8 * j, padded(d));
    }
  } else {
    T* const own = space + warp() * 16 * row_stride<T>(kBlock<T>);
    __syncwarp();
    write_tile(own, row_stride<T>(kBlock<T>), p, kBlock<T>);
    __syncwarp();
    multiply<RowsAre::kept, RowsAre::summed>(out, own, row_stride<T>(kBlock<T>), v, row_stride<T>(d), kBlock<T>,
                                             padded(d));
  }
}

// kChannels: of a head, at most
template <class T, int kChannels>
__global__ void __launch_bounds__(kThreads<T>, kIsHalf<T>&& kChannels == 32 ? 4 : kBlocksOnSM<T>)
    attend(const WindowInputs<T> in, T* __restrict__ out) {
  using S = Acc<T>;
  const int N = in.grid.N(), d = in.grid.d, blocks = ceil_div(N, kBlock<T>);
  const int first = int(blockIdx.x % blocks) * kBlock<T>, query = first + warp() * 16;
  const int64_t unit = blockIdx.x / blocks;
  const int head = int(unit % in.grid.heads);
  const ForwardSpace<T> space(dynamic_shared<unsigned char>(), N, d);
  Window window{in.grid, space.places, space.parts, false, false};
  window.look_up(unit / in.grid.heads);
  rows_of(in, kQ, head).fetch(space.q, window, first);
  T* const q = space.q + warp() * 16 * row_stride<T>(d);
  S sum[kChannels / 8][4] = {}, maximum[2] = {-S(INFINITY), -S(INFINITY)}, total[2] = {};
#pragma unroll 1
  for (int key = 0; key < N; key += kBlock<T>) {
    rows_of(in, kK, head).fetch(space.k, window, key);
    rows_of(in, kV, head).fetch(space.v, window, key);
    wait_for_rows();
    if (in.logit_scale) {
      if (key == 0) normalise(space.q, space.norms, d);
      normalise(space.k, space.norms, d);
      __syncthreads();
    }
    S p[kBlock<T> / 8][4] = {}, shrink[2];
    multiply<RowsAre::kept, RowsAre::kept>(p, q, row_stride<T>(d), space.k, row_stride<T>(d), padded(d), kBlock<T>);
    to_logits(p, in, window, head, query, key);
    exponentials(p, maximum, shrink);
#pragma unroll
    for (int i = 0; i < 2; i++) total[i] *= shrink[i];
    add_rows(total, p);
    if (in.dropout.active) drop(p, in.dropout, in.dropout.stream(unit), query, key);
#pragma unroll
    for (int j = 0; j < kChannels / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[j][e] *= shrink[e / 2];
    add_values<T>(sum, p, space.p, space.v, d);
    __syncthreads();  // the next keys come to the place of these
  }
  const S kept = in.dropout.active ? S(in.dropout.kept) : S(1);
#pragma unroll
  for (int j = 0; j < kChannels / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum[j][e] *= kept / total[e / 2];
  write_tile(q, row_stride<T>(d), sum, padded(d));
  write_rows(out + int64_t(head) * d, in.grid.C(), q, row_stride<T>(d), d, in.in_chunks, window, query);
}

template <class... A> void unused(const A&...) {}  // shared memory is all that the forward works in

template <class T> cudaError_t launch_attend(const WindowInputs<T>& in, T* out, cudaStream_t stream) {
  const int N = in.grid.N(), d = in.grid.d;
  const Grid blocks{in.grid.windows() * in.grid.heads * ceil_div(N, kBlock<T>)};
  const size_t shared = ForwardSpace<T>(nullptr, N, d).bytes;
  if constexpr (sizeof(T) < 8)
    if (d <= 32) return FVM_LAUNCH((attend<T, 32>), blocks, kThreads<T>, shared, stream, in, out);
  return FVM_LAUNCH((attend<T, kMostChannels>), blocks, kThreads<T>, shared, stream, in, out);
}

}  // namespace

int64_t window_attention_fwd_workspace(int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t wh,
                                       int64_t ww, Dtype dtype) {
  unused(B, H, W, heads, d, wh, ww, dtype);
  return 1;  // of nothing there would be no address
}

cudaError_t window_attention_fwd(const void* qkv, Maybe<const void> bias, Maybe<const void> logit_scale,
                                 Maybe<const void> pad_qkv, void* out, void* workspace, double scale, double mask_value,
                                 double dropout_p, Maybe<const int64_t> seed, bool pad_then_roll, bool heads_outermost,
                                 int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t wh, int64_t ww,
                                 int64_t sh, int64_t sw, Dtype dtype, Launch launch) {
  unused(workspace);
  if (d > kMostChannels) return cudaErrorInvalidValue;
  const WindowGrid grid{B, H, W, int(heads), int(d), int(wh), int(ww), int(sh), int(sw), pad_then_roll};
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_attend(inputs_of<T>(qkv, bias, logit_scale, pad_qkv, scale, mask_value, dropout_of(dropout_p, seed),
                                      heads_outermost, grid, out, nullptr),
                         static_cast<T*>(out), launch.stream);
  });
}

}  // namespace fvm::cuda
