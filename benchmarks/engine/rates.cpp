// SPDX-License-Identifier: Apache-2.0
// Compiled once for each instruction set.
#include "rates.h"

#include "dtype_dispatch.h"
#include "gemm.h"

#define FVM_JOIN_(a, b) a##b
#define FVM_JOIN(a, b) FVM_JOIN_(a, b)
#define FVM_STRING_(a) #a
#define FVM_STRING(a) FVM_STRING_(a)

namespace fvm {
namespace FVM_ISA {
namespace {

using bench::Work;

// More chains than a multiply-add has cycles of latency on two pipes, few enough to stay in registers
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 16;
#else
constexpr int kChains = 12;
#endif

template <class P> double peak(const Work& w) {
  using V = Vec<Acc<P>>;
  constexpr int64_t kRounds = 1 << 16;
  V acc[kChains];
  for (int i = 0; i < kChains; i++) acc[i] = splat(Acc<P>(i));
  const Acc<P>* c = static_cast<const Acc<P>*>(w.c);
  const V x = load(c), y = load(c + kLanes<Acc<P>>);  // not known to the compiler
  for (int64_t round = 0; round < kRounds; round++)
    for (int i = 0; i < kChains; i++) {
#if defined(__AVX512BF16__)
      if constexpr (sizeof(P) == 2) {
        acc[i] = V(_mm512_dpbf16_ps(__m512(acc[i]), __m512bh(x), __m512bh(y)));
        continue;
      }
#endif
      acc[i] = acc[i] * x + y;
    }
  V sum = V{};
  for (int i = 0; i < kChains; i++) sum += acc[i];
  store(static_cast<Acc<P>*>(w.c), sum);
  return 2.0 * kRounds * kChains * kLanes<Acc<P>> * Tile<P>::KU;
}

template <class P> double tile_rate(const Work& w) {
  constexpr int64_t kSteps = 128 * Tile<P>::KU, kRounds = 512;
  for (int64_t round = 0; round < kRounds; round++)
    tile<P>(kSteps, static_cast<const P*>(w.packed_a), static_cast<const P*>(w.packed_b), static_cast<Acc<P>*>(w.c),
            Tile<P>::NR);
  return 2.0 * kRounds * kSteps * Tile<P>::MR * Tile<P>::NR;
}

template <class T, class P> double pack(const Work& w) {
  pack_rows<Tile<P>::MR>(static_cast<P*>(w.packed_a), static_cast<const T*>(w.a), w.K, w.m, w.K);
  pack_rows<Tile<P>::NR>(static_cast<P*>(w.packed_b), static_cast<const T*>(w.b), w.K, w.n, w.K);
  return 0;
}

template <class P> double product(const Work& w) {
  using A = Acc<P>;
  constexpr int NR = Tile<P>::NR, L = kLanes<A>;
  A* c = static_cast<A*>(w.c);
  gemm<P>(w.m, w.n, w.K, static_cast<const P*>(w.packed_a), static_cast<const P*>(w.packed_b),
          [&](int64_t i0, int64_t j0, int64_t rows, int64_t columns, const A* acc) {
            for (int64_t i = 0; i < rows; i++) {
              int64_t j = 0;
              for (; j + L <= columns; j += L) store(c + (i0 + i) * w.n + j0 + j, load(acc + i * NR + j));
              for (; j < columns; j++) c[(i0 + i) * w.n + j0 + j] = acc[i * NR + j];
            }
          });
  return 2.0 * double(w.m) * double(w.n) * double(w.K);
}

int64_t packed_bytes(Dtype dtype, int64_t n, int64_t K) {
  return with_dtype(dtype, [&]<class T>() {
    using P = Operand<T>;
    const int64_t a = packed_size<P>(n, K, Tile<P>::MR), b = packed_size<P>(n, K, Tile<P>::NR);
    return int64_t(sizeof(P)) * (a > b ? a : b);
  });
}

}  // namespace
}  // namespace FVM_ISA

extern const Kernels FVM_JOIN(kernels_, FVM_ISA) = {.isa = FVM_STRING(FVM_ISA)};

namespace bench {

#define FVM_OF_DTYPE(f) [](const Work& w) { return FVM_ISA::with_dtype(w.dtype, [&]<class T>() { return f; }); }
extern const Rates FVM_JOIN(rates_, FVM_ISA) = {
    .isa = FVM_STRING(FVM_ISA),
    .packed_bytes = FVM_ISA::packed_bytes,
    .peak = FVM_OF_DTYPE(FVM_ISA::peak<FVM_ISA::Operand<T>>(w)),
    .tile = FVM_OF_DTYPE(FVM_ISA::tile_rate<FVM_ISA::Operand<T>>(w)),
    .pack = FVM_OF_DTYPE((FVM_ISA::pack<T, FVM_ISA::Operand<T>>(w))),
    .product = FVM_OF_DTYPE(FVM_ISA::product<FVM_ISA::Operand<T>>(w)),
};

}  // namespace bench
}  // namespace fvm
