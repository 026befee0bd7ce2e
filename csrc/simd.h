// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as the instruction set, the four storage types, and exp.
// Everything lives in a namespace per instruction set: the same inline code is compiled several times with different
// flags, and with shared names the linker could keep a copy that this processor cannot run.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FVM_ISA
#error "compile kernels with -DFVM_ISA=<name>: it names the namespace of this instruction set"
#endif

namespace fvm::FVM_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

typedef float vf32 __attribute__((vector_size(kVecBytes), may_alias));
typedef int32_t vi32 __attribute__((vector_size(kVecBytes), may_alias));
typedef uint32_t vu32 __attribute__((vector_size(kVecBytes), may_alias));
typedef double vf64 __attribute__((vector_size(kVecBytes), may_alias));
// Half a vector in memory, where nothing but the element is aligned.
typedef uint16_t vu16h __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));

// `memory` is how a vector is loaded and stored. Values have another type, since a vector type forgets that it is not
// aligned wherever it is deduced (of an argument, by `auto`), and is then moved by instructions that need it to be.
template <class T> struct VecOf;
template <> struct VecOf<float> {
  using type = vf32;
  typedef float memory __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
};
template <> struct VecOf<double> {
  using type = vf64;
  typedef double memory __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
};
template <class T> using Vec = typename VecOf<T>::type;
template <class T> constexpr int kLanes = kVecBytes / int(sizeof(T));

template <class T> static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::memory*>(p);
}
template <class T> static inline void store(T* p, Vec<T> v) { *reinterpret_cast<typename VecOf<T>::memory*>(p) = v; }
template <class T> static inline Vec<T> splat(T x) { return Vec<T>{} + x; }

// ---- storage types: bf16 and fp16 are widened to float as they are read, rounded to nearest even as they are written

struct bf16 { uint16_t bits; };
#if defined(__aarch64__)
using fp16 = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using fp16 = _Float16;
#endif

template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using Acc = typename AccOf<T>::type;  // what a value of type T is computed in

static inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline float widen(fp16 x) { return float(x); }
static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }

template <class T, class A> static inline T narrow(A x) { return T(x); }
template <> inline bf16 narrow<bf16, float>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return bf16{uint16_t((bits >> 16) | 0x40)};  // the rounding below could carry a NaN into infinity
  return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline vf32 load_widened(const float* p) { return load(p); }
static inline vf64 load_widened(const double* p) { return load(p); }
static inline vf32 load_widened(const bf16* p) {
  vu32 bits = __builtin_convertvector(*reinterpret_cast<const vu16h*>(p), vu32) << 16;
  return reinterpret_cast<vf32&>(bits);
}
static inline vf32 load_widened(const fp16* p) {
#if defined(__AVX512F__)
  return vf32(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return vf32(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf32 y;
  for (int i = 0; i < kLanes<float>; i++) y[i] = float(p[i]);
  return y;
#endif
}

static inline void store_narrowed(float* p, vf32 v) { store(p, v); }
static inline void store_narrowed(double* p, vf64 v) { store(p, v); }
static inline void store_narrowed(bf16* p, vf32 v) {
  vu32 bits = reinterpret_cast<vu32&>(v);
  vu32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vi32 is_nan = (v != v);
  vu32 out = (reinterpret_cast<vu32&>(is_nan) & ((bits >> 16) | 0x40)) | (~reinterpret_cast<vu32&>(is_nan) & rounded);
  *reinterpret_cast<vu16h*>(p) = __builtin_convertvector(out, vu16h);
}
static inline void store_narrowed(fp16* p, vf32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; i++) p[i] = fp16(v[i]);
#endif
}

// dst[0:n] = src[0:n], changing the storage type through Acc
template <class D, class S> static inline void convert_row(D* dst, const S* src, int64_t n) {
  constexpr int V = kLanes<Acc<S>>;
  int64_t i = 0;
  for (; i + V <= n; i += V) store_narrowed(dst + i, load_widened(src + i));
  for (; i < n; i++) dst[i] = narrow<D>(widen(src[i]));
}

// sum[0:n] += row[0:n], in Acc
template <class T> static inline void accumulate(Acc<T>* sum, const T* row, int64_t n) {
  constexpr int V = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + V <= n; i += V) store(sum + i, load(sum + i) + load_widened(row + i));
  for (; i < n; i++) sum[i] += widen(row[i]);
}

// ---- reductions in a fixed order (lanes are added from the first to the last)

template <class T> static inline T sum_lanes(Vec<T> v) {
  T s = v[0];
  for (int i = 1; i < kLanes<T>; i++) s += v[i];
  return s;
}
template <class T> static inline T max_lanes(Vec<T> v) {
  T s = v[0];
  for (int i = 1; i < kLanes<T>; i++) s = v[i] > s ? v[i] : s;
  return s;
}
template <class T> static inline Vec<T> max(Vec<T> a, Vec<T> b) { return a > b ? a : b; }
template <class T> static inline Vec<T> min(Vec<T> a, Vec<T> b) { return a < b ? a : b; }

// ---- transposition: rows become columns, by exchanging blocks of half the size, a quarter, ... one lane

// The even blocks of lanes of a and b, those of b in the places of the odd ones of a; or, HIGH, the odd blocks of both.
template <int BLOCK, bool HIGH, class V, int... lane> static inline V exchange(V a, V b) {
  constexpr int L = int(sizeof...(lane));
  return __builtin_shufflevector(a, b, ((lane & BLOCK ? L + lane - BLOCK : lane) + (HIGH ? BLOCK : 0))...);
}
template <int BLOCK, bool HIGH, class T> static inline Vec<T> exchange_blocks(Vec<T> a, Vec<T> b) {
  if constexpr (kLanes<T> == 2)
    return exchange<BLOCK, HIGH, Vec<T>, 0, 1>(a, b);
  else if constexpr (kLanes<T> == 4)
    return exchange<BLOCK, HIGH, Vec<T>, 0, 1, 2, 3>(a, b);
  else if constexpr (kLanes<T> == 8)
    return exchange<BLOCK, HIGH, Vec<T>, 0, 1, 2, 3, 4, 5, 6, 7>(a, b);
  else
    return exchange<BLOCK, HIGH, Vec<T>, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b);
}
template <class T, int BLOCK = kLanes<T> / 2> static inline void transpose(Vec<T>* rows) {
  for (int i = 0; i < kLanes<T>; i++) {
    if (i & BLOCK) continue;
    const Vec<T> a = rows[i], b = rows[i + BLOCK];
    rows[i] = exchange_blocks<BLOCK, false, T>(a, b);
    rows[i + BLOCK] = exchange_blocks<BLOCK, true, T>(a, b);
  }
  if constexpr (BLOCK > 1) transpose<T, BLOCK / 2>(rows);
}

// ---- exp: relative error below 2e-7 (float) on [-87.3, 88.3]; 0 below, saturated above; NaN stays NaN
static inline vf32 vexp(vf32 x) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2Hi = 0.693145751953125f, kLn2Lo = 1.42860682030941723e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  vf32 c = x > 88.3f ? splat(88.3f) : x;
#if !defined(__AVX512F__)
  c = c < -87.3f ? splat(-87.3f) : c;
#endif
  vf32 shifted = c * kLog2e + kRound;
  vf32 n = shifted - kRound;
  vf32 r = c - n * kLn2Hi;
  r = r - n * kLn2Lo;
  vf32 p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return vf32(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-87.3f), _CMP_NLT_UQ), p, n));
#else
  vi32 exponent = (__builtin_convertvector(n, vi32) + 127) << 23;
  vf32 y = p * reinterpret_cast<vf32&>(exponent);
  return x < -87.3f ? splat(0.0f) : y;
#endif
}
static inline vf64 vexp(vf64 x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::exp(x[i]);
  return x;
}

// ---- 2^x: relative error below 1.1e-7 (float) on [-126, 127]; 0 below, saturated above; NaN stays NaN. Cheaper than
// exp for a softmax that scales its logits anyway: by log2(e) too.
static inline vf32 vexp2(vf32 x) {
#if defined(__AVX512F__)
  vf32 r = vf32(_mm512_reduce_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  vf32 n = x - r;
#else
  constexpr float kRound = 12582912.0f;  // as in vexp
  vf32 c = x > 127.0f ? splat(127.0f) : x;
  c = c < -126.0f ? splat(-126.0f) : c;
  vf32 n = (c + kRound) - kRound;
  vf32 r = c - n;
#endif
  vf32 p = splat(1.53458081e-4f);  // of the least relative error on [-1/2, 1/2]
  p = p * r + 1.33999321e-3f;
  p = p * r + 9.61848907e-3f;
  p = p * r + 5.55032864e-2f;
  p = p * r + 2.40226462e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return vf32(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  vi32 exponent = (__builtin_convertvector(n, vi32) + 127) << 23;
  vf32 y = p * reinterpret_cast<vf32&>(exponent);
  return x < -126.0f ? splat(0.0f) : y;
#endif
}
static inline vf64 vexp2(vf64 x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::exp2(x[i]);
  return x;
}

// ---- log(1 + x) for x in [0, 1]: relative error below 2.5e-7 (float), however small x is; NaN stays NaN.
// log(1 + x) = 2 atanh(x / (2 + x)), whose series in t^2 <= 1/9 is cut after eight terms.
static inline vf32 vlog1p(vf32 x) {
  vf32 t = x / (x + 2.0f), u = t * t;
  vf32 p = splat(2.0f / 15);
  p = p * u + 2.0f / 13;
  p = p * u + 2.0f / 11;
  p = p * u + 2.0f / 9;
  p = p * u + 2.0f / 7;
  p = p * u + 2.0f / 5;
  p = p * u + 2.0f / 3;
  p = p * u + 2.0f;
  return p * t;
}
static inline vf64 vlog1p(vf64 x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::log1p(x[i]);
  return x;
}

}  // namespace fvm::FVM_ISA
