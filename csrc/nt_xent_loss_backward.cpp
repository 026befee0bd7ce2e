// SPDX-License-Identifier: Apache-2.0
// nt_xent_loss backward: G above the diagonal, a chunk of rows at a time, then dZ += G Z and dZ += G^T Z of the chunk.
//
// G is kept in square blocks, so that both products read it a block at a time, whichever way. A task of the products
// owns the rows of dZ of one block: no two threads add to the same row, and each adds in a fixed order.
#include "nt_xent_loss.h"

namespace fvm::FVM_ISA {

namespace {

template <class T> struct NtXentBackward {
  using P = Operand<T>;
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, KU = Tile<P>::KU, L = kLanes<A>;
  static constexpr int W = Blocks<P>::kWidth;  // of a block: whole panels of rows and of columns
  static_assert(W % MR == 0 && W % NR == 0);
  static constexpr int64_t kArea = W * W, kHeight = 4;  // blocks of rows: G of a chunk should fit into the last cache
  static constexpr bool kPairs = KU == 2;               // G^T Z takes rows of G in pairs: a second copy
  Triangle<P> triangle;
  int64_t R, D, blocks, chunk;  // blocks of all rows, and of the rows of a chunk
  P *rows, *cols, *features;    // z: in panels of MR rows, of NR rows, and of NR features over all rows
  P *g, *g_pairs;               // [chunk, blocks, W, W]
  Terms<A> terms;               // [R], padded
  double* dscales;              // [chunk, blocks]
  Scale<A> scale;
  A weight;

  NtXentBackward(Workspace& ws, int64_t R, int64_t D, double scale, double weight)
      : triangle{R}, R(R), D(D), blocks(ceil_div(R, W)), scale(scale), weight(A(weight)) {
    const int64_t most = Blocks<P>::kBytes / (blocks * kArea * int64_t(sizeof(P)) * (kPairs ? 2 : 1));
    chunk = min(blocks, min(kHeight, most < 1 ? 1 : most));
    rows = ws.take<P>(packed_size<P>(R, D, MR)), cols = ws.take<P>(packed_size<P>(R, D, NR));
    features = ws.take<P>(packed_size<P>(D, R, NR));
    g = ws.take<P>(chunk * blocks * kArea), g_pairs = ws.take<P>(kPairs ? chunk * blocks * kArea : 0);
    const int64_t padded = round_up(R, W) + kLanes<A>;
    terms = {ws.take<A>(padded), {ws.take<A>(padded), ws.take<A>(padded)}};
    dscales = ws.take<double>(chunk * blocks);
  }

  void fill(const T* z, const double* lse_of, int64_t threads) const {
    for (int64_t i = 0; i < round_up(R, W) + kLanes<A>; i++)
      terms.weight[i] = weight, terms.lse.set(i, i < R ? lse_of[i] : 0, scale);
    pack_rows_parallel<MR>(rows, z, R, D, threads);
    pack_rows_parallel<NR>(cols, z, R, D, threads);
    pack_features_parallel<NR>(features, z, R, D, threads);
  }

  // ---- G of a tile

  // Makes G of a tile of similarities; returns its part of the derivative by the scale.
  double gradient(const A* u, A* out, int64_t i0, int64_t j0) const {
    // the diagonal's similarities are no part of a log-sum-exp, and far above all others
    const WeightedProbabilities<P> probabilities{terms, terms, scale};
    probabilities(u, out, i0, j0, triangle.is_cut(i0, j0));
    triangle.for_each_positive(i0, j0, [&](int64_t e) { out[e] -= 2 * weight; });
    triangle.fill_others(out, i0, j0, 0);
    V dscale = {};
    for (int e = 0; e < MR * NR; e += L) dscale += load(out + e) * load(u + e);
    return sum_lanes<A>(dscale);
  }

  // ---- blocks of G

  P* block(P* of, int64_t r, int64_t c) const { return of + (r * blocks + c) * kArea; }

  // A tile of `factor` G into a block: row-major, and for bf16 also with pairs of rows interleaved.
  void keep(const A* tile, A factor, P* to, P* to_pairs) const {
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += L) store_narrowed(to + i * W + j, load(tile + i * NR + j) * factor);
    if constexpr (kPairs)
      for (int i = 0; i < MR; i += 2) interleave(to_pairs + i * W, to + i * W, to + (i + 1) * W, NR);
  }

  // Block (r, c) of the chunk that starts with block `first`. Tiles that the products may touch beyond the diagonal are
  // zero; those further below are never read.
  double make_block(int64_t first, int64_t r, int64_t c, bool wanted, A factor) const {
    const int64_t Kp = padded_k<P>(D), i0 = (first + r) * W, j0 = c * W;
    alignas(64) A u[MR * NR], out[MR * NR];
    double dscale = 0;
    for (int64_t j = 0; j < min(W, R - j0); j += NR)
      for (int64_t i = 0; i < min(W, R - i0) && i0 + i < j0 + j + NR + MR; i += MR) {
        if (triangle.has_pairs(i0 + i, j0 + j)) {
          tile<P>(D, rows + (i0 + i) * Kp, cols + (j0 + j) * Kp, u, NR);
          dscale += gradient(u, out, i0 + i, j0 + j);
        } else {
          for (int e = 0; e < MR * NR; e += L) store(out + e, V{});
        }
        if (wanted) keep(out, factor, block(g, r, c) + i * W + j, block(g_pairs, r, c) + i * W + j * KU);
      }
    return dscale;
  }

  // ---- the products, for the rows of dZ of block b and the features d0 to d1

  // dz[b] += G[r, b:] Z for the block's own row of G
  void multiply_row(int64_t r, int64_t b, int64_t d0, int64_t d1, A* dz) const {
    const int64_t i0 = b * W, i1 = min(i0 + W, R);
    for (int64_t c = b; c < blocks; c++)
      for (int64_t d = d0; d < d1; d += NR)
        for (int64_t i = i0; i < i1; i += MR) {
          const int64_t k0 = c == b ? i - i0 : 0, k1 = min(W, R - c * W);  // from the diagonal on
          tile_partial<P, W, KU>(k1 - k0, block(g, r, c) + (i - i0) * W + k0,
                                 features + d * padded_k<P>(R) + (c * W + k0) * NR, dz + i * D + d, D, true,
                                 min(MR, i1 - i), min(NR, d1 - d));
        }
  }

  // dz[b] (+)= G[first:, b]^T Z over the blocks of the chunk above block b
  void multiply_column(int64_t first, int64_t b, int64_t d0, int64_t d1, A* dz) const {
    const int64_t j0 = b * W, j1 = min(j0 + W, R);
    for (int64_t r = 0; r < min(chunk, b + 1 - first); r++)
      for (int64_t d = d0; d < d1; d += NR)
        for (int64_t j = j0; j < j1; j += MR) {
          const int64_t i0 = (first + r) * W;
          const int64_t k1 = min(W, first + r == b ? min(j + MR, R) - i0 : R - i0);  // as far as the diagonal
          tile_partial<P, KU, W * KU>(k1, block(kPairs ? g_pairs : g, r, b) + (j - j0) * KU,
                                      features + d * padded_k<P>(R) + i0 * NR, dz + j * D + d, D, first + r > 0,
                                      min(MR, j1 - j), min(NR, d1 - d));
        }
  }

  double run(A* dz, A factor, int64_t threads) const {
    double dscale = 0;
    for (int64_t first = 0; first < blocks; first += chunk) {
      const int64_t height = min(chunk, blocks - first), width = blocks - first;
      parallel_for(height * width, threads, [&](int64_t task, int64_t) {
        const int64_t r = task % height, c = first + task / height;
        dscales[task] = c < first + r ? 0 : make_block(first, r, c, dz != nullptr, factor);
      });
      for (int64_t task = 0; task < height * width; task++) dscale += dscales[task];
      if (!dz) continue;
      // a task that has all features reads G once
      const int64_t dims = threads <= width ? D : Blocks<P>::kDims, parts = ceil_div(D, dims);
      parallel_for(width * parts, threads, [&](int64_t task, int64_t) {
        const int64_t b = first + task / parts, d0 = task % parts * dims, d1 = min(d0 + dims, D);
        multiply_column(first, b, d0, d1, dz);
        if (b < first + height) multiply_row(b - first, b, d0, d1, dz);
      });
    }
    return dscale;
  }
};

}  // namespace

int64_t nt_xent_loss_bwd_workspace(int64_t R, int64_t D, Dtype dtype, int64_t) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace ws(nullptr);
    NtXentBackward<T>(ws, R, D, 0, 0);
    return ws.bytes();
  });
}

void nt_xent_loss_bwd(const void* z, const double* lse, Maybe<void> dz, void* dscale, void* workspace, Scalar scale,
                      double weight, Scalar dloss, int64_t R, int64_t D, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    Workspace ws(workspace);
    const NtXentBackward<T> backward(ws, R, D, scale, weight);
    threads = team(threads, R * R / 2 * D);
    backward.fill(static_cast<const T*>(z), lse, threads);
    const double slope = backward.run(static_cast<Acc<T>*>(dz.p), Acc<T>(scale * dloss), threads);
    *static_cast<Acc<T>*>(dscale) = Acc<T>(dloss * slope);
  });
}

}  // namespace fvm::FVM_ISA
