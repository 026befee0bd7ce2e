// SPDX-License-Identifier: Apache-2.0
// The gradients of window_attention. The probabilities are made again from q and k; with P = softmax(S) and O = P V
//
//   dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q,  dbias = sum of dS
//
// and, for cosines, of rows q and k that were normalised before. A window's tokens are nobody else's. What is summed over
// windows is summed by blocks of threads, as many on every device, and their sums in order; no atomics. A thread reads
// of the workspace only what it has written itself, until the last launches.
#include "window_gradients.cuh"

namespace fvm::cuda {

namespace {

// ---- a block of queries by a block of keys

// From exponentials and dP (with what was dropped): P as dV sees it and dS, to shared memory; dS is added up for dbias
template <int kTiles, class T, class S>
__device__ __forceinline__ void differentiate_softmax(S (&p)[kTiles][4], S (&ds)[kTiles][4], const S (&total)[2],
                                                      const S (&product)[2], S* dbias, bool is_first_window) {
#pragma unroll
  for (int j = 0; j < kTiles; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const S inverse = S(1) / total[e / 2];
      p[j][e] *= inverse;
      ds[j][e] = p[j][e] * (ds[j][e] - product[e / 2] * inverse);
    }
    if (!dbias) continue;
    S* const at = dbias + (j * kThreads<T> + threadIdx.x) * 4;
    Pack<S, 4> sum{{ds[j][0], ds[j][1], ds[j][2], ds[j][3]}};
    if (!is_first_window) {
      const Pack<S, 4> before = load<4>(at);
#pragma unroll
      for (int e = 0; e < 4; e++) sum.at[e] += before.at[e];
    }
    store(at, sum);
  }
}

template <int kTiles, class S>
__device__ __forceinline__ void drop_and_scale(S (&value)[kTiles][4], const Dropout& dropout, int64_t unit, int query,
                                               int key) {
  drop(value, dropout, dropout.stream(unit), query, key);
#pragma unroll
  for (int j = 0; j < kTiles; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) value[j][e] *= S(dropout.kept);
}

template <int kTiles, class S>
__device__ __forceinline__ void add_row_products(S (&sum)[2], const S (&a)[kTiles][4], const S (&b)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    S of_lane = 0;
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; e++) of_lane = fma(a[j][e], b[j][e], of_lane);
    sum[i] += quad_sum(of_lane);
  }
}

// *to = the sum over all threads
template <class T> __device__ __forceinline__ void add_up(double value, void* space, double* to) {
  double* const of_warp = static_cast<double*>(space);
  value = warp_sum(value);
  if (lane() == 0) of_warp[warp()] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads<T> / kWarp; w++) value += of_warp[w];
  *to = value;
}

template <class T> __global__ void __launch_bounds__(kThreads<T>, kBlocksOnSM<T>)
    differentiate(const Backward<T> call) {
  using S = Acc<T>;
  constexpr int kTiles = kBlock<T> / 8, kSquare = row_stride<T>(kBlock<T>);
  const WindowInputs<T>& in = call.in;
  const PartialSums<T>& sums = call.sums;
  const int N = in.grid.N(), d = in.grid.d, stride = row_stride<T>(d), blocks = sums.blocks;
  const int head = int(blockIdx.x % sums.heads), row = warp() * 16;
  const int64_t group = blockIdx.x / sums.heads, windows = in.grid.windows();
  const int64_t w0 = group * windows / sums.groups, w1 = (group + 1) * windows / sums.groups;
  const BackwardSpace<T> space(dynamic_shared<unsigned char>(), N, d);
  Window window{in.grid, space.places, space.parts, false, false};
  S* const dpad = sums.dpad + blockIdx.x * sums.pad_size() + warp() * 3 * sums.slices * kSlice;
  S* const unfinished = sums.unfinished + blockIdx.x * sums.unfinished_size();
  for (int i = lane(); i < 3 * sums.slices * kSlice; i += kWarp) dpad[i] = 0;
  __syncwarp();
  double dlogit_scale = 0;
#pragma unroll 1
  for (int64_t w = w0; w < w1; w++) {
    window.look_up(w);
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
      const int query = block * kBlock<T>;
      rows_of(in, kQ, head).fetch(space.q, window, query);
      Rows<T>{call.dout + int64_t(head) * d, in.grid.C(), nullptr, d, in.in_chunks}.fetch(space.dout, window, query);
      S maximum[2] = {-S(INFINITY), -S(INFINITY)}, total[2] = {}, product[2] = {};  // sums of exp and of exp times dP
      // Several blocks of keys are gone through twice, as the sums are needed first; one is gone through once.
#pragma unroll 1
      for (int step = blocks > 1 ? 0 : 1; step < (blocks > 1 ? 2 * blocks : 2); step++) {
        const int key_block = blocks > 1 ? step % blocks : 0, key = key_block * kBlock<T>;
        const bool sums_up = step < blocks || blocks == 1, goes_on = step >= blocks;
        rows_of(in, kK, head).fetch(space.k, window, key);
        rows_of(in, kV, head).fetch(space.v, window, key);
        wait_for_rows();
        if (in.logit_scale) {
          if (step <= 1 && key_block == 0) normalise(space.q, space.q_norms, d);
          normalise(space.k, space.k_norms, d);
          __syncthreads();
        }
        S p[kTiles][4] = {}, ds[kTiles][4] = {}, shrink[2];
        multiply<RowsAre::kept, RowsAre::kept>(p, space.q + row * stride, stride, space.k, stride, padded(d),
                                               kBlock<T>);
        multiply<RowsAre::kept, RowsAre::kept>(ds, space.dout + row * stride, stride, space.v, stride, padded(d),
                                               kBlock<T>);
        to_logits(p, in, window, head, query + row, key);
        exponentials(p, maximum, shrink);
        const int64_t unit = w * in.grid.heads + head;
        if (in.dropout.active) drop_and_scale(ds, in.dropout, unit, query + row, key);
        if (sums_up) {
#pragma unroll
          for (int i = 0; i < 2; i++) total[i] *= shrink[i], product[i] *= shrink[i];
          add_rows(total, p);
          add_row_products(product, p, ds);
        }
        if (goes_on) {
          S* const dbias = sums.dbias + blockIdx.x * sums.bias_size() +
                           (int64_t(block) * blocks + key_block) * kTiles * kThreads<T> * 4;
          differentiate_softmax<kTiles, T>(p, ds, total, product, call.want_bias ? dbias : nullptr, w == w0);
          if (in.dropout.active) drop_and_scale(p, in.dropout, unit, query + row, key);
          write_tile(space.p + row * kSquare, kSquare, p, kBlock<T>);
          write_tile(space.ds + row * kSquare, kSquare, ds, kBlock<T>);
          __syncthreads();
          S dot[2];
          T* const stage = space.stage + row * BackwardSpace<T>::kStageStride;
          if (call.want_rows() || call.want_logit_scale) {
            const T *left = space.ds + row * kSquare, *right = space.k;
            RowGradient<T>{call,  window,     kQ,  head, query + row, space.q + row * stride, space.q_norms + row,
                           stage, unfinished, dpad}(
                key_block == 0, key_block == blocks - 1, dot, [&](auto& g, int slice, int columns) {
                  multiply<RowsAre::kept, RowsAre::summed>(g, left, kSquare, right + slice * kSlice, stride, kBlock<T>,
                                                           columns);
                });
            if (lane() % 4 == 0) dlogit_scale += double(dot[0]) + double(dot[1]);
          }
#pragma unroll 1
          for (int i = 0; i < (call.want_rows() ? 2 : 0); i++) {
            const T *left = (i == 0 ? space.p : space.ds) + row, *right = i == 0 ? space.dout : space.q;
            S* const own = unfinished + (1 + 2 * key_block + i) * sums.slices * sums.slice_size();
            RowGradient<T>{
                call, window, i == 0 ? kV : kK, head, key + row, space.k + row * stride, space.k_norms + row, stage,
                own,  dpad}(block == 0, block == blocks - 1, dot, [&](auto& g, int slice, int columns) {
              multiply<RowsAre::summed, RowsAre::summed>(g, left, kSquare, right + slice * kSlice, stride, kBlock<T>,
                                                         columns);
            });
          }
        }
        __syncthreads();  // other rows come to the place of these
      }
    }
  }
  add_up<T>(dlogit_scale, space.stage, sums.dlogit_scale + blockIdx.x);
}

// ---- sums over the groups, in order

constexpr int kSumThreads = 256;

// A thread for four values as a lane had them
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_bias(const PartialSums<T> sums, Acc<T>* __restrict__ dbias, int N) {
  using S = Acc<T>;
  constexpr int kTiles = kBlock<T> / 8;
  const int64_t each = sums.bias_size() / 4, at = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at >= each * sums.heads) return;
  const int64_t head = at / each, place = at % each, tile = place / kThreads<T> / kTiles;
  const int query = int(tile / sums.blocks) * kBlock<T> + int(place % kThreads<T>) / kWarp * 16;
  const int key = int(tile % sums.blocks) * kBlock<T>, j = int(place / kThreads<T> % kTiles);
  S sum[4] = {};
#pragma unroll 4
  for (int64_t g = 0; g < sums.groups; g++) {
    const Pack<S, 4> pack = load<4>(sums.dbias + ((g * sums.heads + head) * each + place) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] += pack.at[e];
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int i = query + row_of(e), k = key + column_of(j, e);
    if (i < N && k < N) dbias[(head * N + i) * N + k] = sum[e];
  }
}

// A thread for a channel, and for a head
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parameters(const PartialSums<T> sums, Acc<T>* __restrict__ dpad, Acc<T>* __restrict__ dlogit_scale, int d,
                   bool heads_outermost) {
  using S = Acc<T>;
  const int64_t at = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, C = int64_t(sums.heads) * d;
  if (dlogit_scale && at < sums.heads) {
    double sum = 0;
    for (int64_t g = 0; g < sums.groups; g++) sum += sums.dlogit_scale[g * sums.heads + at];
    dlogit_scale[at] = S(sum);
  }
  if (!dpad || at >= 3 * C) return;
  const int64_t head = heads_outermost ? at / (3 * d) : at % C / d, part = heads_outermost ? at / d % 3 : at / C;
  const int64_t width = int64_t(sums.slices) * kSlice;
  S sum = 0;
  for (int64_t g = 0; g < sums.groups; g++)
#pragma unroll
    for (int w = 0; w < sums.kWarps; w++)
      sum += sums.dpad[(((g * sums.heads + head) * sums.kWarps + w) * 3 + part) * width + at % d];
  dpad[at] = sum;
}

}  // namespace

int64_t window_attention_bwd_workspace(int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t wh,
                                       int64_t ww, bool want_bias, Dtype dtype) {
  const WindowGrid grid{B, H, W, int(heads), int(d), int(wh), int(ww), 0, 0, false};
  auto bytes = [&](auto zero) { return PartialSums<decltype(zero)>(nullptr, grid, want_bias).bytes; };
  return dtype == Dtype::f64 ? bytes(double{}) : dtype == Dtype::f32 ? bytes(float{}) : bytes(bf16{});
}

cudaError_t window_attention_bwd(const void* dout, const void* qkv, Maybe<const void> bias,
                                 Maybe<const void> logit_scale, Maybe<const void> pad_qkv, Maybe<void> dqkv,
                                 Maybe<void> dbias, Maybe<void> dlogit_scale, Maybe<void> dpad_qkv, void* workspace,
                                 double scale, double mask_value, double dropout_p, Maybe<const int64_t> seed,
                                 bool pad_then_roll, bool heads_outermost, int64_t B, int64_t H, int64_t W,
                                 int64_t heads, int64_t d, int64_t wh, int64_t ww, int64_t sh, int64_t sw, Dtype dtype,
                                 Launch launch) {
  if (d > kMostChannels) return cudaErrorInvalidValue;
  const WindowGrid grid{B, H, W, int(heads), int(d), int(wh), int(ww), int(sh), int(sw), pad_then_roll};
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Acc<T>;
    const PartialSums<T> sums(workspace, grid, bool(dbias));
    const Backward<T> call{inputs_of<T>(qkv, bias, logit_scale, pad_qkv, scale, mask_value, dropout_of(dropout_p, seed),
                                        heads_outermost, grid, dqkv.p, dout),
                           static_cast<const T*>(dout),
                           static_cast<T*>(dqkv.p),
                           bool(dbias),
                           bool(dpad_qkv),
                           bool(dlogit_scale),
                           sums};
    const size_t shared = BackwardSpace<T>(nullptr, grid.N(), grid.d).bytes;
    FVM_TRY(FVM_LAUNCH(differentiate<T>, sums.groups * heads, kThreads<T>, shared, launch.stream, call));
    if (dbias)
      FVM_TRY(FVM_LAUNCH(sum_bias<T>, ceil_div<int64_t>(heads * sums.bias_size() / 4, kSumThreads), kSumThreads, 0,
                         launch.stream, sums, static_cast<S*>(dbias.p), grid.N()));
    if (!dpad_qkv && !dlogit_scale) return cudaSuccess;
    return FVM_LAUNCH(sum_parameters<T>, ceil_div<int64_t>(3 * grid.C(), kSumThreads), kSumThreads, 0, launch.stream,
                      sums, static_cast<S*>(dpad_qkv.p), static_cast<S*>(dlogit_scale.p), grid.d, heads_outermost);
  });
}

}  // namespace fvm::cuda
