// SPDX-License-Identifier: Apache-2.0
// gather_tokens and restore_tokens against their formulas: out[b, k] = x[b, ids[b, k]], and its transpose.
#include "arrays.h"
#include "harness.h"

namespace fvm::test {
namespace {

struct Sizes {
  int64_t B, L, K, D, P;
  std::string words(Dtype dtype) const {
    return std::string(name_of(dtype)) + " B " + std::to_string(B) + " L " + std::to_string(L) + " K " +
           std::to_string(K) + " D " + std::to_string(D) + " P " + std::to_string(P);
  }
};

// One element, odd rows, more ids than rows, rows wider than a slice of sums, nothing kept, everything kept
constexpr Sizes kSizes[] = {{1, 1, 1, 1, 0}, {2, 5, 3, 7, 1},    {3, 17, 33, 65, 2}, {2, 40, 11, 300, 0},
                            {2, 6, 0, 5, 1}, {1, 37, 37, 16, 0}, {0, 3, 2, 4, 1}};

// ---- gather_tokens

void check_gather(const Sizes& s, Dtype dtype) {
  const auto [B, L, K, D, P] = s;
  const Array x(dtype, uniform(B * L * D, 1)), dout(dtype, uniform(B * K * D, 2));
  const Numbers<int64_t> ids(random_ids(B * K, L, 3));
  const std::vector<double> xs = x.values(), douts = dout.values();
  std::vector<double> expected(B * K * D), expected_dx(B * L * D);
  for (int64_t b = 0; b < B; b++)
    for (int64_t k = 0; k < K; k++)
      for (int64_t d = 0; d < D; d++) {
        const int64_t from = (b * L + ids[b * K + k]) * D + d, to = (b * K + k) * D + d;
        expected[to] = xs[from];
        expected_dx[from] += douts[to];
      }
  const Outputs got = run_on_threads([&](int64_t threads) {
    Outputs outputs;
    outputs.push_back({"out", Array(dtype, B * K * D)});
    outputs.push_back({"dx", Array(dtype, B * L * D)});
    const Numbers<int64_t> workspace(B * (L + 1 + K));
    CHECK(RUN(gather_tokens_fwd, x, ids, outputs[0].value, B, L, K, D, dtype, threads) == kOk);
    RUN(gather_tokens_bwd, dout, ids, outputs[1].value, workspace, B, L, K, D, dtype, threads);
    return outputs;
  });
  check_close("out", got[0].value.values(), expected, 0);
  check_close("dx", got[1].value.values(), expected_dx, tolerance(dtype));
}

// ---- restore_tokens

struct Restored { std::vector<double> out, dx, dmask_token, dpos; };

// x [B, P + K, D], pos [pos_rows, D] or empty
Restored restore(const Sizes& s, int64_t pos_rows, const int64_t* ids, const std::vector<double>& x,
                 const std::vector<double>& mask_token, const std::vector<double>& pos,
                 const std::vector<double>& dout) {
  const auto [B, L, K, D, P] = s;
  Restored r;
  r.out.resize(B * (P + L) * D), r.dx.resize(B * (P + K) * D), r.dmask_token.resize(D), r.dpos.resize(pos_rows * D);
  for (int64_t b = 0; b < B; b++)
    for (int64_t l = 0; l < P + L; l++)
      for (int64_t d = 0; d < D; d++) {
        const int64_t kept = l < P ? l : P + ids[b * L + l - P], to = (b * (P + L) + l) * D + d;
        const int64_t place = l - (P + L - pos_rows);
        r.out[to] = kept < P + K ? x[(b * (P + K) + kept) * D + d] : mask_token[d];
        (kept < P + K ? r.dx[(b * (P + K) + kept) * D + d] : r.dmask_token[d]) += dout[to];
        if (place >= 0) r.dpos[place * D + d] += dout[to];
        if (place >= 0 && !pos.empty()) r.out[to] += pos[place * D + d];
      }
  return r;
}

void check_restore(const Sizes& s, Dtype dtype, int64_t pos_rows) {
  const auto [B, L, K, D, P] = s;
  const Array x(dtype, uniform(B * (P + K) * D, 1)), mask_token(dtype, uniform(D, 2));
  const Array pos = pos_rows ? Array(dtype, uniform(pos_rows * D, 3)) : Array();
  const Array dout(dtype, uniform(B * (P + L) * D, 4));
  const Numbers<int64_t> ids(random_ids(B * L, L, 5));
  const Restored expected = restore(s, pos_rows, ids, x.values(), mask_token.values(), pos.values(), dout.values());
  auto run = [&](int64_t threads, bool want_x, bool want_mask_token, bool want_pos) {
    Outputs outputs;
    outputs.push_back({"out", Array(dtype, B * (P + L) * D)});
    outputs.push_back({"dx", want_x ? Array(dtype, B * (P + K) * D) : Array()});
    outputs.push_back({"dmask_token", want_mask_token ? Array(dtype, D) : Array()});
    outputs.push_back({"dpos", want_pos ? Array(dtype, pos_rows * D) : Array()});
    const Numbers<int64_t> workspace(B * (K + 1 + L));
    const Array sums(accumulation(dtype), (P + L) * D);
    CHECK(RUN(restore_tokens_fwd, in(x), {ids}, mask_token, in(pos), outputs[0].value, B, P, K, L, D, pos_rows, dtype,
              threads) == kOk);
    RUN(restore_tokens_bwd, dout, {ids}, out(outputs[1].value), out(outputs[2].value), out(outputs[3].value), workspace,
        sums, B, P, K, L, D, pos_rows, dtype, threads);
    return outputs;
  };
  const bool has_pos = pos_rows > 0;
  const Outputs got = run_on_threads([&](int64_t threads) { return run(threads, true, true, has_pos); });
  check_close("out", got[0].value.values(), expected.out, tolerance(dtype));
  check_close("dx", got[1].value.values(), expected.dx, tolerance(dtype));
  check_close("dmask_token", got[2].value.values(), expected.dmask_token, tolerance(dtype));
  if (has_pos) check_close("dpos", got[3].value.values(), expected.dpos, tolerance(dtype));
  for (int only = 1; only <= 2 + has_pos; only++)  // each gradient alone
    CHECK(run(2, only == 1, only == 2, only == 3)[only].value.same_bits(got[only].value));
}

}  // namespace

TEST(gather_tokens_moves_rows_and_sums_their_gradients) {
  for (const Sizes& s : kSizes)
    for (const Dtype dtype : kFloats) {
      const Scope scope(s.words(dtype));
      check_gather(s, dtype);
    }
}

TEST(restore_tokens_puts_rows_back) {
  for (Sizes s : kSizes)
    for (const Dtype dtype : kFloats) {
      s.K = s.K < s.L ? s.K : s.L;
      for (const int64_t pos_rows : {int64_t(0), s.L, s.P + s.L}) {
        const Scope scope(s.words(dtype) + " pos_rows " + std::to_string(pos_rows));
        check_restore(s, dtype, pos_rows);
      }
    }
}

TEST(the_first_bad_id_is_named) {
  const Array x(Dtype::f32, uniform(2 * 3 * 5, 1)), out(Dtype::f32, 2 * 3 * 5);
  for (const int64_t bad : {int64_t(-1), int64_t(3), INT64_MIN, INT64_MAX}) {
    const Numbers<int64_t> ids(std::vector<int64_t>{0, 2, 1, 2, bad, bad});
    CHECK(RUN(gather_tokens_fwd, x, ids, out, 2, 3, 3, 5, Dtype::f32, 1) == 4);
    CHECK(RUN(restore_tokens_fwd, in(x), {ids}, x, {nullptr}, out, 2, 0, 3, 3, 5, 0, Dtype::f32, 1) == 4);
  }
}

}  // namespace fvm::test
