// SPDX-License-Identifier: Apache-2.0
// siglip_loss: a sigmoid for each pair (Zhai et al. 2023, https://arxiv.org/abs/2303.15343). The gradient of a pair
// needs that pair only, so that one pass makes the loss and the gradients.
#include "pair_gradients.h"

namespace fvm::FVM_ISA {

namespace {

// Of a pair with logit S and sign z (+1 positive, -1 negative): loss log(1 + exp(-z S)), gradient -z sigmoid(-z S).
template <class T> struct SigmoidPairs {
  using P = Operand<T>;
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>;
  Positives<P> positives;
  A scale, bias;

  void operator()(int64_t i0, int64_t j0, int64_t rows, int64_t columns, const A* similarities, A* g,
                  Sums& sums) const {
    alignas(64) A sign[MR * NR], logits[MR * NR];
    if (!is_partial<P>(rows, columns) && !positives.possible(i0, j0))
      return add<false>(similarities, sign, logits, g, sums);
    for (int e = 0; e < MR * NR; e++) sign[e] = 1, logits[e] = scale * similarities[e] + bias;
    positives.for_each(i0, j0, [&](int i, int j) { sign[i * NR + j] = -1; });
    fill_outside<P>(logits, rows, columns, -A(INFINITY));  // no loss, no gradient
    add<true>(similarities, sign, logits, g, sums);
  }

  // sign: -z. Not `special`: all pairs of the tile are negative ones, and the two arrays are not read.
  template <bool special>
  void add(const A* similarities, const A* sign, const A* logits, A* g, Sums& sums) const {
    V loss = {}, dscale = {}, dbias = {};
    for (int e = 0; e < MR * NR; e += L) {
      const V similarity = load(similarities + e);
      const V z = special ? load(sign + e) : splat(A(1));
      const V v = special ? z * load(logits + e) : similarity * scale + bias;
      const V small = vexp(v < 0 ? v : -v);  // exp(-|v|)
      const V inverse = 1 / (1 + small);
      const V gradient = z * (v < 0 ? small * inverse : inverse);
      loss += max<A>(v, V{}) + vlog1p(small);
      dscale += gradient * similarity;
      dbias += gradient;
      store(g + e, gradient);
    }
    sums.loss += sum_lanes<A>(loss), sums.scale += sum_lanes<A>(dscale), sums.bias += sum_lanes<A>(dbias);
  }
};

template <class T>
void siglip(const Pairs<T>& p, const int32_t* row_ids, const int32_t* col_ids, double scale, double bias, double weight,
            Acc<T>* loss, Acc<T>* slopes, Acc<T>* dx, Acc<T>* dy, void* workspace, int64_t threads) {
  Workspace space(workspace);
  const GradientSpace<T> ws(space, p.n, p.m, p.D, dx != nullptr, dy != nullptr);
  const SigmoidPairs<T> pairs{{space, p.n, p.m}, Acc<T>(scale), Acc<T>(bias)};
  pairs.positives.fill(row_ids, col_ids);
  const Sums total = pair_gradients(p, ws, dx, dy, Acc<T>(scale * weight), threads, pairs);
  *loss = Acc<T>(total.loss * weight);
  slopes[0] = Acc<T>(total.scale * weight), slopes[1] = Acc<T>(total.bias * weight);
}

}  // namespace

int64_t siglip_loss_workspace(int64_t n, int64_t m, int64_t D, bool want_x, bool want_y, Dtype dtype, int64_t) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace space(nullptr);
    GradientSpace<T>(space, n, m, D, want_x, want_y);
    Positives<Operand<T>>(space, n, m);
    return space.bytes();
  });
}

void siglip_loss(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids, Scalar scale,
                 Scalar bias, double weight, void* loss, void* slopes, Maybe<void> dx, Maybe<void> dy, void* workspace,
                 int64_t n, int64_t m, int64_t D, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    using A = Acc<T>;
    const Pairs<T> p{static_cast<const T*>(x), static_cast<const T*>(y), n, m, D};
    siglip(p, row_ids.p, col_ids.p, scale, bias, weight, static_cast<A*>(loss), static_cast<A*>(slopes),
           static_cast<A*>(dx.p), static_cast<A*>(dy.p), workspace, team(threads, n * m * D));
  });
}

}  // namespace fvm::FVM_ISA
