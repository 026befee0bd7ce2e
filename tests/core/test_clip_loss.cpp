// SPDX-License-Identifier: Apache-2.0
// clip_loss against its formula, with the matrix of logits: log-sum-exps, targets and gradients.
#include "harness.h"
#include "pairs.h"

namespace fvm::test {
namespace {

struct Case {
  const char* words;
  int64_t n, m, D;
  double scale = 10;
  int64_t classes = 0;    // of ids; none: pair (i, i)
  int64_t teacher_D = 0;  // none: no teacher
  double smoothing = 0;
  bool plain = false;  // ids and targets are left out: pair (i, i) is positive, and rows and columns weigh the same
};

constexpr Case kCases[] = {
    {.words = "one pair", .n = 1, .m = 1, .D = 1},
    {.words = "odd", .n = 7, .m = 7, .D = 5},
    {.words = "rectangular, classes", .n = 37, .m = 19, .D = 33, .classes = 6},
    {.words = "several blocks", .n = 283, .m = 283, .D = 17, .scale = 30},
    {.words = "several chunks", .n = 601, .m = 43, .D = 8, .classes = 50},
    {.words = "wide", .n = 20, .m = 301, .D = 3, .classes = 300},
    {.words = "scale 100", .n = 65, .m = 65, .D = 64, .scale = 100},
    {.words = "scale 1000", .n = 33, .m = 33, .D = 2, .scale = 1000},
    {.words = "negative scale", .n = 31, .m = 31, .D = 9, .scale = -20},
    {.words = "scale 0", .n = 5, .m = 5, .D = 4, .scale = 0},
    {.words = "smoothing", .n = 29, .m = 29, .D = 12, .smoothing = 0.1},
    {.words = "plain", .n = 67, .m = 67, .D = 10, .plain = true},
    {.words = "plain, smoothing", .n = 45, .m = 45, .D = 7, .smoothing = 0.2, .plain = true},
    {.words = "teacher", .n = 41, .m = 23, .D = 16, .classes = 9, .teacher_D = 7},
    {.words = "teacher and smoothing", .n = 15, .m = 15, .D = 6, .teacher_D = 31, .smoothing = 0.3},
};
constexpr double kTeacherScale = 4, kTeacherWeight = 0.4, kLossGradient = 0.7;

// Weights of rows (or columns), of each of their positives, and the teacher's log-sum-exps: [3, n]
Matrix targets(const Case& c, int64_t n, uint64_t seed, const Matrix& teacher_lse) {
  Matrix t = uniform(2 * n, seed, 0, 1 / double(n));
  for (int64_t i = 0; i < 2 * n && c.plain; i++) t[i] = 0.5 / double(n) * (i < n ? 1 : 1 - c.smoothing);
  for (int64_t i = 0; i < n; i++) t.push_back(teacher_lse.empty() ? 0 : teacher_lse[i]);
  return t;
}

struct Inputs {
  Case c;
  Dtype dtype;
  Array x, y, teacher_x, teacher_y;
  Matrix teacher;  // similarities [n, m]
  Numbers<int32_t> row_ids, col_ids;
  Numbers<double> rows, columns;

  Inputs(const Case& c, Dtype dtype)
      : c(c),
        dtype(dtype),
        x(unit_rows(dtype, c.n, c.D, 1)),
        y(unit_rows(dtype, c.m, c.D, 2)),
        teacher_x(c.teacher_D ? unit_rows(dtype, c.n, c.teacher_D, 3) : Array()),
        teacher_y(c.teacher_D ? unit_rows(dtype, c.m, c.teacher_D, 4) : Array()),
        teacher(c.teacher_D ? similarities(teacher_x.values(), teacher_y.values(), c.teacher_D) : Matrix()),
        row_ids(pair_ids(c.n, c.classes, 5)),
        col_ids(pair_ids(c.m, c.classes, 6)),
        rows(targets(c, c.n, 7, c.teacher_D ? row_lses(teacher, c.n, c.m, kTeacherScale) : Matrix())),
        columns(targets(c, c.m, 8, c.teacher_D ? column_lses(teacher, c.n, c.m, kTeacherScale) : Matrix())) {}

  template <class T> Maybe<const T> given(const Numbers<T>& numbers) const {
    return {c.plain ? nullptr : numbers.data()};
  }

  double target(int64_t i, int64_t j) const {
    const double w = rows[i], v = columns[j];
    double q = w * c.smoothing / double(c.m) + v * c.smoothing / double(c.n);
    if (row_ids[i] == col_ids[j]) q += rows[c.n + i] + columns[c.m + j];
    if (c.teacher_D) {
      const double t = kTeacherScale * teacher[i * c.m + j];
      q += kTeacherWeight * (w * std::exp(t - rows[2 * c.n + i]) + v * std::exp(t - columns[2 * c.m + j]));
    }
    return q;
  }
};

struct Results { Matrix lse, target_sum = {0}, loss = {0}, dx, dy, dscale = {0}; };

Results reference(const Inputs& in) {
  const int64_t n = in.c.n, m = in.c.m, D = in.c.D;
  const Matrix x = in.x.values(), y = in.y.values(), s = similarities(x, y, D);
  const Matrix row_lse = row_lses(s, n, m, in.c.scale), col_lse = column_lses(s, n, m, in.c.scale);
  Results r;
  Matrix g(n * m);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) {
      const double logit = in.c.scale * s[i * m + j], q = in.target(i, j);
      g[i * m + j] = in.rows[i] * std::exp(logit - row_lse[i]) + in.columns[j] * std::exp(logit - col_lse[j]) - q;
      r.target_sum[0] += q * logit;
      r.dscale[0] += kLossGradient * g[i * m + j] * s[i * m + j];
    }
  r.loss[0] = -r.target_sum[0];
  for (int64_t i = 0; i < n; i++) r.lse.push_back(row_lse[i]), r.loss[0] += in.rows[i] * row_lse[i];
  for (int64_t j = 0; j < m; j++) r.lse.push_back(col_lse[j]), r.loss[0] += in.columns[j] * col_lse[j];
  r.dx = product(g, y, n, m, D, kLossGradient * in.c.scale);
  r.dy = product(transposed(g, n, m), x, m, n, D, kLossGradient * in.c.scale);
  return r;
}

// ---- the kernels

// The last output are the similarities that the backward need not make again.
Outputs forward(const Inputs& in, int64_t threads, int64_t kept_size = 0) {
  const Case& c = in.c;
  const Dtype S = accumulation(in.dtype);
  Outputs r;
  r.push_back({"lse", Array(Dtype::f64, c.n + c.m)});
  r.push_back({"target_sum", Array(Dtype::f64, 1)});
  r.push_back({"loss", Array(S, 1)});
  r.push_back({"kept", kept_size ? Array(S, kept_size) : Array()});
  const Block workspace(RUN(clip_loss_fwd_workspace, c.n, c.m, c.D, c.teacher_D, in.dtype, threads));
  RUN(clip_loss_fwd, in.x, in.y, in.given(in.row_ids), in.given(in.col_ids), in.given(in.rows), in.given(in.columns),
      test::in(in.teacher_x), test::in(in.teacher_y), static_cast<double*>(r[0].value.data()),
      {static_cast<double*>(r[1].value.data())}, out(r[2].value), out(r[3].value), workspace.data(), c.scale,
      kTeacherScale, kTeacherWeight, c.smoothing / double(c.m), c.smoothing / double(c.n), c.n, c.m, c.D, c.teacher_D,
      kept_size, in.dtype, threads);
  return r;
}

Outputs backward(const Inputs& in, const Outputs& saved, int64_t threads, bool want_x, bool want_y,
                 int64_t kept_size = 0) {
  const Case& c = in.c;
  const Dtype S = accumulation(in.dtype);
  Outputs r;
  r.push_back({"dx", want_x ? Array(S, c.n * c.D) : Array()});
  r.push_back({"dy", want_y ? Array(S, c.m * c.D) : Array()});
  r.push_back({"dscale", Array(S, 1)});
  const Block workspace(RUN(clip_loss_bwd_workspace, c.n, c.m, c.D, c.teacher_D, want_x, want_y, in.dtype, threads));
  RUN(clip_loss_bwd, in.x, in.y, in.given(in.row_ids), in.given(in.col_ids), in.given(in.rows), in.given(in.columns),
      test::in(in.teacher_x), test::in(in.teacher_y), static_cast<const double*>(saved[0].value.data()),
      test::in(saved[3].value), out(r[0].value), out(r[1].value), r[2].value, workspace.data(), c.scale, kLossGradient,
      kTeacherScale, kTeacherWeight, c.smoothing / double(c.m), c.smoothing / double(c.n), c.n, c.m, c.D, c.teacher_D,
      kept_size, in.dtype, threads);
  return r;
}

// The same bits from as many kept similarities as there is room for: too little for a row of tiles, for some, for all
void check_kept(const Inputs& in, const Outputs& sums, const Outputs& gradients) {
  for (const int64_t size : {int64_t(1), in.c.n * in.c.m / 3 + 1, (in.c.n + 16) * (in.c.m + 64)}) {
    const Outputs saved = forward(in, 3, size);
    for (int i = 0; i < 3; i++) CHECK(saved[i].value.same_bits(sums[i].value));
    for (const double value : saved[3].value.values()) CHECK(!std::isnan(value));  // written whole
    check_same_bits(backward(in, saved, 3, true, true, size), gradients, "with kept similarities and without");
  }
}

void check_case(const Case& c, Dtype dtype) {
  const Inputs in(c, dtype);
  const Results expected = reference(in);
  const Outputs sums = run_on_threads([&](int64_t threads) { return forward(in, threads); });
  check_close("lse", sums[0].value.values(), expected.lse, tolerance(dtype));
  check_close("target_sum", sums[1].value.values(), expected.target_sum, 20 * tolerance(dtype));
  check_close("loss", sums[2].value.values(), expected.loss, 20 * tolerance(dtype));
  const Outputs g = run_on_threads([&](int64_t threads) { return backward(in, sums, threads, true, true); });
  check_close("dx", g[0].value.values(), expected.dx, 4 * tolerance(dtype));
  check_close("dy", g[1].value.values(), expected.dy, 4 * tolerance(dtype));
  check_close("dscale", g[2].value.values(), expected.dscale, 20 * tolerance(dtype));
  check_kept(in, sums, g);
  for (const auto& [want_x, want_y] : {std::pair(true, false), {false, true}, {false, false}}) {
    const Outputs some = backward(in, sums, 2, want_x, want_y);
    CHECK(!want_x || some[0].value.same_bits(g[0].value));
    CHECK(!want_y || some[1].value.same_bits(g[1].value));
    CHECK(some[2].value.same_bits(g[2].value));
  }
}

}  // namespace

TEST(clip_loss_is_its_formula) {
  for (const Case& c : kCases)
    for (const Dtype dtype : kFloats) {
      const Scope scope(std::string(c.words) + ", " + name_of(dtype));
      check_case(c, dtype);
    }
}

TEST(clip_loss_of_nan_is_nan) {
  Inputs in(kCases[2], Dtype::f32);
  static_cast<float*>(in.x.data())[5 * in.c.D + 1] = NAN;
  const Outputs sums = forward(in, 1);
  CHECK(std::isnan(sums[0].value.values()[5]));
  CHECK(!std::isnan(sums[0].value.values()[6]));
}

}  // namespace fvm::test
