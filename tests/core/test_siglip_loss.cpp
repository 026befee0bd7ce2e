// SPDX-License-Identifier: Apache-2.0
// siglip_loss against its formula, with the matrix of logits: sum of log(1 + exp(-z S)) and its gradients.
#include "harness.h"
#include "pairs.h"

namespace fvm::test {
namespace {

struct Case {
  const char* words;
  int64_t n, m, D;
  double scale = 10, bias = -5;
  int64_t classes = 0;  // of ids; none: pair (i, i)
};

constexpr Case kCases[] = {
    {.words = "one pair", .n = 1, .m = 1, .D = 1},
    {.words = "odd", .n = 7, .m = 7, .D = 5},
    {.words = "rectangular, classes", .n = 37, .m = 19, .D = 33, .classes = 6},
    {.words = "several blocks", .n = 283, .m = 283, .D = 17, .scale = 30},
    {.words = "several chunks", .n = 601, .m = 43, .D = 8, .classes = 50},
    {.words = "large logits", .n = 65, .m = 65, .D = 64, .scale = 1000, .bias = 100},
    {.words = "negative scale", .n = 31, .m = 31, .D = 9, .scale = -20, .bias = 3},
};

constexpr double kWeight = 0.03;

struct Results { Matrix loss, slopes, dx, dy; };

Results reference(const Case& c, const Matrix& x, const Matrix& y, const int32_t* row_ids, const int32_t* col_ids) {
  const Matrix s = similarities(x, y, c.D);
  Matrix g(c.n * c.m), loss(1), slopes(2);
  for (int64_t i = 0; i < c.n; i++)
    for (int64_t j = 0; j < c.m; j++) {
      const double z = row_ids[i] == col_ids[j] ? 1 : -1, v = z * (c.scale * s[i * c.m + j] + c.bias);
      const double gradient = -kWeight * z / (1 + std::exp(v));
      loss[0] += kWeight * (std::log1p(std::exp(-std::fabs(v))) + std::fmax(-v, 0));
      slopes[0] += gradient * s[i * c.m + j];
      slopes[1] += gradient;
      g[i * c.m + j] = gradient;
    }
  return {loss, slopes, product(g, y, c.n, c.m, c.D, c.scale),
          product(transposed(g, c.n, c.m), x, c.m, c.n, c.D, c.scale)};
}

void check_case(const Case& c, Dtype dtype) {
  const Array x = unit_rows(dtype, c.n, c.D, 1), y = unit_rows(dtype, c.m, c.D, 2);
  const Numbers<int32_t> row_ids(pair_ids(c.n, c.classes, 5)), col_ids(pair_ids(c.m, c.classes, 6));
  const Results expected = reference(c, x.values(), y.values(), row_ids, col_ids);
  auto given = [&](const Numbers<int32_t>& ids) { return Maybe<const int32_t>{c.classes ? ids.data() : nullptr}; };
  auto run = [&](int64_t threads, bool want_x, bool want_y) {
    const Dtype S = accumulation(dtype);
    Outputs r;
    r.push_back({"loss", Array(S, 1)});
    r.push_back({"slopes", Array(S, 2)});
    r.push_back({"dx", want_x ? Array(S, c.n * c.D) : Array()});
    r.push_back({"dy", want_y ? Array(S, c.m * c.D) : Array()});
    const Block workspace(RUN(siglip_loss_workspace, c.n, c.m, c.D, want_x, want_y, dtype, threads));
    RUN(siglip_loss, x, y, given(row_ids), given(col_ids), c.scale, c.bias, kWeight, r[0].value, r[1].value,
        out(r[2].value), out(r[3].value), workspace.data(), c.n, c.m, c.D, dtype, threads);
    return r;
  };
  const Outputs got = run_on_threads([&](int64_t threads) { return run(threads, true, true); });
  check_close("loss", got[0].value.values(), expected.loss, tolerance(dtype));
  check_close("slopes", got[1].value.values(), expected.slopes, 4 * tolerance(dtype));
  check_close("dx", got[2].value.values(), expected.dx, 4 * tolerance(dtype));
  check_close("dy", got[3].value.values(), expected.dy, 4 * tolerance(dtype));
  for (const auto& [want_x, want_y] : {std::pair(true, false), {false, true}, {false, false}}) {
    const Outputs some = run(2, want_x, want_y);
    for (int i = 0; i < 4; i++) CHECK(!some[i].value.data() || some[i].value.same_bits(got[i].value));
  }
}

}  // namespace

TEST(siglip_loss_is_its_formula) {
  for (const Case& c : kCases)
    for (const Dtype dtype : kFloats) {
      const Scope scope(std::string(c.words) + ", " + name_of(dtype));
      check_case(c, dtype);
    }
}

}  // namespace fvm::test
