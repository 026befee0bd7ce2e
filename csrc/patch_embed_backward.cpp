// SPDX-License-Identifier: Apache-2.0
// The gradients of patch_embed. Pixels are read from the images again; whatever is summed over tokens or images has one
// owner that goes through them in a fixed order.
#include "patch_embed.h"
#include "token_index.h"

namespace fvm::FVM_ISA {

namespace {

// Rows of dout, of any type, read as S
template <class S> struct Gradient {
  const void* rows;
  int64_t D;
  void (*load_row)(const Gradient&, int64_t r, S* row);
  void (*add_row)(const Gradient&, int64_t r, S* sum);
};

template <class S, class O> void load_row(const Gradient<S>& dout, int64_t r, S* row) {
  convert_row(row, static_cast<const O*>(dout.rows) + r * dout.D, dout.D);
}
template <class S, class O> void add_row(const Gradient<S>& dout, int64_t r, S* sum) {
  accumulate(sum, static_cast<const O*>(dout.rows) + r * dout.D, dout.D);
}

// f(row of dout) for each token that shows the patch, in rising order
template <class F> void for_each_token(const Tokens& tokens, int64_t* inverses, int64_t b, int64_t patch, F&& f) {
  const int64_t first = b * tokens.rows() + tokens.P;
  if (!tokens.ids) return f(first + patch);
  const Inverse inverse(inverses + b * Inverse::size(tokens.L, tokens.K), tokens.L);
  for (int64_t i = inverse.start[patch]; i < inverse.start[patch + 1]; i++) f(first + inverse.order[i]);
}

// Tokens that are packed at a time for the gradient of the weight: many, as threads wait for each other after each time
template <class P> int64_t packed_tokens(int64_t F, int64_t D, int64_t tokens) {
  const int64_t affordable = (int64_t(16) << 20) / (int64_t(sizeof(P)) * (F + D)) / kChunk * kChunk;
  return min(tokens, affordable < kChunk ? kChunk : affordable);
}

template <class T> struct BackwardSpace {
  using P = Operand<T>;
  using S = Acc<T>;
  int64_t* order;         // [F]: places of the features in the weight
  S *scale, *shift;       // [F], padded
  int64_t* inverses;      // of ids, for each image
  S *kept, *masked;       // [P + L, D]: gradients of rows summed over images, by what they showed
  P *gradients, *pixels;  // D x tokens and tokens x F, packed
  int64_t* row_of;        // [tokens]: their rows in dout
  P* weight;              // packed
  S* rows;                // a row of F or D, padded, for each thread
  P* pairs;               // two of them in P
  P* panels;              // kMaxRows x D, packed, for each thread
  S* dpatches;            // kMaxRows x F, for each thread
  S* zeros;               // [F]
  int64_t tokens, row_size, panels_size, dpatch_size;

  BackwardSpace(Workspace& space, const Tokens& of, int64_t F, int64_t D, int64_t threads) {
    tokens = packed_tokens<P>(F, D, of.B * of.K);
    row_size = Pixels<S>::padded_row(F > D ? F : D);
    panels_size = row_panels_size<P>(kMaxRows<P>, D);
    dpatch_size = Pixels<S>::padded_row(F);
    order = space.take<int64_t>(F);
    scale = space.take<S>(row_size);
    shift = space.take<S>(row_size);
    inverses = space.take<int64_t>(of.B * Inverse::size(of.L, of.K));
    kept = space.take<S>((of.P + of.L) * D);
    masked = space.take<S>((of.P + of.L) * D);
    gradients = space.take<P>(packed_size<P>(D, tokens, Tile<P>::MR));
    pixels = space.take<P>(packed_size<P>(F, tokens, Tile<P>::NR));
    row_of = space.take<int64_t>(tokens);
    weight = space.take<P>(packed_size<P>(F, D, Tile<P>::NR));
    rows = space.take<S>(threads * row_size);
    pairs = space.take<P>(threads * 2 * row_size);
    panels = space.take<P>(threads * panels_size);
    dpatches = space.take<S>(threads * kMaxRows<P> * dpatch_size);
    zeros = space.take<S>(F);
  }
};

// Step t (and t + 1 when steps are pairs) of all panels of an operand of `steps` steps, from rows of n values
template <int WIDTH, class P> void pack_step(P* __restrict panels, int64_t steps, int64_t t, const P* __restrict rows,
                                             int64_t row_size, int64_t n) {
  P* d = panels + t * WIDTH;
  for (int64_t i0 = 0; i0 < n; i0 += WIDTH, d += WIDTH * padded_k<P>(steps)) {
    if constexpr (Tile<P>::KU == 1)
      memcpy(d, rows + i0, WIDTH * sizeof(P));
    else
      interleave(d, rows + i0, rows + row_size + i0, WIDTH);
  }
}

// The rows of one step as operands: read(row of dout, destination), and zeros after the last of n tokens
template <class T, class Read>
Operand<T>* read_step(int64_t t, int64_t n, int64_t size, Acc<T>* row, Operand<T>* pair, const BackwardSpace<T>& space,
                      Read&& read) {
  if constexpr (Tile<Operand<T>>::KU == 1) {
    read(space.row_of[t], row);
    return row;
  } else {
    for (int u = 0; u < 2; u++) {
      if (t + u < n)
        read(space.row_of[t + u], row);
      else
        memset(static_cast<void*>(row), 0, size * sizeof(Acc<T>));
      convert_row(pair + u * space.row_size, row, size);
    }
    return pair;
  }
}

// Both operands of n tokens: every thread reads pixels and rows of dout of some of them
template <class T>
void pack_tokens(const Pixels<Acc<T>>& pixels, const Tokens& tokens, const Gradient<Acc<T>>& dout, int64_t n,
                 const BackwardSpace<T>& space, int64_t threads) {
  using P = Operand<T>;
  using S = Acc<T>;
  constexpr int64_t kGroup = 16;
  const int64_t F = pixels.grid.features(), D = dout.D;
  auto read_pixels = [&](int64_t r, S* row) {
    const int64_t b = r / tokens.rows();
    pixels.read(b, tokens.patch(b, r % tokens.rows() - tokens.P), row);
  };
  auto read_gradient = [&](int64_t r, S* row) { dout.load_row(dout, r, row); };
  parallel_for(ceil_div(n, kGroup), threads, [&](int64_t task, int64_t thread) {
    S* row = space.rows + thread * space.row_size;
    P* pair = space.pairs + thread * 2 * space.row_size;
    for (int64_t t = task * kGroup; t < min((task + 1) * kGroup, n); t += Tile<P>::KU) {
      const P* operand = read_step<T>(t, n, F, row, pair, space, read_pixels);
      pack_step<Tile<P>::NR>(space.pixels, n, t, operand, space.row_size, F);
      operand = read_step<T>(t, n, D, row, pair, space, read_gradient);
      pack_step<Tile<P>::MR>(space.gradients, n, t, operand, space.row_size, D);
    }
  });
}

// dweight += dout^T pixels of the n packed tokens: every tile of dweight has one owner
template <class T>
void add_product(Acc<T>* dweight, int64_t D, int64_t F, int64_t n, const BackwardSpace<T>& space, int64_t threads) {
  using P = Operand<T>;
  constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, KU = Tile<P>::KU, kPanels = 8;
  const int64_t chunks = ceil_div(D, kPanels * MR), np = padded_k<P>(n);
  parallel_for(ceil_div(F, NR) * chunks, threads, [&](int64_t task, int64_t) {
    const int64_t f = task / chunks * NR, first = task % chunks * kPanels * MR, last = min(first + kPanels * MR, D);
    for (int64_t t = 0; t < n; t += kChunk)
      for (int64_t d = first; d < last; d += MR)
        tile_partial<P, KU, MR * KU>(min(kChunk, n - t), space.gradients + d * np + t * MR,
                                     space.pixels + f * np + t * NR, dweight + d * F + f, F, true, min(MR, D - d),
                                     min(NR, F - f));
  });
}

template <class T>
void weight_gradient(const Pixels<Acc<T>>& pixels, const Tokens& tokens, const Gradient<Acc<T>>& dout, Acc<T>* dweight,
                     const BackwardSpace<T>& space, int64_t threads) {
  const int64_t F = pixels.grid.features(), D = dout.D;
  memset(static_cast<void*>(dweight), 0, D * F * sizeof(Acc<T>));
  int64_t n = 0;
  auto flush = [&] {
    if (n == 0) return;
    pack_tokens(pixels, tokens, dout, n, space, threads);
    add_product<T>(dweight, D, F, n, space, threads);
    n = 0;
  };
  for (int64_t b = 0; b < tokens.B; b++)
    for (int64_t k = 0; k < tokens.K; k++) {
      if (tokens.masked(b, tokens.patch(b, k))) continue;
      space.row_of[n++] = b * tokens.rows() + tokens.P + k;
      if (n == space.tokens) flush();
    }
  flush();
}

// For every row of [prefix, patches]: the sum of dout over images where it was kept, and where it was a mask token
template <class T>
void sum_over_images(const Tokens& tokens, const Gradient<Acc<T>>& dout, const BackwardSpace<T>& space,
                     int64_t threads) {
  constexpr int64_t kRows = 8;
  const int64_t rows = tokens.P + tokens.L, D = dout.D;
  parallel_for(ceil_div(rows, kRows), threads, [&](int64_t task, int64_t) {
    const int64_t first = task * kRows, last = min(first + kRows, rows);
    memset(static_cast<void*>(space.kept + first * D), 0, (last - first) * D * sizeof(Acc<T>));
    memset(static_cast<void*>(space.masked + first * D), 0, (last - first) * D * sizeof(Acc<T>));
    for (int64_t b = 0; b < tokens.B; b++)
      for (int64_t l = first; l < last; l++) {
        if (l < tokens.P) {
          dout.add_row(dout, b * tokens.rows() + l, space.kept + l * D);
          continue;
        }
        Acc<T>* sum = (tokens.masked(b, l - tokens.P) ? space.masked : space.kept) + l * D;
        for_each_token(tokens, space.inverses, b, l - tokens.P, [&](int64_t r) { dout.add_row(dout, r, sum); });
      }
  });
}

template <class S> void sum_rows(const S* rows, int64_t n, int64_t D, S* sum) {
  for (int64_t d = 0; d < D; d++) sum[d] = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < D; d++) sum[d] += rows[i * D + d];
}

template <class S, class I> void scatter_to(const PatchGrid& grid, const S* row, int64_t b, int64_t patch,
                                            void* dimages) {
  scatter_patch(grid, row, patch, static_cast<I*>(dimages) + b * grid.image_size());
}

// row = sum of dout over the tokens that show the patch and are not masked; whether there were any
template <class T>
bool sum_of_patch(const Tokens& tokens, const Gradient<Acc<T>>& dout, int64_t b, int64_t patch, Acc<T>* row,
                  const BackwardSpace<T>& space) {
  bool any = false;
  memset(static_cast<void*>(row), 0, space.row_size * sizeof(Acc<T>));
  if (!tokens.masked(b, patch))
    for_each_token(tokens, space.inverses, b, patch, [&](int64_t r) { dout.add_row(dout, r, row), any = true; });
  return any;
}

// dimages of each patch = W^T (sum of dout over the tokens that show it) / std; every pixel is written once
template <class T>
void image_gradient(const Pixels<Acc<T>>& pixels, const Tokens& tokens, const Gradient<Acc<T>>& dout, void* dimages,
                    decltype(scatter_to<Acc<T>, T>)* scatter, const BackwardSpace<T>& space, int64_t threads) {
  using P = Operand<T>;
  using S = Acc<T>;
  const int64_t F = pixels.grid.features(), D = dout.D, blocks = ceil_div(tokens.L, kMaxRows<P>);
  parallel_for(tokens.B * blocks, threads, [&](int64_t task, int64_t thread) {
    const int64_t b = task / blocks, first = task % blocks * kMaxRows<P>, last = min(first + kMaxRows<P>, tokens.L);
    S *row = space.rows + thread * space.row_size,
      *dpatches = space.dpatches + thread * kMaxRows<P> * space.dpatch_size;
    P* panels = space.panels + thread * space.panels_size;
    int64_t patch_of[kMaxRows<P>], n = 0;
    for (int64_t patch = first; patch < last; patch++) {
      if (sum_of_patch(tokens, dout, b, patch, row, space))
        pack_row(panels, n, row, D), patch_of[n++] = patch;
      else
        scatter(pixels.grid, space.zeros, b, patch, dimages);
    }
    gemm_rows<P>(n, F, D, panels, space.weight, [&](int64_t i0, int64_t f, int64_t m, int64_t columns, const S* acc) {
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < columns; j++)
          dpatches[(i0 + i) * space.dpatch_size + f + j] =
              acc[i * Tile<P>::NR + j] * (pixels.scale ? pixels.scale[f + j] : S(1));
    });
    for (int64_t i = 0; i < n; i++) scatter(pixels.grid, dpatches + i * space.dpatch_size, b, patch_of[i], dimages);
  });
}

// Sums over images of all parameters that are added to tokens
template <class T>
void parameter_gradients(const Tokens& tokens, const Gradient<Acc<T>>& dout, Acc<T>* dbias, Acc<T>* dpos,
                         Acc<T>* dprefix, Acc<T>* dmask_token, int64_t pos_rows, const BackwardSpace<T>& space,
                         int64_t threads) {
  const int64_t D = dout.D, P = tokens.P, L = tokens.L;
  sum_over_images(tokens, dout, space, threads);
  if (dbias) sum_rows(space.kept + P * D, L, D, dbias);
  if (dmask_token) sum_rows(space.masked + P * D, L, D, dmask_token);
  if (dprefix) memcpy(static_cast<void*>(dprefix), space.kept, P * D * sizeof(Acc<T>));
  if (dpos)
    for (int64_t i = 0, skip = (P + L - pos_rows) * D; i < pos_rows * D; i++)
      dpos[i] = space.kept[skip + i] + space.masked[skip + i];
}

}  // namespace

int64_t patch_embed_bwd_workspace(Dtype dtype, int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D,
                                  int64_t P, int64_t K, int64_t threads) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace space(nullptr);
    BackwardSpace<T>(space, {B, P, K, (H / p) * (W / p), nullptr, nullptr}, C * p * p, D, threads);
    return space.bytes();
  });
}

void patch_embed_bwd(const void* dout_, Dtype out_dtype, const void* images, Dtype image_dtype, bool channels_last,
                     const void* weight, Dtype dtype, Maybe<const int64_t> ids, Maybe<const double> mean,
                     Maybe<const double> std, Maybe<const bool> mask, Maybe<void> dimages, Maybe<void> dweight,
                     Maybe<void> dbias, Maybe<void> dpos, Maybe<void> dprefix, Maybe<void> dmask_token, void* workspace,
                     int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D, int64_t P, int64_t K,
                     int64_t pos_rows, int64_t threads) {
  const PatchGrid grid{C, H, W, p, channels_last};
  const int64_t L = grid.patches(), F = grid.features();
  const Tokens tokens{B, P, K, L, ids.p, mask.p};
  with_dtype(dtype, [&]<class T>() {
    using S = Acc<T>;
    using O = Operand<T>;
    Workspace arena(workspace);
    const BackwardSpace<T> space(arena, tokens, F, D, threads);
    Gradient<S> dout{dout_, D, load_row<S, S>, add_row<S, S>};
    if (out_dtype == dtype) dout.load_row = load_row<S, T>, dout.add_row = add_row<S, T>;
    const Pixels<S> pixels = pixels_of<T>(grid, B, images, image_dtype, mean, std, space.scale, space.shift);
    if (ids)
      parallel_for(B, threads, [&](int64_t b, int64_t) {
        Inverse(space.inverses + b * Inverse::size(L, K), L).build(ids.p + b * K, K, L);
      });
    auto as = [](Maybe<void> p) { return static_cast<S*>(p.p); };
    if (dweight) weight_gradient<T>(pixels, tokens, dout, as(dweight), space, threads);
    if (dbias || dpos || dprefix || dmask_token)
      parameter_gradients<T>(tokens, dout, as(dbias), as(dpos), as(dprefix), as(dmask_token), pos_rows, space, threads);
    if (!dimages) return;
    pack_weight_columns<Tile<O>::NR>(space.weight, static_cast<const T*>(weight), weight_order(grid, space.order), D, F,
                                     threads);
    memset(static_cast<void*>(space.zeros), 0, F * sizeof(S));
    image_gradient<T>(pixels, tokens, dout, dimages.p, image_dtype == dtype ? scatter_to<S, T> : scatter_to<S, S>,
                      space, threads);
  });
}

}  // namespace fvm::FVM_ISA
