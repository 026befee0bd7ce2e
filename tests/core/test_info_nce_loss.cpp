// SPDX-License-Identifier: Apache-2.0
// info_nce_loss against its formula, with the matrix of logits: statistics of rows, pulls, gradients of keys.
#include "harness.h"
#include "pairs.h"

namespace fvm::test {
namespace {

struct Case {
  const char* words;
  int64_t n, K, D;
  double scale = 5;
  bool positive = true;  // each query has a key of its own, beside the keys of all
  int64_t classes = 0;   // of queries and keys, for gradients of keys that are positives of several
};

constexpr Case kCases[] = {
    {.words = "one of each", .n = 1, .K = 1, .D = 1},
    {.words = "no keys of all", .n = 3, .K = 0, .D = 7},
    {.words = "odd", .n = 13, .K = 37, .D = 5},
    {.words = "several positives", .n = 29, .K = 83, .D = 17, .positive = false, .classes = 7},
    {.words = "long queue", .n = 71, .K = 1501, .D = 12},
    {.words = "many queries", .n = 307, .K = 61, .D = 9},
    {.words = "temperature 0.01", .n = 33, .K = 97, .D = 33, .scale = 100},
    {.words = "temperature 0.001", .n = 17, .K = 65, .D = 3, .scale = 1000},
    {.words = "negative temperature", .n = 15, .K = 49, .D = 6, .scale = -8},
};
constexpr double kLossGradient = 0.7;

struct Inputs {
  Case c;
  Dtype dtype;
  Array query, positive, keys;
  Numbers<int32_t> row_ids, key_ids;
  Numbers<double> share;

  Inputs(const Case& c, Dtype dtype)
      : c(c),
        dtype(dtype),
        query(unit_rows(dtype, c.n, c.D, 1)),
        positive(c.positive ? unit_rows(dtype, c.n, c.D, 2) : Array()),
        keys(c.K ? unit_rows(dtype, c.K, c.D, 3) : Array()),
        row_ids(pair_ids(c.n, c.classes, 4)),
        key_ids(pair_ids(c.K, c.classes, 5)),
        share(uniform(c.n, 6, 0, 0.5)) {}
};

struct Results { Matrix stats, loss, pull, dkeys; };

Results reference(const Inputs& in) {
  const int64_t n = in.c.n, K = in.c.K, D = in.c.D;
  const double scale = in.c.scale;
  const Matrix q = in.query.values(), own = in.positive.values(), keys = in.keys.values();
  const Matrix s = similarities(q, keys, D);
  Results r = {Matrix(3 * n), Matrix(1), Matrix(n * D), {}};
  Matrix g(n * K);
  for (int64_t i = 0; i < n; i++) {
    Matrix row(s.begin() + i * K, s.begin() + (i + 1) * K);
    for (int64_t d = 0; d < D && in.c.positive; d++) {
      if (d == 0) row.push_back(0);
      row.back() += q[i * D + d] * own[i * D + d];
    }
    const double lse = log_sum_exp(row.data(), int64_t(row.size()), 1, scale);
    const double own_logit = in.c.positive ? scale * row.back() : 0;
    double miss = in.c.positive ? 0 : 1;
    for (int64_t j = 0; j < K; j++) {
      const double p = std::exp(scale * s[i * K + j] - lse);
      if (in.c.positive) miss += p;
      for (int64_t d = 0; d < D; d++) r.pull[i * D + d] += p * keys[j * D + d];
      g[i * K + j] = p - (in.c.classes && in.row_ids[i] == in.key_ids[j] ? in.share[i] : 0);
    }
    for (int64_t d = 0; d < D && in.c.positive; d++) r.pull[i * D + d] -= miss * own[i * D + d];
    r.loss[0] += (lse - own_logit) / double(n);
    r.stats[i] = lse - own_logit, r.stats[n + i] = miss, r.stats[2 * n + i] = lse;
  }
  r.dkeys = product(transposed(g, n, K), q, K, n, D, kLossGradient * scale / double(n));
  return r;
}

Outputs forward(const Inputs& in, int64_t threads, bool want_pull) {
  const Case& c = in.c;
  Outputs r;
  r.push_back({"stats", Array(Dtype::f64, 3 * c.n)});
  r.push_back({"loss", Array(accumulation(in.dtype), 1)});
  r.push_back({"pull", want_pull ? Array(accumulation(in.dtype), c.n * c.D) : Array()});
  const Block workspace(RUN(info_nce_loss_fwd_workspace, c.n, c.K, c.D, want_pull, in.dtype, threads));
  RUN(info_nce_loss_fwd, in.query, test::in(in.positive), test::in(in.keys), static_cast<double*>(r[0].value.data()),
      r[1].value, out(r[2].value), workspace.data(), c.scale, c.n, c.K, c.D, in.dtype, threads);
  return r;
}

Outputs backward(const Inputs& in, const double* lse, int64_t threads) {
  const Case& c = in.c;
  Outputs r;
  r.push_back({"dkeys", Array(accumulation(in.dtype), c.K * c.D)});
  const Block workspace(RUN(info_nce_loss_bwd_workspace, c.n, c.K, c.D, in.dtype, threads));
  auto ids = [&](const Numbers<int32_t>& of) { return Maybe<const int32_t>{c.classes ? of.data() : nullptr}; };
  RUN(info_nce_loss_bwd, in.query, in.keys, ids(in.row_ids), ids(in.key_ids), lse,
      Maybe<const double>{c.classes ? in.share.data() : nullptr}, r[0].value, workspace.data(), c.scale, kLossGradient,
      c.n, c.K, c.D, in.dtype, threads);
  return r;
}

void check_case(const Case& c, Dtype dtype) {
  const Inputs in(c, dtype);
  const Results expected = reference(in);
  const Outputs got = run_on_threads([&](int64_t threads) { return forward(in, threads, true); });
  check_close("stats", got[0].value.values(), expected.stats, tolerance(dtype));
  check_close("loss", got[1].value.values(), expected.loss, tolerance(dtype));
  check_close("pull", got[2].value.values(), expected.pull, 4 * tolerance(dtype));
  const Outputs some = forward(in, 2, false);
  for (int i = 0; i < 2; i++) CHECK(some[i].value.same_bits(got[i].value));
  if (c.K == 0) return;
  const double* lse = static_cast<const double*>(got[0].value.data()) + 2 * c.n;
  const Outputs g = run_on_threads([&](int64_t threads) { return backward(in, lse, threads); });
  check_close("dkeys", g[0].value.values(), expected.dkeys, 4 * tolerance(dtype));
}

}  // namespace

TEST(info_nce_loss_is_its_formula) {
  for (const Case& c : kCases)
    for (const Dtype dtype : kFloats) {
      const Scope scope(std::string(c.words) + ", " + name_of(dtype));
      check_case(c, dtype);
    }
}

}  // namespace fvm::test
