// SPDX-License-Identifier: Apache-2.0
// The forward of window_attention.
#include "window_attention.h"

namespace fvm::FVM_ISA {

namespace {

// What one thread works in
template <class T> struct ForwardSpace {
  using P = Operand<T>;
  using S = Acc<T>;
  int64_t* places;
  WindowOperands<T> operands;
  P *v_pairs, *p;
  S *q_columns, *s, *keep, *out, *inverse_sum;

  ForwardSpace(Workspace& space, const WindowInputs<T>& in)
      : places(space.take<int64_t>(2 * (in.grid.N() + 1))), operands(space, in.grid) {
    const int64_t N = in.grid.N(), d = in.grid.d;
    constexpr bool kPairs = Tile<P>::KU > 1;
    v_pairs = space.take<P>(kPairs ? Panels<P>::size(N, d) : 0);
    q_columns = space.take<S>(columns_size<P>(d));
    s = space.take<S>((N + kSlack) * kQueries);
    p = kPairs ? space.take<P>((N + kSlack) * kQueries) : reinterpret_cast<P*>(s);
    keep = space.take<S>(in.dropout ? N * kQueries : 0);
    out = space.take<S>((kQueries + kSlack) * Tile<P>::NR);
    inverse_sum = space.take<S>(kQueries);
  }
};

template <class T> struct Forward {
  using P = Operand<T>;
  using S = Acc<T>;
  static constexpr int NR = Tile<P>::NR, L = kLanes<S>;
  const WindowInputs<T>& in;
  const WindowTables<T>& tables;
  T* out;

  void attend(const ForwardSpace<T>& space, const WindowUnit& unit) const {
    space.operands.read(tables, unit.places, unit.head);
    const Panels<P> v = token_steps(space.operands.v, space.v_pairs);
    for (int64_t block = 0; block < in.blocks(); block++) {
      const int64_t first = block * kQueries, queries = min(kQueries, in.grid.N() - first);
      probabilities(space, unit, block, queries);
      for (int64_t c = 0; c < v.count(); c++) {
        product_over_keys(space.p, queries, v, c, space.out);
        write(space, unit, first, queries, c, v.width(c));
      }
    }
  }

  void probabilities(const ForwardSpace<T>& space, const WindowUnit& unit, int64_t block, int64_t queries) const {
    const int64_t N = in.grid.N(), first = block * kQueries, lanes = whole_vectors<S>(queries);
    transpose_rows(space.q_columns, space.operands.q, first, lanes);
    space.operands.logits(tables, unit.head, block, space.q_columns, lanes, space.s);
    if (in.dropout) in.dropout.factors(unit.window * in.grid.heads + unit.head, first, N, space.keep);
    const Prefetch ahead[] = {
        {tables.stream(kQ, unit.next_head, unit.next_places), tables.stream(kK, unit.next_head, unit.next_places)},
        {tables.stream(kV, unit.next_head, unit.next_places),
         RowStream::of(out + unit.head * in.grid.d, unit.places, 1, in.grid.d)}};
    const BlockMask<S> mask(tables.mask, tables.mask.kind(in.grid, unit.window), first);
    for_each_group<P>(lanes / L, [&]<int NV>(int64_t v) {
      const int64_t group = v / Tile<P>::NV;
      softmax_group<P, NV>(space.s, space.p, N, mask, in.dropout ? space.keep : nullptr, space.inverse_sum, v * L,
                           block == 0 && group < 2 ? ahead[group] : Prefetch{});
    });
  }

  // A panel of channels of the outputs of a block
  void write(const ForwardSpace<T>& space, const WindowUnit& unit, int64_t first, int64_t queries, int64_t c,
             int64_t width) const {
    T* const to = out + unit.head * in.grid.d + c * NR;
    for (int64_t i = 0; i < queries; i++) {
      const int64_t place = unit.places[first + i];
      if (place == WindowGrid::kPad) continue;
      S* row = space.out + i * NR;
      for (int64_t e = 0; e < width; e += L) store(row + e, load(row + e) * space.inverse_sum[i]);
      write_row(to + place, row, width);
    }
  }
};

constexpr int64_t kWindowGroups = 128;

template <class T> void forward(const WindowInputs<T>& in, T* out, void* workspace, int64_t threads) {
  Workspace arena(workspace), one(nullptr);
  const WindowTables<T> tables(arena, in);
  ForwardSpace<T>(one, in);
  char* const memory = arena.take<char>(0);
  tables.fill(threads);
  const Forward<T> kernel{in, tables, out};
  const WindowTasks tasks(in.grid, kWindowGroups, bias_size(in.grid) * int64_t(sizeof(Acc<T>)));
  parallel_for(tasks.count(), threads, [&](int64_t task, int64_t thread) {
    Workspace own(memory + thread * one.bytes());
    const ForwardSpace<T> space(own, in);
    space.operands.clear_slack();
    for_each_unit(in.grid, tasks, task, space.places, [&](const WindowUnit& unit) { kernel.attend(space, unit); });
  });
}

}  // namespace

int64_t window_attention_fwd_workspace(int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t wh,
                                       int64_t ww, Dtype dtype, int64_t threads) {
  return with_dtype(dtype, [&]<class T>() {
    const WindowInputs<T> in{.grid = {B, H, W, heads, d, wh, ww}, .dropout = {1, 0}};
    Workspace shared(nullptr), own(nullptr);
    WindowTables<T>(shared, in);
    ForwardSpace<T>(own, in);
    return shared.bytes() + threads * own.bytes();
  });
}

void window_attention_fwd(const void* qkv, Maybe<const void> bias, Maybe<const void> logit_scale,
                          Maybe<const void> pad_qkv, void* out, void* workspace, double scale, double mask_value,
                          double dropout_p, Seed seed, bool pad_then_roll, bool heads_outermost, int64_t B, int64_t H,
                          int64_t W, int64_t heads, int64_t d, int64_t wh, int64_t ww, int64_t sh, int64_t sw,
                          Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    auto parameter = [](Maybe<const void> p) { return static_cast<const Acc<T>*>(p.p); };
    const WindowInputs<T> in{.grid = {B, H, W, heads, d, wh, ww, sh, sw, pad_then_roll},
                             .qkv = static_cast<const T*>(qkv),
                             .bias = parameter(bias),
                             .logit_scale = parameter(logit_scale),
                             .pad_qkv = parameter(pad_qkv),
                             .scale = scale,
                             .mask_value = mask_value,
                             .dropout = {dropout_p, uint64_t(seed)},
                             .heads_outermost = heads_outermost};
    forward<T>(in, static_cast<T*>(out), workspace, threads);
  });
}

}  // namespace fvm::FVM_ISA
