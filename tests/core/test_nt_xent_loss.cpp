// SPDX-License-Identifier: Apache-2.0
// nt_xent_loss against its formula, with the whole matrix of logits.
#include "harness.h"
#include "pairs.h"

namespace fvm::test {
namespace {

struct Case {
  const char* words;
  int64_t R, D;
  double scale = 5;
  bool twins = false;  // both views of an image are equal
};

constexpr Case kCases[] = {
    {.words = "one image", .R = 2, .D = 1},
    {.words = "odd", .R = 14, .D = 5},
    {.words = "more rows than a tile", .R = 66, .D = 33},
    {.words = "several blocks", .R = 566, .D = 17},
    {.words = "temperature 0.01", .R = 62, .D = 8, .scale = 100},
    {.words = "temperature 0.001", .R = 34, .D = 2, .scale = 1000},
    {.words = "told apart", .R = 58, .D = 40, .scale = 15, .twins = true},
};
constexpr double kWeight = 0.03, kLossGradient = 0.7;

Array views(const Case& c, Dtype dtype) {
  Matrix z = unit_rows(Dtype::f64, c.R, c.D, 1).values();
  if (c.twins)
    for (int64_t i = 0; i < c.R * c.D / 2; i++) z[c.R * c.D / 2 + i] = z[i];
  return Array(dtype, z);
}

struct Results { Matrix lse, positive_sum = {0}, loss = {0}, dz, dscale = {0}; };

Results reference(const Case& c, const Matrix& z) {
  const int64_t R = c.R;
  Matrix s = similarities(z, z, c.D), g(R * R);
  Results r;
  for (int64_t i = 0; i < R; i++) {
    std::vector<double> others;
    for (int64_t j = 0; j < R; j++)
      if (j != i) others.push_back(s[i * R + j]);
    r.lse.push_back(log_sum_exp(others.data(), R - 1, 1, c.scale));
    r.loss[0] += (r.lse[i] - c.scale * s[i * R + (i + R / 2) % R]) / double(R);
    if (i < R / 2) r.positive_sum[0] += c.scale * s[i * R + i + R / 2];
  }
  for (int64_t i = 0; i < R; i++)  // both directions of a pair
    for (int64_t j = 0; j < R; j++) {
      if (i == j) continue;
      const double logit = c.scale * s[i * R + j], both = std::exp(logit - r.lse[i]) + std::exp(logit - r.lse[j]);
      g[i * R + j] = kWeight * (both - (j == (i + R / 2) % R ? 2 : 0));
      r.dscale[0] += kLossGradient * g[i * R + j] * s[i * R + j] / 2;
    }
  r.dz = product(g, z, R, R, c.D, kLossGradient * c.scale);
  return r;
}

Outputs run(const Case& c, const Array& z, Dtype dtype, int64_t threads, bool want_z) {
  Outputs r;
  r.push_back({"lse", Array(Dtype::f64, c.R)});
  r.push_back({"positive_sum", Array(Dtype::f64, 1)});
  r.push_back({"loss", Array(accumulation(dtype), 1)});
  r.push_back({"dz", want_z ? Array(accumulation(dtype), c.R * c.D) : Array()});
  r.push_back({"dscale", Array(accumulation(dtype), 1)});
  auto number = [&](int i) { return static_cast<double*>(r[i].value.data()); };
  const Block forward(RUN(nt_xent_loss_fwd_workspace, c.R, c.D, dtype, threads));
  RUN(nt_xent_loss_fwd, z, number(0), number(1), r[2].value, forward.data(), c.scale, c.R, c.D, dtype, threads);
  const Block backward(RUN(nt_xent_loss_bwd_workspace, c.R, c.D, dtype, threads));
  RUN(nt_xent_loss_bwd, z, number(0), out(r[3].value), r[4].value, backward.data(), c.scale, kWeight, kLossGradient,
      c.R, c.D, dtype, threads);
  return r;
}

void check_case(const Case& c, Dtype dtype) {
  const Array z = views(c, dtype);
  const Results expected = reference(c, z.values());
  const Outputs got = run_on_threads([&](int64_t threads) { return run(c, z, dtype, threads, true); });
  // Of views told apart well the gradients are differences that nearly vanish.
  const double loose = c.twins ? 1e3 : 1;
  check_close("lse", got[0].value.values(), expected.lse, tolerance(dtype));
  check_close("positive_sum", got[1].value.values(), expected.positive_sum, 4 * tolerance(dtype));
  check_close("loss", got[2].value.values(), expected.loss, 4 * loose * tolerance(dtype));
  check_close("dz", got[3].value.values(), expected.dz, 4 * loose * tolerance(dtype));
  check_close("dscale", got[4].value.values(), expected.dscale, 20 * loose * tolerance(dtype));
  CHECK(run(c, z, dtype, 2, false)[4].value.same_bits(got[4].value));
}

}  // namespace

TEST(nt_xent_loss_is_its_formula) {
  for (const Case& c : kCases)
    for (const Dtype dtype : kFloats) {
      const Scope scope(std::string(c.words) + ", " + name_of(dtype));
      check_case(c, dtype);
    }
}

}  // namespace fvm::test
