// SPDX-License-Identifier: Apache-2.0
// softmax(scale q k^T + bias + mask) v inside the shifted windows of a map (Liu et al. 2021,
// https://arxiv.org/abs/2103.14030), or with the cosine of q and k (Liu et al. 2022, https://arxiv.org/abs/2111.09883).
// One (window, head) at a time goes from the map to operands in the cache and back; its N x N logits exist for a block
// of 64 queries only. This file: what the forward and the backward know of their inputs, and how they go through them.
#pragma once
#include "dtype_dispatch.h"
#include "kernels.h"
#include "window_dropout.h"
#include "window_softmax.h"

namespace fvm::FVM_ISA {

enum Part { kQ = 0, kK = 1, kV = 2 };

template <class T> struct WindowInputs {
  using S = Acc<T>;
  WindowGrid grid;
  const T* qkv = nullptr;
  const S *bias = nullptr, *logit_scale = nullptr, *pad_qkv = nullptr;
  double scale = 1, mask_value = 0;
  Dropout dropout;
  bool heads_outermost = false;

  int64_t channel(Part part, int64_t head) const {
    return heads_outermost ? (head * 3 + part) * grid.d : part * grid.C() + head * grid.d;
  }
  // logits are held times log2(e), so that probabilities are powers of two
  static constexpr double kLog2e = 1.44269504088896340736;
  S scale_of(int64_t head) const { return logit_scale ? logit_scale[head] : S(scale); }
  int64_t blocks() const { return ceil_div(grid.N(), kQueries); }
};

// of a head's bias as the kernels hold it: [blocks of queries, N, kQueries], transposed as the logits are
static inline int64_t bias_size(const WindowGrid& grid) { return ceil_div(grid.N(), kQueries) * grid.N() * kQueries; }

template <class S> static inline int64_t whole_vectors(int64_t n) { return ceil_div(n, kLanes<S>) * kLanes<S>; }

// What all windows share, made once for a call
template <class T> struct WindowTables {
  using S = Acc<T>;
  const WindowInputs<T>& in;
  ShiftMask<S> mask;
  S* bias;     // [heads, blocks of queries, N, 64], zero where there is no query; without a bias a row of zeros
  T* pad_row;  // [3C]: what is read for a token outside of the map
  T* zeros;    // [C]: the gradient of its output

  WindowTables(Workspace& space, const WindowInputs<T>& in) : in(in), mask(space, in.grid.N()) {
    bias = space.take<S>(in.grid.heads * bias_size(in.grid) + kSlack * kQueries);
    pad_row = space.take<T>(3 * in.grid.C()), zeros = space.take<T>(in.grid.C());
  }

  RowStream stream(Part part, int64_t head, const int64_t* places) const {
    return RowStream::of(in.qkv + in.channel(part, head), places, 3, in.grid.d);
  }

  void fill(int64_t threads) const {
    mask.fill(in.grid, in.mask_value * in.kLog2e);
    for (int64_t c = 0; c < 3 * in.grid.C(); c++) pad_row[c] = in.pad_qkv ? narrow<T>(in.pad_qkv[c]) : T{};
    memset(static_cast<void*>(zeros), 0, in.grid.C() * sizeof(T));
    if (!in.bias) memset(static_cast<void*>(bias), 0, kQueries * sizeof(S));
    const int64_t N = in.grid.N();
    constexpr int L = kLanes<S>;
    parallel_for(in.bias ? in.grid.heads * in.blocks() : 0, threads, [&](int64_t task, int64_t) {
      const int64_t first = task % in.blocks() * kQueries;
      const S* from = in.bias + (task / in.blocks() * N + first) * N;
      S* to = bias + task * N * kQueries;
      for (int64_t i = 0; i < kQueries; i += L)
        for (int64_t j = 0; j < N; j += L)
          transpose_tile(to + j * kQueries + i, kQueries, from + i * N + j, N, N - first - i, N - j, L, S(in.kLog2e));
    });
  }
};

// ---- one window and head

// The operands, and the norms of q and k where cosines are wanted
template <class T> struct WindowOperands {
  using P = Operand<T>;
  using S = Acc<T>;
  Panels<P> q, k, v;
  S *q_norms, *k_norms, *scales;  // 1 / |q| and 1 / |k|; the former times scale for a block

  WindowOperands(Workspace& space, const WindowGrid& grid) {
    const int64_t N = grid.N(), d = grid.d, size = Panels<P>::size(N, d);
    q = {space.take<P>(size), N, d}, k = {space.take<P>(size), N, d}, v = {space.take<P>(size), N, d};
    q_norms = space.take<S>(N + kQueries), k_norms = space.take<S>(N + kQueries);
    scales = space.take<S>(kQueries);
  }
  void clear_slack() const { q.clear_slack(), k.clear_slack(), v.clear_slack(); }

  void read(const WindowTables<T>& tables, const int64_t* places, int64_t head) const {
    const Panels<P>* const parts[] = {&q, &k, &v};
    for (int part = 0; part < 3; part++) {
      const int64_t channel = tables.in.channel(Part(part), head);
      const T *const qkv = tables.in.qkv + channel, *const pad = tables.pad_row + channel;
      read_rows(*parts[part], [=](int64_t n) { return places[n] == WindowGrid::kPad ? pad : qkv + places[n] * 3; });
    }
    if (!tables.in.logit_scale) return;
    inverse_norms(q_norms, q, whole_vectors<S>(q.n));
    inverse_norms(k_norms, k, whole_vectors<S>(k.n));
  }

  // Of all keys and a block of queries, transposed before into `columns`
  void logits(const WindowTables<T>& tables, int64_t head, int64_t block, const S* columns, int64_t lanes, S* s) const {
    const WindowInputs<T>& in = tables.in;
    const S* bias = in.bias ? tables.bias + (head * in.blocks() + block) * q.n * kQueries : tables.bias;
    const S scale = in.scale_of(head) * S(in.kLog2e);
    const ScaledLogits<S> scaled{s, bias, in.bias ? kQueries : 0, scale};
    if (in.logit_scale) {
      const S* norms = q_norms + block * kQueries;
      for (int64_t i = 0; i < lanes; i++) scales[i] = norms[i] * scale;
      product_over_channels(k, columns, lanes / kLanes<S>, CosineLogits<S>{scaled, k_norms, scales});
    } else
      product_over_channels(k, columns, lanes / kLanes<S>, scaled);
  }
};

// A block of queries, transposed
template <class P> constexpr int64_t columns_size(int64_t d) {
  return ceil_div(d, Tile<P>::NR) * (Tile<P>::NR / Tile<P>::KU) * kQueries;
}

// ---- all windows and heads

// A task is some windows times some heads: all heads, as they are neighbours in memory, unless their biases are too
// large to stay in the second-level cache or there are too few windows to go round. Tasks of the same heads follow each
// other.
struct WindowTasks {
  int64_t windows, heads;  // of a task
  int64_t window_groups, head_groups;

  WindowTasks(const WindowGrid& grid, int64_t most_groups, int64_t bias_bytes) {
    constexpr int64_t kTasks = 64, kCache = int64_t(768) << 10;
    windows = ceil_div(grid.windows(), min(grid.windows(), most_groups < 1 ? 1 : most_groups));
    window_groups = ceil_div(grid.windows(), windows);
    const int64_t cached = ceil_div(kCache, bias_bytes), shared = ceil_div(grid.heads, ceil_div(kTasks, window_groups));
    heads = min(grid.heads, min(cached, shared));
    head_groups = ceil_div(grid.heads, heads);
  }
  int64_t count() const { return window_groups * head_groups; }
  int64_t window_group(int64_t task) const { return task % window_groups; }
  int64_t first_head(int64_t task) const { return task / window_groups * heads; }
};

struct WindowUnit {
  int64_t window, head;
  const int64_t* places;  // of its tokens
  int64_t next_head;
  const int64_t* next_places;
};

// f(unit) for each window and head of a task. places: two times N + 1
template <class F>
static inline void for_each_unit(const WindowGrid& grid, const WindowTasks& tasks, int64_t task, int64_t* places,
                                 F&& f) {
  const int64_t w0 = tasks.window_group(task) * tasks.windows, w1 = min(w0 + tasks.windows, grid.windows());
  const int64_t h0 = tasks.first_head(task), h1 = min(h0 + tasks.heads, grid.heads);
  int64_t *here = places, *next = places + grid.N() + 1;
  grid.places_of(w0, here);
  for (int64_t w = w0; w < w1; w++) {
    for (int64_t h = h0; h < h1 - 1; h++) f(WindowUnit{w, h, here, h + 1, here});
    grid.places_of(min(w + 1, w1 - 1), next);
    f(WindowUnit{w, h1 - 1, here, h0, next});
    int64_t* const swapped = here;
    here = next, next = swapped;
  }
}

}  // namespace fvm::FVM_ISA
