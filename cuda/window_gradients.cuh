// SPDX-License-Identifier: Apache-2.0
// The memory of window_attention's backward, and how gradients of q, k and v are added up over blocks and written.
#pragma once
#include "window_attention.cuh"

namespace fvm::cuda {

namespace {

constexpr int kSlice = 32;  // channels of a gradient that are in registers at once

// ---- memory

// Shared memory of a block; from null, how large it is
template <class T> struct BackwardSpace {
  using S = Acc<T>;
  static constexpr int kStageStride = kSlice + kChunk<T>;
  T *q, *dout, *k, *v;  // [kBlock, row_stride(d)]
  T *p, *ds;            // [kBlock, row_stride(kBlock)]
  T* stage;             // [kBlock, kSlice]
  S *q_norms, *k_norms;
  int64_t* places;
  uint8_t* parts;
  size_t bytes;

  __host__ __device__ BackwardSpace(unsigned char* memory, int N, int d) {
    const int rows = kBlock<T> * row_stride<T>(d), square = kBlock<T> * row_stride<T>(kBlock<T>);
    q = reinterpret_cast<T*>(memory), dout = q + rows, k = dout + rows, v = k + rows;
    p = v + rows, ds = p + square, stage = ds + square;
    q_norms = reinterpret_cast<S*>(stage + kBlock<T> * kStageStride), k_norms = q_norms + kBlock<T>;
    places = reinterpret_cast<int64_t*>(k_norms + kBlock<T>);
    parts = reinterpret_cast<uint8_t*>(places + N);
    bytes = reinterpret_cast<uintptr_t>(parts + N) - reinterpret_cast<uintptr_t>(memory);
  }
};

// The workspace. Tiles of a result are kept as lanes have them, so that a warp moves whole sectors.
template <class T> struct PartialSums {
  using S = Acc<T>;
  static constexpr int kTiles = kBlock<T> / 8, kWarps = kThreads<T> / kWarp;
  int heads, blocks, slices;  // blocks of keys or queries of a window, slices of channels of a head
  int64_t groups;             // of windows; a block of threads has one of these and one head
  S* dbias;                   // [groups, heads, blocks, blocks, kTiles, kThreads, 4]
  S* dpad;                    // [groups, heads, kWarps, 3, slices, kSlice]
  S* unfinished;              // [groups, heads, 1 + 2 blocks, slices, kSlice / 8, kThreads, 4]
  double* dlogit_scale;       // [groups, heads]
  int64_t bytes;

  __host__ __device__ int64_t bias_size() const { return int64_t(blocks) * blocks * kTiles * kThreads<T> * 4; }
  __host__ __device__ int64_t pad_size() const { return int64_t(kWarps) * 3 * slices * kSlice; }
  __host__ __device__ int64_t slice_size() const { return kSlice / 8 * kThreads<T> * 4; }
  __host__ __device__ int64_t unfinished_size() const {
    return blocks > 1 || slices > 1 ? (1 + 2 * blocks) * slices * slice_size() : 0;
  }

  // Enough to keep a device busy; beyond that, of windows enough that their sums are small beside what they serve
  static int64_t groups_of(const WindowGrid& grid, int64_t sizes) {
    constexpr int64_t kFew = 128, kMany = 1024, kWindows = 8, kBytes = int64_t(64) << 20;
    const int64_t few = ceil_div<int64_t>(kFew, grid.heads), many = ceil_div<int64_t>(kMany, grid.heads);
    const int64_t affordable = kBytes / (sizes * int64_t(sizeof(S)) * grid.heads);
    const int64_t wanted = larger(few, smaller(many, grid.windows() / kWindows));
    return smaller(grid.windows(), larger(1, smaller(wanted, affordable)));
  }

  PartialSums(void* workspace, const WindowGrid& grid, bool want_bias) : heads(grid.heads) {
    blocks = ceil_div(grid.N(), kBlock<T>), slices = ceil_div(grid.d, kSlice);
    groups = groups_of(grid, (want_bias ? bias_size() : 0) + pad_size() + unfinished_size());
    dbias = static_cast<S*>(workspace);
    unfinished = dbias + (want_bias ? groups * heads * bias_size() : 0);
    dpad = unfinished + groups * heads * unfinished_size();
    dlogit_scale = reinterpret_cast<double*>(dpad + groups * heads * pad_size());
    bytes = reinterpret_cast<uintptr_t>(dlogit_scale + groups * heads) - reinterpret_cast<uintptr_t>(workspace);
  }
};

template <class T> struct Backward {
  WindowInputs<T> in;
  const T* dout;
  T* dqkv;  // or null
  bool want_bias, want_pad, want_logit_scale;
  PartialSums<T> sums;

  __device__ bool want_rows() const { return dqkv || want_pad; }
};

// ---- gradients of q, k and v

// A warp's 16 rows of one of them
template <class T> struct RowGradient {
  using S = Acc<T>;
  static constexpr int kTiles = kSlice / 8;
  const Backward<T>& call;
  const Window& window;
  Part part;
  int head, first;   // row of the window
  const T* x;        // the rows of q or k themselves
  const S* inverse;  // 1 / |x|, for cosines
  T* stage;
  S *unfinished, *dpad;

  __device__ bool is_cosine() const { return call.in.logit_scale && part != kV; }
  __device__ int columns(int slice) const { return min(kSlice, padded(call.in.grid.d) - slice * kSlice); }
  __device__ S* kept(int slice, int j) const {
    return unfinished + slice * call.sums.slice_size() + (j * kThreads<T> + threadIdx.x) * 4;
  }
  __device__ void keep(const S (&g)[kTiles][4], int slice) const {
#pragma unroll
    for (int j = 0; j < kTiles; j++) store(kept(slice, j), Pack<S, 4>{{g[j][0], g[j][1], g[j][2], g[j][3]}});
  }
  __device__ void take(S (&g)[kTiles][4], int slice) const {
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
      const Pack<S, 4> pack = load<4>(kept(slice, j));
#pragma unroll
      for (int e = 0; e < 4; e++) g[j][e] = pack.at[e];
    }
  }

  // add(g, slice, columns) adds one block's share. Of the first block there is nothing before, and the last one finishes.
  // Returns x . g of the lane's rows, if it is known.
  template <class Add> __device__ __forceinline__ void operator()(bool is_first, bool is_last, S (&dot)[2], Add&& add) {
    const int slices = call.sums.slices;
    const bool again = is_cosine() && slices > 1;  // all channels are needed before any can be finished
    dot[0] = dot[1] = 0;
#pragma unroll 1
    for (int slice = 0; slice < slices; slice++) {
      S g[kTiles][4] = {};
      if (!is_first) take(g, slice);
      add(g, slice, columns(slice));
      if (!is_last || again) keep(g, slice);
      if (!is_last) continue;
      if (is_cosine()) add_dots(dot, g, slice);
      if (!again) finish(g, slice, dot);
    }
    if (is_last && again)
#pragma unroll 1
      for (int slice = 0; slice < slices; slice++) {
        S g[kTiles][4];
        take(g, slice);
        finish(g, slice, dot);
      }
  }

  __device__ __forceinline__ void add_dots(S (&dot)[2], const S (&g)[kTiles][4], int slice) const {
    S product[kTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (8 * j < columns(slice)) product[j][e] = g[j][e] * of_x(slice, j, e);
    add_rows(dot, product);
  }
  __device__ __forceinline__ S of_x(int slice, int j, int e) const {
    return widen(x[row_of(e) * row_stride<T>(call.in.grid.d) + slice * kSlice + column_of(j, e)]);
  }

  __device__ __forceinline__ void finish(S (&g)[kTiles][4], int slice, const S (&dot)[2]) const {
    const S scale = part == kV ? S(1) : call.in.scale_of(head);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const S norm = is_cosine() ? inverse[row_of(e)] : S(1), factor = scale * norm;
      const S along = is_cosine() && norm < S(1) / S(1e-12) ? dot[e / 2] : S(0);
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        if (is_cosine() && 8 * j < columns(slice)) g[j][e] -= of_x(slice, j, e) * along;
        g[j][e] *= factor;
      }
    }
    if (call.want_pad && window.has_pads) add_pads(g, slice);
    if (!call.dqkv) return;
    constexpr int kStride = BackwardSpace<T>::kStageStride;
    const int width = min(kSlice, call.in.grid.d - slice * kSlice);
    write_tile(stage, kStride, g, kSlice);
    write_rows(call.dqkv + call.in.channel(part, head) + slice * kSlice, 3 * call.in.grid.C(), stage, kStride, width,
               call.in.in_chunks, window, first);
  }

  __device__ __forceinline__ void add_pads(const S (&g)[kTiles][4], int slice) const {
    const int N = call.in.grid.N();
    S* const to = dpad + (part * call.sums.slices + slice) * kSlice;
    bool is_pad[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = first + row_of(2 * i);
      is_pad[i] = n < N && window.places[n] == WindowGrid::kPad;
    }
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        S sum = (is_pad[0] ? g[j][e] : S(0)) + (is_pad[1] ? g[j][e + 2] : S(0));
#pragma unroll
        for (int step = 4; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane() < 4) to[column_of(j, e)] += sum;
      }
  }
};

}  // namespace

}  // namespace fvm::cuda
