// SPDX-License-Identifier: Apache-2.0
// The operands of patch_embed's products on their way from global into shared memory: rows of pixels, of gradients, of
// the weight. What is aligned and of the right type goes by cp.async; the rest through registers, in which it is
// converted, and normalised, after the step before has been multiplied.
#pragma once
#include "product_tile.cuh"

namespace fvm::cuda {

// ---- rows in global memory

template <class T> constexpr Dtype dtype_of() {
  return std::is_same<T, double>::value  ? Dtype::f64
         : std::is_same<T, float>::value ? Dtype::f32
         : std::is_same<T, bf16>::value  ? Dtype::bf16
                                         : Dtype::f16;
}

// Rows of `columns` values that are read as T; row() and column() of a source say where (row, column) is
template <class T> struct Rows {
  const void* values;
  Dtype dtype;     // T, f32 beside a half T, or u8
  bool in_chunks;  // neighbours at aligned addresses
  bool direct;     // chunks of T to which nothing happens on the way
  int64_t rows, columns;

  static constexpr bool kMayBeBytes = false;
  // Row r, columns c to c + N, before they are rounded to T; E is the type of what is stored
  template <class E, int N> __device__ __forceinline__ void finish(Acc<T> (&)[N], int64_t, int64_t) const {}
};

// A matrix of T in rows of chunks: cp.async is all that it needs
template <class T> struct Matrix {
  static constexpr bool in_chunks = true, direct = true, kMayBeBytes = false;
  static constexpr Dtype dtype = dtype_of<T>();
  const void* values;
  int64_t rows, columns;

  __device__ __forceinline__ int64_t row(int64_t r) const { return r < rows ? r * columns : -1; }
  __device__ __forceinline__ int64_t column(int64_t c) const { return c; }
  template <class E, int N> __device__ __forceinline__ void finish(Acc<T> (&)[N], int64_t, int64_t) const {}
};

// Rows that are listed in shared memory: 1 + where they begin, or 0 for rows of zeros, which is what cp.async writes beyond
// the last. Of a long list only a part is there.
template <class T> struct ListedRows : Rows<T> {
  const int64_t* begins;
  int slots;  // a power of two: row r is in slot r % slots

  __device__ __forceinline__ int64_t row(int64_t r) const { return begins[r & (slots - 1)] - 1; }
  __device__ __forceinline__ int64_t column(int64_t c) const { return c; }
};

// f(a value of the type that is stored)
template <class T, bool kMayBeBytes, class F> __device__ __forceinline__ void with_stored(Dtype dtype, F&& f) {
  if (kMayBeBytes && dtype == Dtype::u8)
    f(std::conditional_t<kMayBeBytes, uint8_t, Acc<T>>{});
  else if (!kIsHalf<T> || dtype == Dtype::f32)
    f(Acc<T>{});
  else if constexpr (kIsHalf<T>)
    f(T{});
}

// ---- bits in registers: they are loaded long before they are looked at

template <class T> using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <int kBytes>
using Bits =
    std::conditional_t<kBytes == 1, uint8_t,
                       std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

// Words with N values as they lie in memory, up to 16 bytes
template <int N, class E, class W> __device__ __forceinline__ void load_bits(W* words, const E* from) {
  constexpr int kBytes = N * sizeof(E), kEach = kBytes < int(sizeof(W)) ? kBytes : sizeof(W);
  const auto pack = load<kBytes / kEach>(reinterpret_cast<const Bits<kEach>*>(from));
#pragma unroll
  for (int i = 0; i < kBytes / kEach; i++) words[i] = pack.at[i];
}

// Element j of what lies in the words, in the type of sums
template <class S, class E, class W> __device__ __forceinline__ S element(const W* words, int j) {
  constexpr int kEach = sizeof(W) / sizeof(E);
  const Bits<sizeof(E)> bits = words[j / kEach] >> (j % kEach * 8 * sizeof(E));
  if constexpr (std::is_same<E, uint8_t>::value) {
    return bits;
  } else {
    E value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return widen(value);
  }
}

// ---- one thread's part of an operand's steps: one column, or some neighbours, in some of the rows

template <class T, Layout kLayout, class Source> struct Loader {
  using Panel = cuda::Panel<T, kLayout>;
  static constexpr int kValues = Panel::kSize / kTileThreads / 2;  // in one of two halves
  static constexpr int kAtOnce = kChunk<Acc<T>>;  // values that are read at once into registers, if they are neighbours

  const Source& source;
  T* panels;       // two, each beside one of the other operand
  int64_t first;   // row, or column, of the source that is the tile's first
  int r, c;        // this thread's first place in a panel
  int64_t offset;  // of its column in the source if that is always the same; -1: outside
  Word<T> words[kValues];
  unsigned inside;  // bit i: there is something in the i-th place

  __device__ __forceinline__ Loader(const Source& source, T* panels, int64_t first)
      : source(source), panels(panels), first(first) {
    const int n = source.direct ? kChunk<T> : source.in_chunks ? kAtOnce : 1;
    r = threadIdx.x * n / Panel::kColumns, c = threadIdx.x * n % Panel::kColumns;
    offset = offset_of(first + c);
  }

  __device__ __forceinline__ T* panel(int k) const { return panels + k / kStep<T> % 2 * (2 * Panel::kSize); }

  // Begins to load half of the step from k on; cp.async loads both halves with the first
  __device__ __forceinline__ void start(int k, int half) {
    if (source.direct) {
      if (half == 0) copy(k);
    } else if (source.in_chunks)
      fetch(k, half);
  }

  // Writes what came into registers; what has no chunks is only read now
  __device__ __forceinline__ void finish(int k, int half) const {
    if (source.direct) return;
    if (source.in_chunks)
      convert(k, half);
    else
      move(k, half);
  }

 private:
  __device__ __forceinline__ int64_t row(int k, int r) const { return (Panel::kInside ? first : k) + r; }
  __device__ __forceinline__ int64_t column(int k) const { return (Panel::kInside ? k : first) + c; }
  __device__ __forceinline__ int64_t offset_of(int64_t c) const { return c < source.columns ? source.column(c) : -1; }

  // f(i, row) for the places of this thread in part of a panel, N values each
  template <int N, int kCount, int kUnroll = kCount, class F>
  __device__ __forceinline__ void for_places(int part, F&& f) const {
#pragma unroll kUnroll
    for (int i = 0; i < kCount; i++) f(i, r + (part * kCount + i) * (kTileThreads * N / Panel::kColumns));
  }

  // And where their values are in the source, or -1
  template <int N, int kCount, int kUnroll = kCount, class F>
  __device__ __forceinline__ void for_addresses(int k, int part, F&& f) const {
    const int64_t from = Panel::kInside ? offset_of(column(k)) : offset;
    for_places<N, kCount, kUnroll>(part, [&](int i, int r) {
      const int64_t begin = from < 0 ? -1 : source.row(row(k, r));
      f(i, r, begin < 0 ? -1 : begin + from);
    });
  }

  __device__ __forceinline__ void copy(int k) const {
    const T* values = static_cast<const T*>(source.values);
    for_addresses<kChunk<T>, 2 * kValues / kChunk<T>>(k, 0, [&](int, int r, int64_t at) {
      cp_async<16>(panel(k) + Panel::place(r, c), values + (at < 0 ? 0 : at), at >= 0);
    });
  }

  __device__ __forceinline__ void fetch(int k, int half) {
    inside = 0;
    with_stored<T, Source::kMayBeBytes>(source.dtype, [&](auto zero) {
      using E = decltype(zero);
      for_addresses<kAtOnce, kValues / kAtOnce>(k, half, [&](int i, int, int64_t at) {
        if (at < 0) return;
        inside |= 1u << i;
        load_bits<kAtOnce>(words + i * kAtOnce, static_cast<const E*>(source.values) + at);
      });
    });
  }

  __device__ __forceinline__ void convert(int k, int half) const {
    with_stored<T, Source::kMayBeBytes>(source.dtype, [&](auto zero) {
      for_places<kAtOnce, kValues / kAtOnce>(
          half, [&](int i, int r) { write<kAtOnce>(zero, k, r, words + i * kAtOnce, inside >> i & 1); });
    });
  }

  __device__ __forceinline__ void move(int k, int half) const {
    with_stored<T, Source::kMayBeBytes>(source.dtype, [&](auto zero) {
      using E = decltype(zero);
      for_addresses<1, kValues, 4>(k, half, [&](int, int r, int64_t at) {
        Word<T> word[1];
        if (at >= 0) load_bits<1>(word, static_cast<const E*>(source.values) + at);
        write<1>(zero, k, r, word, at >= 0);
      });
    });
  }

  template <int N, class E>
  __device__ __forceinline__ void write(E, int k, int r, const Word<T>* from, bool any) const {
    Acc<T> values[N] = {};
    if (any) {
#pragma unroll
      for (int j = 0; j < N; j++) values[j] = element<Acc<T>, E>(from, j);
      source.template finish<E>(values, row(k, r), column(k));
    }
    store(panel(k) + Panel::place(r, c), narrow<T>(values));
  }
};

// ---- the product

// tile += a[row :, : count] b[column :, : count]^T, or with the indices of an operand the other way round where its layout
// has the summed index outside. prefetch(k) may copy, by cp.async, what the sources need to know about the step from k
// on: it is called well before. All threads call.
template <class T, Layout kA, Layout kB, class A, class B, class Prefetch>
__device__ __forceinline__ void multiply(Tile<T, kA, kB>& tile, const A& source_a, const B& source_b, int64_t row,
                                         int64_t column, int count, Prefetch&& prefetch) {
  T* shared = dynamic_shared<T>();
  Loader<T, kA, A> a(source_a, shared, row);
  Loader<T, kB, B> b(source_b, shared + kTile * kStep<T>, column);
  auto arrive = [] {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  };
  prefetch(0);
  // The first time there is nothing to multiply yet. Half a step at a time, for want of registers.
#pragma unroll 1
  for (int k = -kStep<T>; k < count; k += kStep<T>) {
    const int next = k + kStep<T>;
    arrive();
    prefetch(next + kStep<T>);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      if (next < count) a.start(next, half), b.start(next, half);
      if (k >= 0) tile.add_half(half, a.panel(k), b.panel(k));
      if (next < count) a.finish(next, half), b.finish(next, half);
    }
  }
}

}  // namespace fvm::cuda
