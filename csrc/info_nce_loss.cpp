// SPDX-License-Identifier: Apache-2.0
// info_nce_loss forward: each query against its own positive key and a long queue of negative ones (He et al. 2020,
// https://arxiv.org/abs/1911.05722).
//
//   L_i = lse_i - S_i+,  S = scale Q K^T,  lse_i over the keys and the positive one,  p_ij = exp(S_ij - lse_i)
//   dL_i/dq_i = scale pull_i,  pull_i = sum_j p_ij k_j - miss_i k_i+,  miss_i = 1 - p_i+ = sum_j p_ij
//
// The queue serves as keys and as values: one pass over it, with running sums (the online softmax of flash attention),
// makes the log-sum-exps and the pulls. That is 4 n K D operations in all, for the backward needs no pass of its own.
// What a query misses is summed, never a difference: one that is told apart well loses no digits.
//
// A task takes a block of queries along a stripe of the queue; the stripes of a query are merged in their order. Where
// both are cut depends on the sizes alone.
#include "contrastive_loss.h"
#include "log_sum_exp.h"

namespace fvm::FVM_ISA {

namespace {

// The reference of a row is raised when a logit passes it by this much, and not before: rows are seldom rescaled, and
// a term of exp(8) is no less exact than one of 1.
constexpr double kSlack = 8;

template <class T> struct Attention {
  using P = Operand<T>;
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, KU = Tile<P>::KU, L = kLanes<A>;
  static constexpr int W = Blocks<P>::kWidth;  // keys at a time
  static constexpr int kPanels = 20;  // of queries in a block: what it works on stays in the second-level cache

  const T* keys;  // [K, D]
  int64_t n, K, D;
  int64_t rows, row_blocks, stripe, stripes;  // of a block, and how many; keys of a stripe, and how many
  bool want_mean;
  Scale<A> scale;
  P* queries;           // in panels of MR
  A *ref, *sum, *mean;  // [stripes, n] and [stripes, n, D]: sums of exp(S - ref), and of that times the key
  P *own_keys, *own_values, *own_weights;  // [threads]: W keys as either operand, weights [rows, W] of a block
  A* own_similarities;                     // [threads, rows, W]
  V* own_sums;                             // [threads, rows], spread over the lanes

  Attention(Workspace& ws, const T* keys, int64_t n, int64_t K, int64_t D, bool want_mean, double scale,
            int64_t threads)
      : keys(keys), n(n), K(K), D(D), want_mean(want_mean), scale(scale) {
    const int64_t panels = ceil_div(n, MR);
    row_blocks = ceil_div(panels, kPanels), rows = ceil_div(panels, row_blocks) * MR;
    // No stripe has fewer keys than there are queries: the means of all take no more room than the queue.
    const int64_t most = ceil_div(K, n > 256 ? n : 256);
    stripe = K == 0 ? W : round_up(ceil_div(K, min(most, 32)), W), stripes = ceil_div(K, stripe);
    queries = ws.take<P>(packed_size<P>(n, D, MR));
    ref = ws.take<A>(stripes * n), sum = ws.take<A>(stripes * n), mean = ws.take<A>(want_mean ? stripes * n * D : 0);
    own_keys = ws.take<P>(threads * W * padded_k<P>(D));
    own_values = ws.take<P>(want_mean ? threads * packed_size<P>(D, W, NR) : 0);
    own_similarities = ws.take<A>(threads * rows * W);
    // in place of the similarities where they are as wide
    own_weights = sizeof(P) < sizeof(A) ? ws.take<P>(threads * rows * W) : reinterpret_cast<P*>(own_similarities);
    own_sums = ws.take<V>(threads * rows);
  }

  // Similarities become weights exp(scale * (similarity - ref)). Returns what earlier sums are worth now.
  A weigh(const A* u, P* weights, int64_t columns, A& reference, V& total) const {
    V top = load(u) * scale.sign;
    for (int64_t j = L; j < columns; j += L) top = max<A>(top, load(u + j) * scale.sign);
    const A high = max_lanes<A>(top);
    A keep = 1;
    if (!((high - reference) * scale.size <= A(kSlack))) {  // NaN goes on
      keep = vexp(splat((reference - high) * scale.size))[0];
      reference = high;
    }
    V added = {};
    for (int64_t j = 0; j < columns; j += L) {
      const V e = vexp((load(u + j) * scale.sign - reference) * scale.size);
      added += e;
      store_narrowed(weights + j, e);
    }
    total = total * keep + added;
    return keep;
  }

  // A block of queries against a stripe of keys.
  void attend(int64_t task, int64_t thread) const {
    const int64_t i0 = task % row_blocks * rows, height = min(rows, n - i0), s = task / row_blocks;
    const int64_t first = s * stripe, last = min(first + stripe, K), Kp = padded_k<P>(D);
    A *refs = ref + s * n + i0, *means = mean + (s * n + i0) * D, *u = own_similarities + thread * rows * W;
    P *k = own_keys + thread * W * Kp, *weights = own_weights + thread * rows * W;
    V* sums = own_sums + thread * rows;
    for (int64_t i = 0; i < height; i++) refs[i] = kLowest<A>, sums[i] = V{};
    for (int64_t j0 = first; j0 < last; j0 += W) {
      const int64_t width = min(W, last - j0), columns = round_up(width, NR);
      pack_rows<NR>(k, keys + j0 * D, D, width, D);
      for (int64_t j = 0; j < width; j += NR)
        for (int64_t i = 0; i < height; i += MR) tile<P>(D, queries + (i0 + i) * Kp, k + j * Kp, u + i * W + j, W);
      for (int64_t i = 0; i < height; i++) {
        for (int64_t j = width; j < columns; j++) u[i * W + j] = scale.sign * kLowest<A>;
        const A keep = weigh(u + i * W, weights + i * W, columns, refs[i], sums[i]);
        if (want_mean && keep != 1 && j0 > first)
          for (int64_t d = 0; d < D; d++) means[i * D + d] *= keep;
      }
      if (want_mean)
        add_values(j0, width, height, weights, own_values + thread * packed_size<P>(D, W, NR), means, j0 > first);
    }
    for (int64_t i = 0; i < height; i++) sum[s * n + i0 + i] = sum_lanes<A>(sums[i]);
  }

  // means (+)= weights times keys
  void add_values(int64_t j0, int64_t width, int64_t height, const P* weights, P* values, A* means, bool add) const {
    pack_columns<NR>(values, keys + j0 * D, D, D, width);
    for (int64_t d = 0; d < D; d += NR)
      for (int64_t i = 0; i < height; i += MR)
        tile_partial<P, W, KU>(width, weights + i * W, values + d * padded_k<P>(width), means + i * D + d, D, add,
                               min(MR, height - i), min(NR, D - d));
  }

  // ---- the stripes of a query, and its positive key where there is one

  void finish(int64_t i, const T* query, const T* positive, double* stats, A* pull) const {
    A top = kLowest<A>;
    for (int64_t s = 0; s < stripes; s++) top = ref[s * n + i] <= top ? top : ref[s * n + i];
    double total = 0;
    for (int64_t s = 0; s < stripes; s++) total += double(sum[s * n + i]) * worth(s, i, top);
    double miss = 1, lse = double(scale.size) * double(top) + std::log(total), loss = lse;
    if (positive) {
      double similarity = 0;
      for (int64_t d = 0; d < D; d++) similarity += double(widen(query[d])) * double(widen(positive[d]));
      const double ahead = double(scale.size) * (similarity * double(scale.sign) - double(top));
      const double odds = total * std::exp(-ahead);  // of all others against the positive key
      miss = 1 / (1 + 1 / odds);
      loss = ahead > -600 ? std::log1p(odds) : std::log(total) - ahead;
      lse = loss + double(scale.size) * double(scale.sign) * similarity;
    }
    stats[i] = loss, stats[n + i] = miss, stats[2 * n + i] = lse;
    if (!pull) return;
    for (int64_t d = 0; d < D; d++) pull[d] = positive ? -A(miss) * A(widen(positive[d])) : 0;
    for (int64_t s = 0; s < stripes; s++) {
      const A share = A(miss * worth(s, i, top) / total), *of = mean + (s * n + i) * D;
      for (int64_t d = 0; d < D; d++) pull[d] += share * of[d];
    }
  }
  double worth(int64_t s, int64_t i, A top) const {
    return std::exp(double(scale.size) * (double(ref[s * n + i]) - double(top)));
  }

  void run(const T* query, const T* positive, double* stats, A* pull, int64_t threads) const {
    pack_rows_parallel<MR>(queries, query, n, D, threads);
    parallel_for(row_blocks * stripes, threads, [&](int64_t task, int64_t thread) { attend(task, thread); });
    parallel_for(ceil_div(n, 16), threads, [&](int64_t task, int64_t) {
      for (int64_t i = task * 16; i < min(task * 16 + 16, n); i++)
        finish(i, query + i * D, positive ? positive + i * D : nullptr, stats, pull ? pull + i * D : nullptr);
    });
  }
};

}  // namespace

int64_t info_nce_loss_fwd_workspace(int64_t n, int64_t K, int64_t D, bool want_pull, Dtype dtype, int64_t threads) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace ws(nullptr);
    Attention<T>(ws, nullptr, n, K, D, want_pull, 0, threads);
    return ws.bytes();
  });
}

void info_nce_loss_fwd(const void* query, Maybe<const void> positive, Maybe<const void> keys, double* stats, void* loss,
                       Maybe<void> pull, void* workspace, Scalar scale, int64_t n, int64_t K, int64_t D, Dtype dtype,
                       int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    Workspace ws(workspace);
    const Attention<T> attention(ws, static_cast<const T*>(keys.p), n, K, D, bool(pull), scale, threads);
    attention.run(static_cast<const T*>(query), static_cast<const T*>(positive.p), stats, static_cast<Acc<T>*>(pull.p),
                  team(threads, n * K * D));
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += stats[i];
    *static_cast<Acc<T>*>(loss) = Acc<T>(sum / double(n));
  });
}

}  // namespace fvm::FVM_ISA
