// SPDX-License-Identifier: Apache-2.0
// Images to tokens in one pass: out[b, i] = W patch(b, id) + bias + pos, or the mask token + pos, prefix tokens in front.
// The pixels of a block of tokens go straight from the images into a packed panel, converted and normalised on the way.
#include "patch_embed.h"

#include "token_index.h"

namespace fvm::FVM_ISA {

namespace {

template <class T> struct ForwardSpace {
  using P = Operand<T>;
  using S = Acc<T>;
  P* weight;         // packed
  int64_t* order;    // [F]: places of the features in the weight
  S *scale, *shift;  // [F], padded
  S* row;            // [F], padded, for each thread
  P* panels;         // kMaxRows x F, packed, for each thread
  int64_t row_size, panels_size;

  ForwardSpace(Workspace& space, int64_t F, int64_t D, int64_t threads) {
    row_size = Pixels<S>::padded_row(F);
    panels_size = row_panels_size<P>(kMaxRows<P>, F);
    weight = space.take<P>(packed_size<P>(D, F, Tile<P>::NR));
    order = space.take<int64_t>(F);
    scale = space.take<S>(row_size);
    shift = space.take<S>(row_size);
    row = space.take<S>(threads * row_size);
    panels = space.take<P>(threads * panels_size);
  }
};

template <class S> struct Output {
  void* out;
  int64_t D, pos_rows, rows;  // rows = P + L
  const S *bias, *pos, *prefix, *mask_token;
  void (*write)(const Output&, int64_t at, const S* a, const S* b, const S* c, int64_t n);

  // the position of token l of [prefix, patches], or null
  const S* position(int64_t l) const { return l < rows - pos_rows ? nullptr : pos + (l - (rows - pos_rows)) * D; }
};

// out[at : at + n] = a + b + c, where b and c may be null
template <class S, class O> void write_sum(const Output<S>& output, int64_t at, const S* a, const S* b, const S* c,
                                           int64_t n) {
  constexpr int V = kLanes<S>;
  O* out = static_cast<O*>(output.out) + at;
  int64_t i = 0;
  for (; i + V <= n; i += V) {
    Vec<S> v = load(a + i);
    if (b) v += load(b + i);
    if (c) v += load(c + i);
    store_narrowed(out + i, v);
  }
  for (; i < n; i++) out[i] = narrow<O>(a[i] + (b ? b[i] : S(0)) + (c ? c[i] : S(0)));
}

// The tokens of a task that are embedded: their rows of `out`, and their positions or null
template <class T> struct Block {
  int64_t n, row_of[kMaxRows<Operand<T>>];
  const Acc<T>* position_of[kMaxRows<Operand<T>>];
};

// Packs the pixels of the tokens in [first, last); prefix and masked tokens are written at once
template <class T>
void read_block(Block<T>& block, int64_t first, int64_t last, const Pixels<Acc<T>>& pixels, const Tokens& tokens,
                const Output<Acc<T>>& output, Acc<T>* row, Operand<T>* panels) {
  const int64_t D = output.D, P = tokens.P;
  block.n = 0;
  for (int64_t r = first; r < last; r++) {
    const int64_t b = r / tokens.rows(), i = r % tokens.rows(), patch = i < P ? 0 : tokens.patch(b, i - P);
    const Acc<T>* position = output.position(i < P ? i : P + patch);
    if (i < P)
      output.write(output, r * D, output.prefix + i * D, position, nullptr, D);
    else if (tokens.masked(b, patch))
      output.write(output, r * D, output.mask_token, position, nullptr, D);
    else {
      pixels.read(b, patch, row);
      pack_row(panels, block.n, row, pixels.grid.features());
      block.row_of[block.n] = r;
      block.position_of[block.n++] = position;
    }
  }
}

template <class T>
void embed(const Pixels<Acc<T>>& pixels, const Tokens& tokens, const Output<Acc<T>>& output,
           const ForwardSpace<T>& space, int64_t threads) {
  using P = Operand<T>;
  using S = Acc<T>;
  constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR;
  const int64_t rows = tokens.B * tokens.rows(), D = output.D;
  const int64_t size = min(kMaxRows<P>, ceil_div(ceil_div(rows, 4 * threads), MR) * MR);
  parallel_for(ceil_div(rows, size), threads, [&](int64_t task, int64_t thread) {
    Block<T> block;
    P* panels = space.panels + thread * space.panels_size;
    read_block(block, task * size, min((task + 1) * size, rows), pixels, tokens, output,
               space.row + thread * space.row_size, panels);
    gemm_rows<P>(block.n, D, pixels.grid.features(), panels, space.weight,
                 [&](int64_t i0, int64_t d, int64_t m, int64_t columns, const S* acc) {
                   for (int64_t i = 0; i < m; i++) {
                     const S* position = block.position_of[i0 + i];
                     output.write(output, block.row_of[i0 + i] * D + d, acc + i * NR,
                                  output.bias ? output.bias + d : nullptr, position ? position + d : nullptr, columns);
                   }
                 });
  });
}

}  // namespace

int64_t patch_embed_fwd_workspace(Dtype dtype, int64_t C, int64_t p, int64_t D, int64_t threads) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace space(nullptr);
    ForwardSpace<T>(space, C * p * p, D, threads);
    return space.bytes();
  });
}

int64_t patch_embed_fwd(const void* images, Dtype image_dtype, bool channels_last, const void* weight, Dtype dtype,
                        Maybe<const void> bias, Maybe<const void> pos, Maybe<const void> prefix,
                        Maybe<const int64_t> ids, Maybe<const double> mean, Maybe<const double> std,
                        Maybe<const bool> mask, Maybe<const void> mask_token, void* out, Dtype out_dtype,
                        void* workspace, int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D, int64_t P,
                        int64_t K, int64_t pos_rows, int64_t threads) {
  const PatchGrid grid{C, H, W, p, channels_last};
  const int64_t L = grid.patches(), F = grid.features();
  const int64_t bad = ids ? first_out_of_range(ids.p, B * K, L) : kOk;
  if (bad != kOk) return bad;
  with_dtype(dtype, [&]<class T>() {
    using S = Acc<T>;
    using O = Operand<T>;
    auto parameter = [](Maybe<const void> p) { return static_cast<const S*>(p.p); };
    Workspace arena(workspace);
    const ForwardSpace<T> space(arena, F, D, threads);
    const Pixels<S> pixels = pixels_of<T>(grid, B, images, image_dtype, mean, std, space.scale, space.shift);
    pack_weight_rows<Tile<O>::NR>(space.weight, static_cast<const T*>(weight), weight_order(grid, space.order), D, F,
                                  threads);
    const Output<S> output{out,
                           D,
                           pos_rows,
                           P + L,
                           parameter(bias),
                           parameter(pos),
                           parameter(prefix),
                           parameter(mask_token),
                           out_dtype == dtype ? write_sum<S, T> : write_sum<S, S>};
    embed<T>(pixels, {B, P, K, L, ids.p, mask.p}, output, space, threads);
  });
  return kOk;
}

}  // namespace fvm::FVM_ISA
