// SPDX-License-Identifier: Apache-2.0
// The gradients of window_attention. The probabilities are made again from q and k; with P = softmax(S) and O = P V
//
//   dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q,  dbias = sum of dS
//
// and, for cosines, scale = logit_scale / (|q| |k|) inside of the products and the part along q (or k) taken off. A
// window's tokens are nobody else's, so nobody else writes their gradients. What is summed over windows is summed by
// groups of them, which do not depend on the number of threads, and the groups in order.
#include "window_attention.h"
#include "window_sums.h"

namespace fvm::FVM_ISA {

namespace {

// What one thread works in
template <class T> struct BackwardSpace {
  using P = Operand<T>;
  using S = Acc<T>;
  int64_t* places;
  WindowOperands<T> operands;
  Panels<P> dout;
  P *q_pairs, *k_pairs, *dout_pairs;
  S *q_columns, *dout_columns, *keep, *dots;
  GradientBlock<P> block;
  Panels<S> dq, dk, dv;  // dq of a block

  BackwardSpace(Workspace& space, const WindowInputs<T>& in)
      : places(space.take<int64_t>(2 * (in.grid.N() + 1))), operands(space, in.grid) {
    constexpr bool kPairs = Tile<P>::KU > 1;
    const int64_t N = in.grid.N(), d = in.grid.d, size = Panels<P>::size(N, d), area = (N + kSlack) * kQueries;
    dout = {space.take<P>(size), N, d};
    q_pairs = space.take<P>(kPairs ? size : 0), k_pairs = space.take<P>(kPairs ? size : 0);
    dout_pairs = space.take<P>(kPairs ? size : 0);
    q_columns = space.take<S>(columns_size<P>(d)), dout_columns = space.take<S>(columns_size<P>(d));
    keep = space.take<S>(in.dropout ? N * kQueries : 0);
    dots = space.take<S>(N + kQueries);
    block = {};
    block.s = space.take<S>(area), block.dp = space.take<S>(area);
    block.p_rows = kPairs ? space.take<P>(area) : reinterpret_cast<P*>(block.s);
    block.ds_rows = kPairs ? space.take<P>(area) : reinterpret_cast<P*>(block.dp);
    block.ds_steps = kPairs ? space.take<P>(area) : block.ds_rows;
    dq = {space.take<S>(Panels<S>::size(kQueries, d)), kQueries, d};
    dk = {space.take<S>(Panels<S>::size(N, d)), N, d}, dv = {space.take<S>(Panels<S>::size(N, d)), N, d};
  }
};

template <class T> struct Backward {
  using P = Operand<T>;
  using S = Acc<T>;
  static constexpr int NR = Tile<P>::NR, L = kLanes<S>;
  const WindowInputs<T>& in;
  const WindowTables<T>& tables;
  const T* dout;
  T* dqkv;  // or null
  bool want_pad, want_logit_scale;

  bool want_rows() const { return dqkv || want_pad; }

  void differentiate(const BackwardSpace<T>& space, const WindowUnit& unit, const UnitSums<S>& sums) const {
    const int64_t N = in.grid.N();
    read(space, unit);
    const Panels<P> q = token_steps(space.operands.q, space.q_pairs), k = token_steps(space.operands.k, space.k_pairs);
    const Panels<P> g = token_steps(space.dout, space.dout_pairs);
    for (int64_t b = 0; b < in.blocks(); b++) {
      const int64_t first = b * kQueries, queries = min(kQueries, N - first);
      through_softmax(space, unit, b, queries, sums.dbias);
      for (int64_t c = 0; want_rows() && c < k.count(); c++) {
        product_over_queries(space.block.p_rows, N, first, queries, g, c, space.dv.panel(c));
        product_over_queries(space.block.ds_rows, N, first, queries, q, c, space.dk.panel(c));
      }
      if (want_rows() || want_logit_scale) through_queries(space, unit, k, first, queries, sums);
    }
    if (!want_rows()) return;
    if (in.logit_scale) row_dots(space.dots, space.operands.k, space.dk, whole_vectors<S>(N));
    write(space, unit, kK, space.dk, 0, N, sums.dpad);
    write(space, unit, kV, space.dv, 0, N, sums.dpad);
  }

  // The gradient of a block of queries and, as it is a sum of q . dq, that of logit_scale
  void through_queries(const BackwardSpace<T>& space, const WindowUnit& unit, const Panels<P>& k, int64_t first,
                       int64_t queries, const UnitSums<S>& sums) const {
    for (int64_t c = 0; c < k.count(); c++) product_over_keys(space.block.ds_steps, queries, k, c, space.dq.panel(c));
    if (in.logit_scale) {
      const Panels<P> rows{space.operands.q.p + first * NR, in.grid.N(), in.grid.d};
      row_dots(space.dots, rows, space.dq, whole_vectors<S>(queries));
      for (int64_t i = 0; i < queries; i++) *sums.dlogit_scale += space.dots[i];
    }
    if (want_rows()) write(space, unit, kQ, space.dq, first, queries, sums.dpad);
  }

  void read(const BackwardSpace<T>& space, const WindowUnit& unit) const {
    space.operands.read(tables, unit.places, unit.head);
    const int64_t* const places = unit.places;
    const T *const rows = dout + unit.head * in.grid.d, *const zeros = tables.zeros;
    read_rows(space.dout, [=](int64_t n) { return places[n] == WindowGrid::kPad ? zeros : rows + places[n]; });
  }

  // P and dS of a block of queries
  void through_softmax(const BackwardSpace<T>& space, const WindowUnit& unit, int64_t b, int64_t queries,
                       S* dbias) const {
    const int64_t N = in.grid.N(), first = b * kQueries, lanes = whole_vectors<S>(queries);
    transpose_rows(space.q_columns, space.operands.q, first, lanes);
    transpose_rows(space.dout_columns, space.dout, first, lanes);
    space.operands.logits(tables, unit.head, b, space.q_columns, lanes, space.block.s);
    product_over_channels(space.operands.v, space.dout_columns, lanes / L,
                          StoreTile<S, int(kQueries)>{space.block.dp, false});
    GradientBlock<P> block = space.block;
    if (dbias) block.dbias = dbias + b * N * kQueries;
    if (in.logit_scale) block.keys = space.operands.k_norms, block.queries = space.operands.q_norms + first;
    if (in.dropout) {
      in.dropout.factors(unit.window * in.grid.heads + unit.head, first, N, space.keep);
      block.keep = space.keep;
    }
    const BlockMask<S> mask(tables.mask, tables.mask.kind(in.grid, unit.window), first);
    for_each_group<P>(lanes / L, [&]<int NV>(int64_t v) {
      const int64_t group = b == 0 ? v / Tile<P>::NV : 2;
      gradient_group<P, NV>(block, N, mask, v * L, next_rows(unit, group), own_rows(unit, group));
    });
  }

  Prefetch next_rows(const WindowUnit& unit, int64_t group) const {
    auto part = [&](Part part) { return tables.stream(part, unit.next_head, unit.next_places); };
    if (group == 0) return {part(kQ), part(kK)};
    if (group > 1) return {};
    return {part(kV), RowStream::of(dout + unit.next_head * in.grid.d, unit.next_places, 1, in.grid.d)};
  }
  Prefetch own_rows(const WindowUnit& unit, int64_t group) const {
    auto part = [&](Part part) { return RowStream::of(dqkv + in.channel(part, unit.head), unit.places, 3, in.grid.d); };
    if (!dqkv || group > 1) return {};
    return group == 0 ? Prefetch{part(kQ), part(kK)} : Prefetch{part(kV), {}};
  }

  // Gradients of q, k or v of the tokens from `first`: to their rows of dqkv, or to the sum of those outside of the map
  void write(const BackwardSpace<T>& space, const WindowUnit& unit, Part part, const Panels<S>& g, int64_t first,
             int64_t n, S* dpad) const {
    const WindowOperands<T>& own = space.operands;
    const bool cosine = in.logit_scale && part != kV;
    const Panels<P>& x = part == kQ ? own.q : own.k;
    const S* norms = (part == kQ ? own.q_norms : own.k_norms) + first;
    const S scale = part == kV ? S(1) : in.scale_of(unit.head);
    for (int64_t c = 0; c < g.count(); c++) {
      const int64_t channel = in.channel(part, unit.head) + c * NR, width = g.width(c);
      for (int64_t i = 0; i < n; i++) {
        S* row = g.panel(c) + i * NR;
        const int64_t place = unit.places[first + i];
        if (cosine)
          project(row, x.panel(c) + (first + i) * NR, space.dots[i], norms[i], scale, width);
        else
          for (int64_t e = 0; e < width; e += L) store(row + e, load(row + e) * scale);
        if (place == WindowGrid::kPad)
          accumulate(dpad + channel, row, width);
        else if (dqkv)
          write_row(dqkv + place * 3 + channel, row, width);
      }
    }
  }

  // g <- scale (g - x (x . g) / |x|^2): the gradient of a product with x / |x|, which already has 1 / |x|
  static void project(S* g, const P* x, S dot, S inverse_norm, S scale, int64_t width) {
    const S along = inverse_norm < S(1) / S(1e-12) ? inverse_norm * inverse_norm * dot : S(0);
    for (int64_t e = 0; e < width; e += L) store(g + e, (load(g + e) - load_widened(x + e) * along) * scale);
  }
};

template <class T> void run(const Backward<T>& kernel, const PartialSums<T>& sums, char* memory, int64_t threads) {
  const WindowInputs<T>& in = kernel.in;
  Workspace one(nullptr);
  BackwardSpace<T>(one, in);
  parallel_for(sums.tasks.count(), threads, [&](int64_t task, int64_t thread) {
    Workspace own(memory + thread * one.bytes());
    const BackwardSpace<T> space(own, in);
    space.operands.clear_slack(), space.dout.clear_slack();
    sums.clear(in, task);
    for_each_unit(in.grid, sums.tasks, task, space.places, [&](const WindowUnit& unit) {
      kernel.differentiate(space, unit, sums.of(sums.tasks.window_group(task), unit.head));
    });
  });
}

}  // namespace

int64_t window_attention_bwd_workspace(int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t wh,
                                       int64_t ww, bool want_bias, Dtype dtype, int64_t threads) {
  return with_dtype(dtype, [&]<class T>() {
    const WindowInputs<T> in{.grid = {B, H, W, heads, d, wh, ww}, .dropout = {1, 0}};
    Workspace shared(nullptr), own(nullptr);
    WindowTables<T>(shared, in);
    PartialSums<T>(shared, in.grid, want_bias);
    BackwardSpace<T>(own, in);
    return shared.bytes() + threads * own.bytes();
  });
}

void window_attention_bwd(const void* dout, const void* qkv, Maybe<const void> bias, Maybe<const void> logit_scale,
                          Maybe<const void> pad_qkv, Maybe<void> dqkv, Maybe<void> dbias, Maybe<void> dlogit_scale,
                          Maybe<void> dpad_qkv, void* workspace, double scale, double mask_value, double dropout_p,
                          Seed seed, bool pad_then_roll, bool heads_outermost, int64_t B, int64_t H, int64_t W,
                          int64_t heads, int64_t d, int64_t wh, int64_t ww, int64_t sh, int64_t sw, Dtype dtype,
                          int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    using S = Acc<T>;
    auto parameter = [](Maybe<const void> p) { return static_cast<const S*>(p.p); };
    const WindowInputs<T> in{.grid = {B, H, W, heads, d, wh, ww, sh, sw, pad_then_roll},
                             .qkv = static_cast<const T*>(qkv),
                             .bias = parameter(bias),
                             .logit_scale = parameter(logit_scale),
                             .pad_qkv = parameter(pad_qkv),
                             .scale = scale,
                             .mask_value = mask_value,
                             .dropout = {dropout_p, uint64_t(seed)},
                             .heads_outermost = heads_outermost};
    Workspace arena(workspace);
    const WindowTables<T> tables(arena, in);
    const PartialSums<T> sums(arena, in.grid, bool(dbias));
    tables.fill(threads);
    const Backward<T> kernel{.in = in,
                             .tables = tables,
                             .dout = static_cast<const T*>(dout),
                             .dqkv = static_cast<T*>(dqkv.p),
                             .want_pad = bool(dpad_qkv),
                             .want_logit_scale = bool(dlogit_scale)};
    run(kernel, sums, arena.take<char>(0), threads);
    if (dbias) sums.add_bias(static_cast<S*>(dbias.p), threads);
    if (dpad_qkv) add_groups(sums.dpad, sums.tasks.window_groups, 3 * in.grid.C(), static_cast<S*>(dpad_qkv.p));
    if (dlogit_scale) add_groups(sums.dlogit_scale, sums.tasks.window_groups, heads, static_cast<S*>(dlogit_scale.p));
  });
}

}  // namespace fvm::FVM_ISA
