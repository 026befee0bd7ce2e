// SPDX-License-Identifier: Apache-2.0
// info_nce_loss backward, for keys that are learned: dL/dk_j = scale sum_i G_ij q_i with G_ij = (p_ij - share_ij) / n.
// What the queries and their own keys need the forward has made.
#include "log_sum_exp.h"
#include "pair_gradients.h"

namespace fvm::FVM_ISA {

namespace {

template <class T> struct KeyGradient {
  using P = Operand<T>;
  using A = Acc<T>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, L = kLanes<A>;
  int64_t n;
  Scale<A> scale;
  Positives<P> positives;
  Lse<A> lse;     // [n], padded to whole panels
  double* share;  // [n], padded: of a row in each of its positives
  bool has_positives;

  KeyGradient(Workspace& ws, int64_t n, int64_t K, double scale, bool has_positives)
      : n(n),
        scale(scale),
        positives(ws, n, K),
        lse{ws.take<A>(round_up(n, MR)), ws.take<A>(round_up(n, MR))},
        share(ws.take<double>(round_up(n, MR))),
        has_positives(has_positives) {}

  void fill(const int32_t* row_ids, const int32_t* key_ids, const double* lse_of, const double* share_of) const {
    if (has_positives) positives.fill(row_ids, key_ids);
    for (int64_t i = 0; i < round_up(n, MR); i++) {
      lse.set(i, i < n ? lse_of[i] : 0, scale);
      share[i] = i < n && has_positives ? share_of[i] : 0;
    }
  }

  void operator()(int64_t i0, int64_t j0, int64_t rows, int64_t columns, const A* similarities, A* g, Sums&) const {
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += L)
        store(g + i * NR + j, probability(load(similarities + i * NR + j) * scale.sign, scale.size,
                                          splat(lse.ref[i0 + i]), splat(lse.rest[i0 + i])));
    if (has_positives) positives.for_each(i0, j0, [&](int i, int j) { g[i * NR + j] -= A(share[i0 + i]); });
    if (is_partial<P>(rows, columns)) fill_outside<P>(g, rows, columns, 0);
  }
};

}  // namespace

int64_t info_nce_loss_bwd_workspace(int64_t n, int64_t K, int64_t D, Dtype dtype, int64_t) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace ws(nullptr);
    GradientSpace<T>(ws, n, K, D, false, true);
    KeyGradient<T>(ws, n, K, 0, false);
    return ws.bytes();
  });
}

void info_nce_loss_bwd(const void* query, const void* keys, Maybe<const int32_t> row_ids, Maybe<const int32_t> key_ids,
                       const double* lse, Maybe<const double> share, void* dkeys, void* workspace, Scalar scale,
                       Scalar dloss, int64_t n, int64_t K, int64_t D, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    Workspace ws(workspace);
    const GradientSpace<T> space(ws, n, K, D, false, true);
    const KeyGradient<T> gradient(ws, n, K, scale, bool(share));
    gradient.fill(row_ids.p, key_ids.p, lse, share.p);
    const Pairs<T> pairs{static_cast<const T*>(query), static_cast<const T*>(keys), n, K, D};
    pair_gradients(pairs, space, static_cast<Acc<T>*>(nullptr), static_cast<Acc<T>*>(dkeys),
                   Acc<T>(scale * dloss / double(n)), team(threads, n * K * D), gradient);
  });
}

}  // namespace fvm::FVM_ISA
