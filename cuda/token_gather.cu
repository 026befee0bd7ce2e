// SPDX-License-Identifier: Apache-2.0
// Rows moved by index: gather_tokens, restore_tokens, and their backwards through the inverse index. A warp moves a row,
// 16 bytes a lane where rows are so aligned. Every sum has a fixed order; nothing is added by atomics.
#include "common.cuh"
#include "primitives.cuh"

namespace fvm::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;  // of a block

// ---- CUDA kernels

template <int N, class T> __device__ void fill_row(T* to, T value, int64_t D) {
  Pack<T, N> pack;
  for (int j = 0; j < N; j++) pack.at[j] = value;
  for (int64_t d = lane() * N; d < D; d += kWarp * N) store(to + d, pack);
}

// out[b, k] = x[b, ids[b, k]]
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const T* __restrict__ x, const int64_t* __restrict__ ids, T* __restrict__ out, int64_t rows, int64_t L,
                int64_t K, int64_t D, int64_t* bad_id) {
  const int64_t row = warp_of_grid();
  if (row >= rows) return;
  const int64_t id = ids[row];
  T* to = out + row * D;
  if (!is_index(id, L)) {
    if (lane() == 0) report_bad(bad_id, row);
    return fill_row<N>(to, not_a_number<T>(), D);
  }
  const T* from = x + (row / K * L + id) * D;
#pragma unroll 4
  for (int64_t d = lane() * N; d < D; d += kWarp * N) store(to + d, load<N>(from + d));
}

// out[b, l] = the prefix row l, or the kept row that ids[b, l - P] names, or the mask token; and its position is added
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    restore_rows(const T* __restrict__ x, const int64_t* __restrict__ ids, const T* __restrict__ mask_token,
                 const T* __restrict__ pos, T* __restrict__ out, int64_t rows, int64_t P, int64_t K, int64_t L,
                 int64_t D, int64_t pos_from, int64_t* bad_id) {
  const int64_t row = warp_of_grid();
  if (row >= rows) return;
  const int64_t b = row / (P + L), l = row % (P + L), at = b * L + l - P;
  const int64_t id = l < P ? l - P : ids[at];
  T* to = out + row * D;
  if (l >= P && !is_index(id, L)) {
    if (lane() == 0) report_bad(bad_id, at);
    return fill_row<N>(to, not_a_number<T>(), D);
  }
  const T* from = id < K ? x + (b * (P + K) + P + id) * D : mask_token;
  const T* position = pos && l >= pos_from ? pos + (l - pos_from) * D : nullptr;
#pragma unroll 4
  for (int64_t d = lane() * N; d < D; d += kWarp * N) {
    Pack<T, N> pack = load<N>(from + d);
    if (position) {
      Acc<T> sum[N];
      widen(sum, pack);
      accumulate(sum, load<N>(position + d));
      pack = narrow<T>(sum);
    }
    store(to + d, pack);
  }
}

// The inverse of each image's index, as csrc/token_index.h has it: `order` lists the positions i with ids[i] = 0, then 1,
// ..., each in rising order; those of target t are order[start[t]] .. order[start[t + 1]]. A warp an image: it takes 32
// ids at a time, and lanes with the same id find their places among each other.
struct Inverse {
  int64_t *start, *order;
  __host__ __device__ Inverse(int64_t* workspace, int64_t image, int64_t targets, int64_t n)
      : start(workspace + image * size(targets, n)), order(start + targets + 1) {}
  __host__ __device__ static int64_t size(int64_t targets, int64_t n) { return targets + 1 + n; }
  __device__ int64_t count(int64_t target) const { return start[target + 1] - start[target]; }
};

constexpr int64_t kCountsInShared = 4096;  // 32 KB: beyond that the counts stay in global memory

template <class F> __device__ void for_lanes(int64_t n, F&& f) {  // all lanes go on together
  for (int64_t i = lane(); i - lane() < n; i += kWarp) f(i, i < n);
}

__global__ void __launch_bounds__(kWarp)
    invert_index(const int64_t* __restrict__ all_ids, int64_t* workspace, int64_t targets, int64_t n) {
  const Inverse inverse(workspace, blockIdx.x, targets, n);
  const int64_t* ids = all_ids + blockIdx.x * n;
  int64_t* end = targets < kCountsInShared ? dynamic_shared<int64_t>() : inverse.start;  // [targets + 1]
  // end[t + 1] first counts the ids t, then holds where their places begin, and while they are filled, where those end
  for (int64_t t = lane(); t <= targets; t += kWarp) end[t] = 0;
  __syncwarp();
  auto for_equal_ids = [&](auto&& f) {
    for_lanes(n, [&](int64_t i, bool inside) {
      const int64_t id = inside ? ids[i] : -1;
      const unsigned equal = __match_any_sync(kAllLanes, id);
      const int before = __popc(equal & ((1u << lane()) - 1));
      if (is_index(id, targets)) f(i, id, before);
      __syncwarp();
      if (is_index(id, targets) && before == 0) end[id + 1] += __popc(equal);
      __syncwarp();
    });
  };
  for_equal_ids([](int64_t, int64_t, int) {});
  int64_t total = 0;
  for_lanes(targets, [&](int64_t t, bool inside) {
    const int64_t count = inside ? end[t + 1] : 0;
    int64_t sum = count;  // of the counts up to this lane
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, step);
      sum += lane() >= step ? other : 0;
    }
    if (inside) end[t + 1] = total + sum - count;
    total += __shfl_sync(kAllLanes, sum, kWarp - 1);
  });
  __syncwarp();
  for_equal_ids([&](int64_t i, int64_t id, int before) { inverse.order[end[id + 1] + before] = i; });
  if (end != inverse.start)
    for (int64_t t = lane(); t <= targets; t += kWarp) inverse.start[t] = end[t];
}

// dx[b, P + t] = sum of dout[b, P + i] over ids[b, i] = t, and dx[b, p] = dout[b, p] for the P rows of a prefix. Rows
// that are the copy of one row are left to sum_images where that moves them.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 4)  // else sm_120 takes 32 registers and spills
    sum_rows(const T* __restrict__ dout, int64_t* __restrict__ workspace, T* __restrict__ dx, int64_t rows, int64_t P,
             int64_t targets, int64_t n, int64_t D, bool but_copies) {
  const int64_t row = warp_of_grid();
  if (row >= rows) return;
  const int64_t b = row / (P + targets), t = row % (P + targets) - P;
  const Inverse inverse(workspace, b, targets, n);
  const int64_t begin = t < 0 ? 0 : inverse.start[t], end = t < 0 ? 1 : inverse.start[t + 1];
  if (but_copies && end - begin == 1) return;
  if (begin == end) return fill_row<N>(dx + row * D, narrow<T>(0), D);
  auto source = [&](int64_t i) { return dout + (b * (P + n) + P + (t < 0 ? t : inverse.order[i])) * D; };
  const T* first = source(begin);
  for (int64_t d = lane() * N; d < D; d += kWarp * N) {
    Acc<T> sum[N];
    widen(sum, load<N>(first + d));
#pragma unroll 1  // repeated ids are rare, and unrolled they cost registers
    for (int64_t i = begin + 1; i < end; i++) accumulate(sum, load<N>(source(i) + d));
    store(dx + row * D + d, narrow<T>(sum));
  }
}

// For row l of the decoder's input, a block for 32 packs of it: dpos[l] = sum over images, and the part of it that came
// from mask tokens. While dout is here, rows of dx that are a copy of one of its rows are written, so it is read once.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 4)
    sum_images(const T* __restrict__ dout, const int64_t* __restrict__ ids, int64_t* __restrict__ workspace,
               T* __restrict__ dx, T* __restrict__ dpos, Acc<T>* __restrict__ masked_sums, int64_t B, int64_t P,
               int64_t K, int64_t L, int64_t D, int64_t pos_from) {
  const int64_t slices = ceil_div<int64_t>(D, kWarp * N), l = blockIdx.x / slices;
  const int64_t d = (blockIdx.x % slices * kWarp + lane()) * N;
  Acc<T> kept[N] = {}, masked[N] = {};
#pragma unroll 2  // the packs of more images would not fit into registers
  for (int64_t b = warp(); b < B && d < D; b += kWarps) {
    const Pack<T, N> pack = load<N>(dout + (b * (P + L) + l) * D + d);
    const int64_t id = l < P ? l - P : ids[b * L + l - P];  // negative in the prefix
    if (l >= P && !is_index(id, L)) continue;
    if (id >= K) {
      accumulate(masked, pack);
      continue;
    }
    accumulate(kept, pack);
    if (dx && (id < 0 || Inverse(workspace, b, K, L).count(id) == 1)) store(dx + (b * (P + K) + P + id) * D + d, pack);
  }
  add_warps<kWarps>(kept);
  add_warps<kWarps>(masked);
  if (warp() != 0 || d >= D) return;
  if (masked_sums)
    for (int j = 0; j < N; j++) masked_sums[l * D + d + j] = masked[j];
  if (!dpos || l < pos_from) return;
  for (int j = 0; j < N; j++) kept[j] += masked[j];
  store(dpos + (l - pos_from) * D + d, narrow<T>(kept));
}

// out[d] = sum of the rows of sums [rows, D], a block for 32 columns
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_columns(const Acc<T>* __restrict__ sums, T* __restrict__ out, int64_t rows, int64_t D) {
  const int64_t d = int64_t(blockIdx.x) * kWarp + lane();
  Acc<T> sum[1] = {};
  for (int64_t r = warp(); d < D && r < rows; r += kWarps) sum[0] += sums[r * D + d];
  add_warps<kWarps>(sum);
  if (warp() == 0 && d < D) out[d] = narrow<T>(sum[0]);
}

// ---- launchers

Grid warp_a_row(int64_t rows) { return {ceil_div<int64_t>(rows, kWarps)}; }

cudaError_t invert(const int64_t* ids, int64_t* workspace, int64_t B, int64_t targets, int64_t n, cudaStream_t stream) {
  const size_t shared = targets < kCountsInShared ? (targets + 1) * sizeof(int64_t) : 0;
  return FVM_LAUNCH(invert_index, B, kWarp, shared, stream, ids, workspace, targets, n);
}

template <class T>
cudaError_t sum_inverted(const T* dout, int64_t* workspace, T* dx, int64_t B, int64_t P, int64_t targets, int64_t n,
                         int64_t D, bool but_copies, cudaStream_t stream) {
  const int64_t rows = B * (P + targets);
  return with_width<T>(
      D,
      [&](auto N) {
        return FVM_LAUNCH(sum_rows<T, N>, warp_a_row(rows), kThreads, 0, stream, dout, workspace, dx, rows, P, targets,
                          n, D, but_copies);
      },
      dout, dx);
}

template <class T>
cudaError_t sum_over_images(const T* dout, const int64_t* ids, int64_t* workspace, T* dx, T* dpos, Acc<T>* masked_sums,
                            int64_t B, int64_t P, int64_t K, int64_t L, int64_t D, int64_t pos_rows,
                            cudaStream_t stream) {
  return with_width<T>(
      D,
      [&](auto N) {
        return FVM_LAUNCH(sum_images<T, N>, (P + L) * ceil_div<int64_t>(D, kWarp * N), kThreads, 0, stream, dout, ids,
                          workspace, dx, dpos, masked_sums, B, P, K, L, D, P + L - pos_rows);
      },
      dout, dx, dpos);
}

}  // namespace

cudaError_t gather_tokens_fwd(const void* x, const int64_t* ids, void* out, int64_t B, int64_t L, int64_t K, int64_t D,
                              Dtype dtype, Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_width<T>(
        D,
        [&](auto N) {
          return FVM_LAUNCH(gather_rows<T, N>, warp_a_row(B * K), kThreads, 0, launch.stream, static_cast<const T*>(x),
                            ids, static_cast<T*>(out), B * K, L, K, D, launch.bad_id.p);
        },
        x, out);
  });
}

cudaError_t gather_tokens_bwd(const void* dout, const int64_t* ids, void* dx, int64_t* workspace, int64_t B, int64_t L,
                              int64_t K, int64_t D, Dtype dtype, Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    FVM_TRY(invert(ids, workspace, B, L, K, launch.stream));
    return sum_inverted(static_cast<const T*>(dout), workspace, static_cast<T*>(dx), B, 0, L, K, D, false,
                        launch.stream);
  });
}

cudaError_t restore_tokens_fwd(Maybe<const void> x, Maybe<const int64_t> ids, const void* mask_token,
                               Maybe<const void> pos, void* out, int64_t B, int64_t P, int64_t K, int64_t L, int64_t D,
                               int64_t pos_rows, Dtype dtype, Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_width<T>(
        D,
        [&](auto N) {
          return FVM_LAUNCH(restore_rows<T, N>, warp_a_row(B * (P + L)), kThreads, 0, launch.stream,
                            static_cast<const T*>(x.p), ids.p, static_cast<const T*>(mask_token),
                            static_cast<const T*>(pos.p), static_cast<T*>(out), B * (P + L), P, K, L, D,
                            P + L - pos_rows, launch.bad_id.p);
        },
        x.p, mask_token, pos.p, out);
  });
}

cudaError_t restore_tokens_bwd(const void* dout, Maybe<const int64_t> ids, Maybe<void> dx, Maybe<void> dmask_token,
                               Maybe<void> dpos, int64_t* workspace, void* partial_sums, int64_t B, int64_t P,
                               int64_t K, int64_t L, int64_t D, int64_t pos_rows, Dtype dtype, Launch launch) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* dy = static_cast<const T*>(dout);
    T* dx_ = static_cast<T*>(dx.p);
    Acc<T>* masked_sums = dmask_token ? static_cast<Acc<T>*>(partial_sums) : nullptr;
    const bool sums = dmask_token || dpos;
    if (dx) FVM_TRY(invert(ids.p, workspace, B, K, L, launch.stream));
    if (sums)
      FVM_TRY(sum_over_images(dy, ids.p, workspace, dx_, static_cast<T*>(dpos.p), masked_sums, B, P, K, L, D, pos_rows,
                              launch.stream));
    if (dx) FVM_TRY(sum_inverted(dy, workspace, dx_, B, P, K, L, D, sums, launch.stream));
    if (!dmask_token) return cudaSuccess;
    return FVM_LAUNCH(sum_columns<T>, ceil_div<int64_t>(D, kWarp), kThreads, 0, launch.stream,
                      static_cast<const Acc<T>*>(masked_sums + P * D), static_cast<T*>(dmask_token.p), L, D);
  });
}

}  // namespace fvm::cuda
