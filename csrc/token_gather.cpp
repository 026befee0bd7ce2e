// SPDX-License-Identifier: Apache-2.0
// Rows moved by index: gather_tokens, restore_tokens, and their backwards through the inverse index.
#include "dtype_dispatch.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "token_index.h"

namespace fvm::FVM_ISA {

namespace {

constexpr int64_t kRows = 16;  // rows of a task

// Calls f(b, first, last) for blocks of the `rows` rows of each of the B images.
template <class F> void for_row_blocks(int64_t B, int64_t rows, int64_t threads, F&& f) {
  const int64_t blocks = ceil_div(rows, kRows);
  parallel_for(B * blocks, threads, [&](int64_t task, int64_t) {
    const int64_t b = task / blocks, first = task % blocks * kRows;
    f(b, first, min(first + kRows, rows));
  });
}

template <class T> void add_rows(T* out, const T* a, const T* b, int64_t D) {
  constexpr int V = kLanes<Acc<T>>;
  int64_t d = 0;
  for (; d + V <= D; d += V) store_narrowed(out + d, load_widened(a + d) + load_widened(b + d));
  for (; d < D; d++) out[d] = narrow<T>(widen(a[d]) + widen(b[d]));
}

// dx[b, t] = sum of dout[b, i] over ids[b, i] = t, for rows of D; dx and dout step by their own rows an image
template <class T>
void sum_rows_by_index(const T* dout, int64_t dout_rows, const int64_t* ids, T* dx, int64_t dx_rows, int64_t* workspace,
                       int64_t B, int64_t targets, int64_t n, int64_t D, int64_t threads) {
  const int64_t stride = Inverse::size(targets, n);
  parallel_for(B, threads,
               [&](int64_t b, int64_t) { Inverse(workspace + b * stride, targets).build(ids + b * n, n, targets); });
  for_row_blocks(B, targets, threads, [&](int64_t b, int64_t first, int64_t last) {
    const Inverse inverse(workspace + b * stride, targets);
    for (int64_t t = first; t < last; t++) {
      const int64_t begin = inverse.start[t], count = inverse.start[t + 1] - begin;
      auto row = [&](int64_t i) { return dout + (b * dout_rows + inverse.order[begin + i]) * D; };
      T* out = dx + (b * dx_rows + t) * D;
      if (count == 0)
        memset(static_cast<void*>(out), 0, D * sizeof(T));
      else if (count == 1)
        memcpy(static_cast<void*>(out), row(0), D * sizeof(T));
      else {
        // wide rows are summed by slices, so that the sum of a repeated id is rounded once
        constexpr int64_t kSlice = 256;
        Acc<T> sum[kSlice];
        for (int64_t d = 0; d < D; d += kSlice) {
          const int64_t w = min(kSlice, D - d);
          for (int64_t j = 0; j < w; j++) sum[j] = 0;
          for (int64_t i = 0; i < count; i++) accumulate(sum, row(i) + d, w);
          convert_row(out + d, sum, w);
        }
      }
    }
  });
}

template <class T>
void restore(const T* x, const int64_t* ids, const T* mask_token, const T* pos, T* out, int64_t B, int64_t P, int64_t K,
             int64_t L, int64_t D, int64_t pos_rows, int64_t threads) {
  const int64_t pos_from = P + L - pos_rows;  // rows before this one have no position
  for_row_blocks(B, P + L, threads, [&](int64_t b, int64_t first, int64_t last) {
    for (int64_t l = first; l < last; l++) {
      const int64_t r = l < P ? l - P : ids[b * L + l - P];
      const T* src = r < K ? x + (b * (P + K) + P + r) * D : mask_token;
      T* dst = out + (b * (P + L) + l) * D;
      if (pos && l >= pos_from)
        add_rows(dst, src, pos + (l - pos_from) * D, D);
      else
        memcpy(static_cast<void*>(dst), src, D * sizeof(T));
    }
  });
}

// For every row l of the decoder's input: dpos[l] = sum over images, and the part of it that came from mask tokens.
template <class T>
void reduce_over_images(const T* dout, const int64_t* ids, T* dmask_token, T* dpos, Acc<T>* partial, int64_t B,
                        int64_t P, int64_t K, int64_t L, int64_t D, int64_t pos_rows, int64_t threads) {
  constexpr int64_t kSlice = 256;
  const int64_t slices = ceil_div(D, kSlice), pos_from = P + L - pos_rows;
  parallel_for((P + L) * slices, threads, [&](int64_t task, int64_t) {
    const int64_t l = task / slices, d = task % slices * kSlice, w = min(kSlice, D - d);
    Acc<T> kept[kSlice], *masked = partial + l * D + d;
    for (int64_t j = 0; j < w; j++) kept[j] = masked[j] = 0;
    for (int64_t b = 0; b < B; b++) {
      const bool is_mask_token = l >= P && ids[b * L + l - P] >= K;
      accumulate(is_mask_token ? masked : kept, dout + (b * (P + L) + l) * D + d, w);
    }
    if (dpos && l >= pos_from) {
      for (int64_t j = 0; j < w; j++) kept[j] += masked[j];
      convert_row(dpos + (l - pos_from) * D + d, kept, w);
    }
  });
  if (!dmask_token) return;
  parallel_for(slices, threads, [&](int64_t slice, int64_t) {
    const int64_t d = slice * kSlice, w = min(kSlice, D - d);
    Acc<T> sum[kSlice] = {};
    for (int64_t l = P; l < P + L; l++) accumulate(sum, partial + l * D + d, w);
    convert_row(dmask_token + d, sum, w);
  });
}

}  // namespace

int64_t gather_tokens_fwd(const void* x, const int64_t* ids, void* out, int64_t B, int64_t L, int64_t K, int64_t D,
                          Dtype dtype, int64_t threads) {
  const int64_t bad = first_out_of_range(ids, B * K, L);
  if (bad != kOk) return bad;
  with_dtype(dtype, [&]<class T>() {
    for_row_blocks(B, K, threads, [&](int64_t b, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k++)
        memcpy(static_cast<T*>(out) + (b * K + k) * D, static_cast<const T*>(x) + (b * L + ids[b * K + k]) * D,
               D * sizeof(T));
    });
  });
  return kOk;
}

void gather_tokens_bwd(const void* dout, const int64_t* ids, void* dx, int64_t* workspace, int64_t B, int64_t L,
                       int64_t K, int64_t D, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    sum_rows_by_index(static_cast<const T*>(dout), K, ids, static_cast<T*>(dx), L, workspace, B, L, K, D, threads);
  });
}

int64_t restore_tokens_fwd(Maybe<const void> x, Maybe<const int64_t> ids, const void* mask_token, Maybe<const void> pos,
                           void* out, int64_t B, int64_t P, int64_t K, int64_t L, int64_t D, int64_t pos_rows,
                           Dtype dtype, int64_t threads) {
  const int64_t bad = first_out_of_range(ids.p, B * L, L);
  if (bad != kOk) return bad;
  with_dtype(dtype, [&]<class T>() {
    restore(static_cast<const T*>(x.p), ids.p, static_cast<const T*>(mask_token), static_cast<const T*>(pos.p),
            static_cast<T*>(out), B, P, K, L, D, pos_rows, threads);
  });
  return kOk;
}

void restore_tokens_bwd(const void* dout, Maybe<const int64_t> ids, Maybe<void> dx, Maybe<void> dmask_token,
                        Maybe<void> dpos, int64_t* workspace, void* partial_sums, int64_t B, int64_t P, int64_t K,
                        int64_t L, int64_t D, int64_t pos_rows, Dtype dtype, int64_t threads) {
  with_dtype(dtype, [&]<class T>() {
    const T* dy = static_cast<const T*>(dout);
    if (dx) {
      T* dx_ = static_cast<T*>(dx.p);
      for (int64_t b = 0; b < B; b++)
        memcpy(static_cast<void*>(dx_ + b * (P + K) * D), dy + b * (P + L) * D, P * D * sizeof(T));
      sum_rows_by_index(dy + P * D, P + L, ids.p, dx_ + P * D, P + K, workspace, B, K, L, D, threads);
    }
    if (dmask_token || dpos)
      reduce_over_images(dy, ids.p, static_cast<T*>(dmask_token.p), static_cast<T*>(dpos.p),
                         static_cast<Acc<T>*>(partial_sums), B, P, K, L, D, pos_rows, threads);
  });
}

}  // namespace fvm::FVM_ISA
