// SPDX-License-Identifier: Apache-2.0
// Where the tokens of shifted windows lie in the map, and which of them may not see each other (Liu et al. 2021,
// https://arxiv.org/abs/2103.14030): no rolled, padded or partitioned copy, no mask from memory.
#pragma once
#include "parallel.h"
#include "simd.h"
#include "workspace.h"

namespace fvm::FVM_ISA {

constexpr int64_t kQueries = 64;  // of a block: what of a window's logits exists at a time

// B maps of H x W tokens, shifted by (sh, sw) and cut into windows of wh x ww tokens; a token has heads * d channels
struct WindowGrid {
  int64_t B, H, W, heads, d, wh, ww, sh = 0, sw = 0;
  bool pad_then_roll = false;
  static constexpr int64_t kPad = -1;

  int64_t C() const { return heads * d; }
  int64_t N() const { return wh * ww; }
  int64_t rows() const { return ceil_div(H, wh); }
  int64_t columns() const { return ceil_div(W, ww); }
  int64_t windows() const { return B * rows() * columns(); }

  // the place in the map of place `at` on an axis of the shifted map
  int64_t source(int64_t at, int64_t size, int64_t window, int64_t shift) const {
    const int64_t padded = ceil_div(size, window) * window;
    const int64_t from = pad_then_roll ? (at + shift) % padded : at < size ? (at + shift) % size : padded;
    return from < size ? from : kPad;
  }

  // places[0:N]: where the window's tokens are in [B, H, W, C], or kPad; places[N] is any of them
  void places_of(int64_t window, int64_t* places) const {
    const int64_t b = window / (rows() * columns()), wy = window / columns() % rows(), wx = window % columns();
    for (int64_t c = 0; c < ww; c++) {
      const int64_t x = source(wx * ww + c, W, ww, sw);
      for (int64_t r = 0; r < wh; r++) places[r * ww + c] = x;
    }
    for (int64_t r = 0; r < wh; r++) {
      const int64_t y = source(wy * wh + r, H, wh, sh);
      for (int64_t n = r * ww; n < (r + 1) * ww; n++)
        places[n] = y == kPad || places[n] == kPad ? kPad : ((b * H + y) * W + places[n]) * C();
    }
    places[N()] = places[0];
  }
};

// The shift brings together, in the last row and column of windows, tokens from opposite edges of the map. Such a
// window has up to four parts, and tokens of different parts have `mask_value` added to their logit.
template <class S> struct ShiftMask {
  int64_t N, padded;
  int32_t* part;  // [4, N]: of a window that is in neither, the last row, the last column, both
  S* values;      // [4, 4, padded]: what a key in one of the parts adds to the logit of each query

  ShiftMask(Workspace& space, int64_t N) : N(N), padded(ceil_div(N, kQueries) * kQueries) {
    part = space.take<int32_t>(4 * N);
    values = space.take<S>(16 * padded);
  }

  static int kind(const WindowGrid& grid, int64_t window) {
    const bool last_row = window / grid.columns() % grid.rows() == grid.rows() - 1;
    const bool last_column = window % grid.columns() == grid.columns() - 1;
    return (grid.sh > 0 && last_row ? 1 : 0) + (grid.sw > 0 && last_column ? 2 : 0);
  }

  void fill(const WindowGrid& grid, double mask_value) const {
    for (int kind = 0; kind < 4; kind++) {
      for (int64_t n = 0; n < N; n++) {
        const bool below = n / grid.ww >= grid.wh - grid.sh, right = n % grid.ww >= grid.ww - grid.sw;
        part[kind * N + n] = (kind & 1 && below ? 1 : 0) + (kind & 2 && right ? 2 : 0);
      }
      for (int key = 0; key < 4; key++)
        for (int64_t n = 0; n < padded; n++)
          values[(kind * 4 + key) * padded + n] = n < N && part[kind * N + n] != key ? S(mask_value) : S(0);
    }
  }
};

}  // namespace fvm::FVM_ISA
