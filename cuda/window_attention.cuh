// SPDX-License-Identifier: Apache-2.0
// What both directions of window_attention know: where the tokens of shifted windows lie in the map, what is masked and
// dropped, and how rows of a window and head come into shared memory and results go back. Formulas and names are those of
// csrc/window_*.h.
#pragma once
#include <cmath>

#include "window_tile.cuh"

namespace fvm::cuda {

namespace {

constexpr int kMostChannels = 128;  // of a head

enum Part { kQ = 0, kK = 1, kV = 2 };

// ---- the map

// B maps of H x W tokens, shifted by (sh, sw) and cut into windows of wh x ww tokens; a token has heads * d channels
struct WindowGrid {
  int64_t B, H, W;
  int heads, d, wh, ww, sh, sw;
  bool pad_then_roll;
  static constexpr int64_t kPad = -1;

  __host__ __device__ int64_t C() const { return int64_t(heads) * d; }
  __host__ __device__ int N() const { return wh * ww; }
  __host__ __device__ int64_t rows() const { return ceil_div<int64_t>(H, wh); }
  __host__ __device__ int64_t columns() const { return ceil_div<int64_t>(W, ww); }
  __host__ __device__ int64_t windows() const { return B * rows() * columns(); }

  // The place in the map of place `at` on an axis of the shifted map
  __device__ int64_t source(int64_t at, int64_t size, int window, int shift) const {
    const int64_t padded = ceil_div<int64_t>(size, window) * window, length = pad_then_roll ? padded : size;
    const int64_t from = at >= length ? padded : at + shift >= length ? (at + shift) % length : at + shift;
    return from < size ? from : kPad;
  }
};

// The N tokens of the block's window, in shared memory
struct Window {
  const WindowGrid& grid;
  int64_t* places;  // where the token is in [B, H, W], or kPad
  uint8_t* parts;   // what the shift brought together has different parts
  bool is_masked, has_pads;

  __device__ void look_up(int64_t window) {
    const int64_t columns = grid.columns(), rows = grid.rows();
    const int64_t b = window / (rows * columns), wy = window / columns % rows, wx = window % columns;
    const bool below = grid.sh > 0 && wy == rows - 1, right = grid.sw > 0 && wx == columns - 1;
    is_masked = below || right;
    has_pads = grid.H % grid.wh != 0 || grid.W % grid.ww != 0;
    for (int n = threadIdx.x; n < grid.N(); n += blockDim.x) {
      const int r = n / grid.ww, c = n % grid.ww;
      const int64_t y = grid.source(wy * grid.wh + r, grid.H, grid.wh, grid.sh);
      const int64_t x = grid.source(wx * grid.ww + c, grid.W, grid.ww, grid.sw);
      places[n] = y == WindowGrid::kPad || x == WindowGrid::kPad ? WindowGrid::kPad : (b * grid.H + y) * grid.W + x;
      parts[n] = (below && r >= grid.wh - grid.sh ? 1 : 0) + (right && c >= grid.ww - grid.sw ? 2 : 0);
    }
    __syncthreads();
  }
};

// Which probabilities dropout keeps: a function of (seed, window, head, query, key) alone; the sign of the seed is not used
struct Dropout {
  bool active;
  uint32_t threshold;
  double kept;  // 1 / (1 - p)
  const int64_t* seed;

  __device__ __forceinline__ static uint32_t mix(uint32_t x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
  }
  __device__ __forceinline__ uint32_t stream(int64_t unit) const {
    return mix(mix(mix(uint32_t(*seed)) + (uint32_t(*seed >> 32) & 0x7fffffffu)) + uint32_t(unit));
  }
  __device__ __forceinline__ bool keeps(uint32_t row, int key) const {
    return mix(row + uint32_t(key) * 0x9e3779b9u) >= threshold;
  }
};

inline Dropout dropout_of(double p, Maybe<const int64_t> seed) {
  const double limit = std::floor(p * 4294967296.0);
  return {p > 0, limit < 4294967295.0 ? uint32_t(limit) : 4294967295u, p < 1 ? 1 / (1 - p) : 0, seed.p};
}

// ---- a call

template <class T> struct WindowInputs {
  using S = Acc<T>;
  WindowGrid grid;
  const T* qkv;
  const S *bias, *logit_scale, *pad_qkv;  // or null
  S scale, mask_value;
  Dropout dropout;
  bool heads_outermost, in_chunks;

  __device__ int64_t channel(Part part, int head) const {
    return heads_outermost ? (int64_t(head) * 3 + part) * grid.d : part * grid.C() + int64_t(head) * grid.d;
  }
  __device__ S scale_of(int head) const { return logit_scale ? logit_scale[head] : scale; }
};

template <class T>
WindowInputs<T> inputs_of(const void* qkv, Maybe<const void> bias, Maybe<const void> logit_scale,
                          Maybe<const void> pad_qkv, double scale, double mask_value, const Dropout& dropout,
                          bool heads_outermost, const WindowGrid& grid, const void* out, const void* dout) {
  auto parameter = [](Maybe<const void> p) { return static_cast<const Acc<T>*>(p.p); };
  return {grid,
          static_cast<const T*>(qkv),
          parameter(bias),
          parameter(logit_scale),
          parameter(pad_qkv),
          Acc<T>(scale),
          Acc<T>(mask_value),
          dropout,
          heads_outermost,
          grid.d % kChunk<T> == 0 && aligned(16, qkv, out, dout)};
}

// ---- rows of a window and head: shared memory [kBlock, row_stride(d)], zero where there is no token or channel

template <class T> struct Rows {
  const T* base;      // of the map's first token
  int64_t stride;     // from a token to the next
  const Acc<T>* pad;  // what a token outside of the map has, or null for zeros
  int d;
  bool in_chunks;

  // The chunk from channel c on, n of it inside
  __device__ Pack<T, kChunk<T>> chunk(int64_t place, int c, bool is_token) const {
    Pack<T, kChunk<T>> values;
#pragma unroll
    for (int n = 0; n < kChunk<T>; n++) {
      values.at[n] = narrow<T>(0);
      if (c + n >= d || !is_token) continue;
      if (place != WindowGrid::kPad)
        values.at[n] = base[place * stride + c + n];
      else if (pad)
        values.at[n] = narrow<T>(pad[c + n]);
    }
    return values;
  }

  // Rows first .. first + kBlock of the window; the copies have arrived after wait_for_rows
  __device__ __forceinline__ void fetch(T* to, const Window& window, int first) const {
    constexpr int V = kChunk<T>;
    const int across = padded(d) / V, N = window.grid.N();
    for (int i = threadIdx.x; i < kBlock<T> * across; i += kThreads<T>) {
      const int row = i / across, c = (i - row * across) * V, n = first + row;
      const int64_t place = n < N ? window.places[n] : WindowGrid::kPad;
      T* const at = to + row * row_stride<T>(d) + c;
      if (in_chunks && place != WindowGrid::kPad)
        cp_async<16>(at, base + place * stride + (c < d ? c : 0), c < d);
      else
        store(at, chunk(place, c, n < N));
    }
  }
};

__device__ __forceinline__ void wait_for_rows() {
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const WindowInputs<T>& in, Part part, int head) {
  const int64_t channel = in.channel(part, head);
  return {in.qkv + channel, 3 * in.grid.C(), in.pad_qkv ? in.pad_qkv + channel : nullptr, in.grid.d, in.in_chunks};
}

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// Rows become row / max(|row|, 1e-12), two lanes a row; inverse[row] = 1 / max(..). For cosines.
template <class T> __device__ __forceinline__ void normalise(T* rows, Acc<T>* inverse, int d) {
  using S = Acc<T>;
  const int row = threadIdx.x / 2;
  T* const at = rows + row * row_stride<T>(d);
  S sum = 0;
#pragma unroll 1
  for (int c = threadIdx.x % 2; c < d; c += 2) sum = fma(widen(at[c]), widen(at[c]), sum);
  const S norm = root(sum + __shfl_xor_sync(kAllLanes, sum, 1));
  const S factor = S(1) / (norm < S(1e-12) ? S(1e-12) : norm);
#pragma unroll 1
  for (int c = threadIdx.x % 2; c < d; c += 2) at[c] = narrow<T>(widen(at[c]) * factor);
  if (threadIdx.x % 2 == 0) inverse[row] = factor;
}

// The warp's 16 rows in shared memory, from row `first` of the window, to `width` channels of the map
template <class T>
__device__ __forceinline__ void write_rows(T* base, int64_t stride, const T* rows, int rows_stride, int width,
                                           bool in_chunks, const Window& window, int first) {
  constexpr int V = kChunk<T>;
  const int across = ceil_div(width, V), N = window.grid.N();
  __syncwarp();
  for (int i = lane(); i < 16 * across; i += kWarp) {
    const int row = i / across, c = (i - row * across) * V, n = first + row;
    const int64_t place = n < N ? window.places[n] : WindowGrid::kPad;
    if (place == WindowGrid::kPad) continue;
    const Pack<T, V> values = load<V>(rows + row * rows_stride + c);
    T* const to = base + place * stride + c;
    if (in_chunks)
      store(to, values);
    else
      for (int k = 0; k < V && c + k < width; k++) to[k] = values.at[k];
  }
  __syncwarp();
}

// ---- softmax

// Products to logits, in the lane's places of queries from `query` and keys from `key` on: -inf where there is no key
template <class T, int kTiles>
__device__ __forceinline__ void to_logits(Acc<T> (&s)[kTiles][4], const WindowInputs<T>& in, const Window& window,
                                          int head, int query, int key) {
  using S = Acc<T>;
  const int N = in.grid.N();
  const S scale = in.scale_of(head);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int i = query + row_of(e);
    const S* bias = in.bias && i < N ? in.bias + (int64_t(head) * N + i) * N : nullptr;
    const int part = window.is_masked && i < N ? window.parts[i] : -1;
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
      const int k = key + column_of(j, e);
      S x = s[j][e] * scale;
      if (k >= N) {
        x = -S(INFINITY);
      } else {
        if (bias) x += bias[k];
        if (part >= 0 && part != window.parts[k]) x += in.mask_value;
      }
      s[j][e] = x;
    }
  }
}

// The maximum of a row so far, and what the sums up to now are to be multiplied by; s becomes exp(s - maximum)
template <int kTiles, class S>
__device__ __forceinline__ void exponentials(S (&s)[kTiles][4], S (&maximum)[2], S (&shrink)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    S most = s[0][2 * i];
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; e++) most = s[j][e] > most ? s[j][e] : most;
    most = quad_max(most);
    most = most > maximum[i] ? most : maximum[i];
    const S from = most == -S(INFINITY) ? S(0) : most;  // nothing but -inf up to now
    shrink[i] = exp(maximum[i] - from);
    maximum[i] = most;
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; e++) s[j][e] = exp(s[j][e] - from);
  }
}

// The sums of the lane's two rows over the quad's columns
template <int kTiles, class S> __device__ __forceinline__ void add_rows(S (&sum)[2], const S (&value)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    S of_lane = 0;
#pragma unroll
    for (int j = 0; j < kTiles; j++) of_lane += value[j][2 * i] + value[j][2 * i + 1];
    sum[i] += quad_sum(of_lane);
  }
}

// What is dropped becomes zero; the others are to be multiplied by dropout.kept
template <int kTiles, class S>
__device__ __forceinline__ void drop(S (&value)[kTiles][4], const Dropout& dropout, uint32_t stream, int query,
                                     int key) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const uint32_t row = Dropout::mix(stream + uint32_t(query + row_of(e)));
#pragma unroll
    for (int j = 0; j < kTiles; j++)
      if (!dropout.keeps(row, key + column_of(j, e))) value[j][e] = 0;
  }
}

}  // namespace

}  // namespace fvm::cuda
