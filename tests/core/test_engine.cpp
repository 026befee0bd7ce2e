// SPDX-License-Identifier: Apache-2.0
// simd.h and gemm.h: exp and log1p within the bounds they state, rounding, transposition, and packed products.
#include <cmath>
#include <cstring>
#include <limits>

#include "arrays.h"
#include "engine_table.h"
#include "harness.h"

namespace fvm::test {

#define X(isa) extern const Engine engine_##isa;
FVM_ISA_LIST
#undef X

const Engine& engine() {
#define X(name) \
  if (std::string(kernels().isa) == #name) return engine_##name;
  FVM_ISA_LIST
#undef X
  std::abort();
}

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr Dtype kWide[] = {Dtype::f64, Dtype::f32};

using Elementwise = void (*)(Dtype, const void* x, void* y, int64_t n);

// f(x), padded to whole vectors
std::vector<double> apply(Elementwise f, Dtype dtype, std::vector<double> x) {
  const size_t n = x.size(), lanes = size_t(engine().lanes);
  x.resize((n + lanes - 1) / lanes * lanes, 0.5);
  const Array in(dtype, x), out(dtype, int64_t(x.size()));
  f(dtype, in, out, int64_t(x.size()));
  std::vector<double> y = out.values();
  return y.resize(n), y;
}

// Largest relative error over x
double relative_error(Elementwise f, double (*exact)(double), Dtype dtype, const std::vector<double>& x) {
  const std::vector<double> y = apply(f, dtype, x);
  double worst = 0;
  for (size_t i = 0; i < x.size(); i++) {
    const double expected = exact(x[i]), error = std::fabs(y[i] - expected);
    if (!(error <= worst * std::fabs(expected))) worst = error / std::fabs(expected);  // a NaN stays
  }
  return worst;
}

// Floats from low to high, as evenly spread over their bit patterns as over their values
std::vector<double> floats_between(float low, float high, int64_t n) {
  std::vector<double> x = uniform(n / 2, 1, low, high);
  for (const float end : {low, high}) {
    if (end == 0) continue;
    uint32_t last;
    std::memcpy(&last, &end, 4);
    const uint32_t magnitude = last & 0x7fffffff, first = 0x00800000;
    for (int64_t i = 0; i < n / 2; i++) {
      const uint32_t bits = first + uint32_t(uint64_t(magnitude - first) * uint64_t(i) / (n / 2 - 1));
      float f;
      const uint32_t with_sign = bits | (last & 0x80000000);
      std::memcpy(&f, &with_sign, 4);
      x.push_back(f);
    }
  }
  return round_to(Dtype::f32, x);
}

std::string text_of(double x) {
  char text[32];
  snprintf(text, sizeof text, "%.3e", x);
  return text;
}

void check_bound(const char* what, double error, double bound) {
  if (!(error <= bound))
    fail(__FILE__, __LINE__, what + (": relative error " + text_of(error) + ", stated is " + text_of(bound)));
}

double exp_of(double x) { return std::exp(x); }
double log1p_of(double x) { return std::log1p(x); }

}  // namespace

// ---- exp and log1p

TEST(exp_keeps_its_bound) {
  check_bound("f32", relative_error(engine().exp, exp_of, Dtype::f32, floats_between(-87.3f, 88.3f, 400000)), 2e-7);
  check_bound("f64", relative_error(engine().exp, exp_of, Dtype::f64, uniform(20000, 2, -708, 709)), 1e-15);
}

TEST(exp_at_the_ends) {
  const std::vector<double> x = {0.0, -0.0, -87.4, -1e4, -3e38, -kInfinity, kNaN};
  check_close("f32", apply(engine().exp, Dtype::f32, x), {1, 1, 0, 0, 0, 0, kNaN}, 0);
  check_close("f64", apply(engine().exp, Dtype::f64, {0, -1e4, -kInfinity, kInfinity, kNaN}),
              {1, 0, 0, kInfinity, kNaN}, 0);
  for (const double y : apply(engine().exp, Dtype::f32, {88.4, 1e4, 3e38, kInfinity})) CHECK(y > 2e38);  // saturated
}

TEST(log1p_keeps_its_bound) {
  check_bound("f32", relative_error(engine().log1p, log1p_of, Dtype::f32, floats_between(0, 1, 400000)), 2.5e-7);
  check_bound("f64", relative_error(engine().log1p, log1p_of, Dtype::f64, uniform(20000, 3, 0, 1)), 1e-15);
  for (const Dtype dtype : kWide) {
    check_close("zero and NaN", apply(engine().log1p, dtype, {0, kNaN}), {0, kNaN}, 0);
    check_bound("tiny", relative_error(engine().log1p, log1p_of, dtype, {0x1p-100, 0x1p-30, 0x1p-24, 0x1p-12}), 2.5e-7);
  }
}

// ---- storage types

TEST(every_half_is_widened_exactly) {
  Numbers<uint16_t> bits(65536);
  for (int i = 0; i < 65536; i++) bits[i] = uint16_t(i);
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    const Scope scope(name_of(dtype));
    Array halves(dtype, 65536);
    std::memcpy(halves.data(), bits.data(), 65536 * 2);
    const Array wide(Dtype::f32, 65536);
    engine().widen(dtype, halves, wide, 65536);
    check_close("widened", wide.values(), halves.values(), 0);
    const Array back(dtype, 65536);
    engine().narrow(dtype, wide, back, 65536);
    check_close("and back", back.values(), halves.values(), 0);
  }
}

TEST(floats_are_rounded_to_nearest_even) {
  std::vector<double> x = uniform(5001, 4);  // an odd number: vectors and the rest of a row
  for (int exponent = -30; exponent < 17; exponent++)
    for (const double mantissa :
         {1.0, 1 + 0x1p-8, 1 + 3 * 0x1p-8, 1 + 0x1p-8 + 0x1p-23, 1 + 0x1p-11, 1 + 3 * 0x1p-11, 2 - 0x1p-23})
      for (const double sign : {-1.0, 1.0}) x.push_back(std::ldexp(sign * mantissa, exponent));
  for (const double special : {0.0, kInfinity, -kInfinity, kNaN, 65519.0, 65520.0, 3.4e38, 0x1p-126})
    x.push_back(special);
  const int64_t n = int64_t(x.size());
  const Array in(Dtype::f32, x);
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    const Scope scope(name_of(dtype));
    const Array out(dtype, n);
    engine().narrow(dtype, in, out, n);
    check_close("rounded", out.values(), round_to(dtype, in.values()), 0);
  }
}

TEST(rows_are_accumulated) {
  for (const Dtype dtype : kFloats)
    for (const int64_t n : {1, 7, 16, 33}) {
      const Scope scope(name_of(dtype) + (" n " + std::to_string(n)));
      const Array row(dtype, uniform(n, 5)), sum(accumulation(dtype), uniform(n, 6));
      std::vector<double> expected = sum.values();
      for (int64_t i = 0; i < n; i++) expected[i] += row.values()[i];
      engine().accumulate(dtype, row, sum, n);
      check_close("sum", sum.values(), expected, 1e-6);
    }
}

TEST(rows_become_columns) {
  for (const Dtype dtype : kWide) {
    const int64_t L = engine().lanes * 4 / size_of(dtype);
    std::vector<double> x(L * L), expected(L * L);
    for (int64_t i = 0; i < L * L; i++) x[i] = double(i), expected[i % L * L + i / L] = double(i);
    const Array square(dtype, x);
    engine().transpose(dtype, square);
    check_close(name_of(dtype), square.values(), expected, 0);
  }
}

// ---- products

namespace {

double at(const std::vector<double>& x, Layout layout, int64_t rows, int64_t K, int64_t i, int64_t k) {
  return x[layout == Layout::rows ? i * K + k : k * rows + i];
}

void check_product(Dtype dtype, Path path, Layout a_layout, Layout b_layout, int64_t m, int64_t n, int64_t K) {
  const Array a(dtype, uniform(m * K, 7)), b(dtype, uniform(n * K, 8)), out(accumulation(dtype), m * n);
  const std::vector<double> av = a.values(), bv = b.values();
  std::vector<double> expected(m * n);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++)
      for (int64_t k = 0; k < K; k++)
        expected[i * n + j] += at(av, a_layout, m, K, i, k) * at(bv, b_layout, n, K, j, k);
  if (path == Path::partial_added)
    for (double& value : expected) value *= 2;
  const Block workspace(engine().product_workspace(dtype, m, n, K, path));
  engine().product(dtype, path, {a, b, a_layout, b_layout, m, n, K}, workspace.data(), out);
  check_close("product", out.values(), expected, dtype == Dtype::f64 ? 1e-13 : 3e-6);  // halves are multiplied exactly
}

}  // namespace

TEST(products_of_every_layout_and_size) {
  constexpr int64_t kSizes[][3] = {{1, 1, 1},    {3, 5, 2},    {14, 32, 16}, {15, 33, 17},
                                   {29, 70, 31}, {8, 12, 257}, {2, 97, 515}};
  for (const Dtype dtype : kFloats)
    for (const Path path : {Path::packed, Path::row_panels, Path::partial_added})
      for (const Layout a : {Layout::rows, Layout::columns})
        for (const Layout b : {Layout::rows, Layout::columns})
          for (const auto& [m, n, K] : kSizes) {
            if (path == Path::row_panels && a == Layout::columns) continue;  // row panels are made of rows
            const Scope scope(std::string(name_of(dtype)) + " path " + std::to_string(int(path)) + " layouts " +
                              std::to_string(int(a)) + std::to_string(int(b)) + " m " + std::to_string(m) + " n " +
                              std::to_string(n) + " K " + std::to_string(K));
            check_product(dtype, path, a, b, m, n, K);
          }
}

}  // namespace fvm::test
