// SPDX-License-Identifier: Apache-2.0
// window_attention against its formula: every window on its own, with its N x N matrix of probabilities.
#include <array>
#include <cmath>

#include "arrays.h"
#include "harness.h"

namespace fvm::test {
namespace {

struct Case {
  const char* words;
  int64_t B, H, W, heads, d, wh, ww, sh = 0, sw = 0;
  bool bias = true, cosine = false, pad = false, pad_then_roll = false, heads_outermost = false;
  double mask_value = -100, dropout = 0, scale = 0.3;

  int64_t C() const { return heads * d; }
  int64_t N() const { return wh * ww; }
  int64_t rows() const { return (H + wh - 1) / wh; }
  int64_t columns() const { return (W + ww - 1) / ww; }
};

const Case kCases[] = {
    {.words = "one token", .B = 1, .H = 1, .W = 1, .heads = 1, .d = 1, .wh = 1, .ww = 1},
    {.words = "plain", .B = 2, .H = 6, .W = 4, .heads = 2, .d = 5, .wh = 3, .ww = 2, .bias = false},
    {.words = "shifted", .B = 1, .H = 14, .W = 21, .heads = 2, .d = 16, .wh = 7, .ww = 7, .sh = 3, .sw = 3},
    {.words = "pads, rolled first",
     .B = 1,
     .H = 13,
     .W = 17,
     .heads = 1,
     .d = 20,
     .wh = 7,
     .ww = 7,
     .sh = 3,
     .sw = 3,
     .pad = true},
    {.words = "pads, padded first",
     .B = 1,
     .H = 13,
     .W = 17,
     .heads = 1,
     .d = 20,
     .wh = 7,
     .ww = 7,
     .sh = 3,
     .sw = 3,
     .pad = true,
     .pad_then_roll = true},
    {.words = "pads of zeros, one axis", .B = 2, .H = 5, .W = 8, .heads = 3, .d = 3, .wh = 2, .ww = 7, .sw = 2},
    {.words = "smaller than a window",
     .B = 1,
     .H = 3,
     .W = 5,
     .heads = 2,
     .d = 7,
     .wh = 7,
     .ww = 8,
     .sh = 1,
     .sw = 4,
     .pad = true,
     .pad_then_roll = true},
    {.words = "64 tokens, heads outermost",
     .B = 1,
     .H = 8,
     .W = 16,
     .heads = 2,
     .d = 32,
     .wh = 8,
     .ww = 8,
     .sh = 4,
     .sw = 4,
     .heads_outermost = true},
    {.words = "more than 64 tokens", .B = 1, .H = 11, .W = 11, .heads = 1, .d = 48, .wh = 11, .ww = 11, .sh = 5},
    {.words = "144 tokens, wide heads", .B = 1, .H = 12, .W = 12, .heads = 1, .d = 70, .wh = 12, .ww = 12, .pad = true},
    {.words = "cosine", .B = 2, .H = 8, .W = 4, .heads = 2, .d = 9, .wh = 4, .ww = 4, .sh = 2, .sw = 1, .cosine = true},
    {.words = "cosine with pads",
     .B = 1,
     .H = 7,
     .W = 7,
     .heads = 2,
     .d = 6,
     .wh = 4,
     .ww = 4,
     .cosine = true,
     .pad = true},
    {.words = "a mask of -infinity",
     .B = 1,
     .H = 8,
     .W = 8,
     .heads = 1,
     .d = 8,
     .wh = 4,
     .ww = 4,
     .sh = 1,
     .sw = 3,
     .mask_value = -INFINITY},
    {.words = "dropout",
     .B = 2,
     .H = 7,
     .W = 14,
     .heads = 2,
     .d = 8,
     .wh = 7,
     .ww = 7,
     .sh = 3,
     .sw = 3,
     .dropout = 0.3},
    {.words = "everything dropped", .B = 1, .H = 4, .W = 4, .heads = 1, .d = 4, .wh = 2, .ww = 2, .dropout = 1},
    {.words = "large logits", .B = 1, .H = 7, .W = 7, .heads = 2, .d = 16, .wh = 7, .ww = 7, .scale = 50},
};
constexpr int64_t kSeed = 0x123456789abcdef;

struct Inputs {
  Case c;
  Dtype dtype;
  Array qkv, bias, logit_scale, pad, dout;

  Inputs(const Case& c, Dtype dtype)
      : c(c),
        dtype(dtype),
        qkv(dtype, uniform(c.B * c.H * c.W * 3 * c.C(), 1)),
        dout(dtype, uniform(c.B * c.H * c.W * c.C(), 2)) {
    const Dtype S = accumulation(dtype);
    if (c.bias) bias = Array(S, uniform(c.heads * c.N() * c.N(), 3));
    if (c.cosine) logit_scale = Array(S, uniform(c.heads, 4, 2, 10));
    if (c.pad) pad = Array(S, uniform(3 * c.C(), 5));
  }
};

// ---- plain loops

struct Results { std::vector<double> out, dqkv, dbias, dlogit_scale, dpad; };

uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352d, x ^= x >> 15, x *= 0x846ca68b;
  return x ^ x >> 16;
}

class Reference {
 public:
  explicit Reference(const Inputs& in) : in_(in), c_(in.c), qkv_(in.qkv.values()), pad_(in.pad.values()) {
    r_.out.resize(c_.B * c_.H * c_.W * c_.C()), r_.dqkv.resize(qkv_.size());
    r_.dbias.resize(c_.heads * c_.N() * c_.N()), r_.dlogit_scale.resize(c_.heads), r_.dpad.resize(3 * c_.C());
  }

  const Results& compute() {
    for (int64_t window = 0; window < c_.B * c_.rows() * c_.columns(); window++) {
      const int64_t b = window / (c_.rows() * c_.columns()), at = window % (c_.rows() * c_.columns());
      find_tokens(b, at / c_.columns(), at % c_.columns());
      for (int64_t head = 0; head < c_.heads; head++) attend(window, head);
    }
    return r_;
  }

 private:
  // Where a place of the shifted map comes from, or -1; and whether the shift brought it from the opposite edge
  static int64_t source(int64_t at, int64_t size, int64_t padded, int64_t shift, bool pad_then_roll) {
    if (pad_then_roll) return (at + shift) % padded < size ? (at + shift) % padded : -1;
    return at < size ? (at + shift) % size : -1;
  }
  static int part(int64_t at, int64_t padded, int64_t window, int64_t shift) {
    return shift == 0 || at < padded - window ? 0 : at < padded - shift ? 1 : 2;
  }

  void find_tokens(int64_t b, int64_t wy, int64_t wx) {
    tokens_.clear(), parts_.clear();
    const int64_t Hp = c_.rows() * c_.wh, Wp = c_.columns() * c_.ww;
    for (int64_t y = wy * c_.wh; y < (wy + 1) * c_.wh; y++)
      for (int64_t x = wx * c_.ww; x < (wx + 1) * c_.ww; x++) {
        const int64_t row = source(y, c_.H, Hp, c_.sh, c_.pad_then_roll);
        const int64_t column = source(x, c_.W, Wp, c_.sw, c_.pad_then_roll);
        tokens_.push_back(row < 0 || column < 0 ? -1 : (b * c_.H + row) * c_.W + column);
        parts_.push_back(3 * part(y, Hp, c_.wh, c_.sh) + part(x, Wp, c_.ww, c_.sw));
      }
  }

  int64_t channel(int64_t which, int64_t head, int64_t e) const {
    return c_.heads_outermost ? (head * 3 + which) * c_.d + e : (which * c_.heads + head) * c_.d + e;
  }
  double value(int64_t n, int64_t which, int64_t head, int64_t e) const {
    const int64_t at = channel(which, head, e);
    return tokens_[n] >= 0 ? qkv_[tokens_[n] * 3 * c_.C() + at] : c_.pad ? pad_[at] : 0;
  }
  void add_gradient(int64_t n, int64_t which, int64_t head, int64_t e, double g) {
    const int64_t at = channel(which, head, e);
    (tokens_[n] >= 0 ? r_.dqkv[tokens_[n] * 3 * c_.C() + at] : r_.dpad[at]) += g;
  }
  double norm(int64_t n, int64_t which, int64_t head) const {
    double sum = 0;
    for (int64_t e = 0; e < c_.d; e++) sum += value(n, which, head, e) * value(n, which, head, e);
    return std::fmax(std::sqrt(sum), 1e-12);
  }

  // What dropout makes of a probability: times this
  double kept(int64_t window, int64_t head, int64_t query, int64_t key) const {
    if (c_.dropout == 0) return 1;
    const uint32_t unit = uint32_t(window * c_.heads + head);
    const uint32_t row = mix(mix(mix(mix(uint32_t(kSeed)) + uint32_t(kSeed >> 32)) + unit) + uint32_t(query));
    const double threshold = std::fmin(4294967295.0, std::floor(c_.dropout * 4294967296.0));
    const bool keep = double(mix(row + uint32_t(key) * 0x9e3779b9u)) >= threshold && c_.dropout < 1;
    return keep ? 1 / (1 - c_.dropout) : 0;
  }

  double logit(int64_t head, int64_t i, int64_t j, double similarity) const {
    double s = similarity * (c_.cosine ? logit_scale_[head] : c_.scale);
    if (c_.bias) s += bias_[(head * c_.N() + i) * c_.N() + j];
    return parts_[i] == parts_[j] ? s : s + c_.mask_value;
  }

  void attend(int64_t window, int64_t head) {
    const int64_t N = c_.N();
    std::vector<double> similarities(N * N), p(N * N), ds(N * N);
    for (int64_t i = 0; i < N; i++) {
      double top = -INFINITY, sum = 0;
      for (int64_t j = 0; j < N; j++) {
        double dot = 0;
        for (int64_t e = 0; e < c_.d; e++) dot += value(i, 0, head, e) * value(j, 1, head, e);
        if (c_.cosine) dot /= norm(i, 0, head) * norm(j, 1, head);
        similarities[i * N + j] = dot, p[i * N + j] = logit(head, i, j, dot);
        top = std::fmax(top, p[i * N + j]);
      }
      for (int64_t j = 0; j < N; j++) sum += p[i * N + j] = std::exp(p[i * N + j] - top);
      for (int64_t j = 0; j < N; j++) p[i * N + j] /= sum;
      row_of_output(window, head, i, &p[i * N], &ds[i * N]);
    }
    gradients(head, similarities, ds);
  }

  // out = P V of query i, dV, and dS = P (dP - sum P dP)
  void row_of_output(int64_t window, int64_t head, int64_t i, const double* p, double* ds) {
    const int64_t N = c_.N(), to = tokens_[i] * c_.C() + head * c_.d;
    double mean = 0;
    for (int64_t j = 0; j < N; j++) {
      const double keep = kept(window, head, i, j);
      for (int64_t e = 0; e < c_.d && tokens_[i] >= 0; e++) {
        r_.out[to + e] += p[j] * keep * value(j, 2, head, e);
        ds[j] += keep * dout_[to + e] * value(j, 2, head, e);
        add_gradient(j, 2, head, e, p[j] * keep * dout_[to + e]);
      }
      mean += p[j] * ds[j];
    }
    for (int64_t j = 0; j < N; j++) ds[j] = p[j] * (ds[j] - mean);
  }

  void gradients(int64_t head, const std::vector<double>& similarities, const std::vector<double>& ds) {
    const int64_t N = c_.N();
    for (int64_t i = 0; i < N; i++)
      for (int64_t j = 0; j < N; j++) {
        const double g = ds[i * N + j], cosine = similarities[i * N + j];
        r_.dbias[(head * N + i) * N + j] += g;
        if (c_.cosine) r_.dlogit_scale[head] += g * cosine;
        const double q_norm = c_.cosine ? norm(i, 0, head) : 1, k_norm = c_.cosine ? norm(j, 1, head) : 1;
        const double factor = c_.cosine ? g * logit_scale_[head] : g * c_.scale;
        for (int64_t e = 0; e < c_.d; e++) {  // d cos / dq = (k / |k| - cos q / |q|) / |q|
          const double q = value(i, 0, head, e) / q_norm, k = value(j, 1, head, e) / k_norm;
          add_gradient(i, 0, head, e, factor * (k - (c_.cosine ? cosine * q : 0)) / q_norm);
          add_gradient(j, 1, head, e, factor * (q - (c_.cosine ? cosine * k : 0)) / k_norm);
        }
      }
  }

  const Inputs& in_;
  const Case& c_;
  const std::vector<double> qkv_, pad_, bias_ = in_.bias.values(), logit_scale_ = in_.logit_scale.values(),
                                        dout_ = in_.dout.values();
  std::vector<int64_t> tokens_;
  std::vector<int> parts_;
  Results r_;
};

// ---- the kernels

enum Gradient { kQkv, kBias, kLogitScale, kPad, kGradients };

Outputs forward(const Inputs& in, int64_t threads) {
  const Case& c = in.c;
  Outputs r;
  r.push_back({"out", Array(in.dtype, c.B * c.H * c.W * c.C())});
  const Block workspace(
      RUN(window_attention_fwd_workspace, c.B, c.H, c.W, c.heads, c.d, c.wh, c.ww, in.dtype, threads));
  RUN(window_attention_fwd, in.qkv, test::in(in.bias), test::in(in.logit_scale), test::in(in.pad), r[0].value,
      workspace.data(), c.scale, c.mask_value, c.dropout, kSeed, c.pad_then_roll, c.heads_outermost, c.B, c.H, c.W,
      c.heads, c.d, c.wh, c.ww, c.sh, c.sw, in.dtype, threads);
  return r;
}

Outputs backward(const Inputs& in, int64_t threads, int only = kGradients) {
  const Case& c = in.c;
  const Dtype S = accumulation(in.dtype);
  const bool exists[] = {true, c.bias, c.cosine, c.pad};
  const int64_t sizes[] = {c.B * c.H * c.W * 3 * c.C(), c.heads * c.N() * c.N(), c.heads, 3 * c.C()};
  constexpr const char* kNames[] = {"dqkv", "dbias", "dlogit_scale", "dpad_qkv"};
  Outputs g;
  for (int i = 0; i < kGradients; i++) {
    const bool wanted = exists[i] && (only == kGradients || only == i);
    g.push_back({kNames[i], wanted ? Array(i == kQkv ? in.dtype : S, sizes[i]) : Array()});
  }
  const Block workspace(RUN(window_attention_bwd_workspace, c.B, c.H, c.W, c.heads, c.d, c.wh, c.ww,
                            g[kBias].value.data() != nullptr, in.dtype, threads));
  RUN(window_attention_bwd, in.dout, in.qkv, test::in(in.bias), test::in(in.logit_scale), test::in(in.pad),
      out(g[kQkv].value), out(g[kBias].value), out(g[kLogitScale].value), out(g[kPad].value), workspace.data(), c.scale,
      c.mask_value, c.dropout, kSeed, c.pad_then_roll, c.heads_outermost, c.B, c.H, c.W, c.heads, c.d, c.wh, c.ww, c.sh,
      c.sw, in.dtype, threads);
  return g;
}

void check_case(const Case& c, Dtype dtype) {
  const Inputs in(c, dtype);
  const Results expected = Reference(in).compute();
  const Outputs tokens = run_on_threads([&](int64_t threads) { return forward(in, threads); });
  check_close("out", tokens[0].value.values(), expected.out, tolerance(dtype));
  const Outputs got = run_on_threads([&](int64_t threads) { return backward(in, threads); });
  const std::vector<double>* exact[] = {&expected.dqkv, &expected.dbias, &expected.dlogit_scale, &expected.dpad};
  for (int i = 0; i < kGradients; i++) {
    if (!got[i].value.data()) continue;
    check_close(got[i].name, got[i].value.values(), *exact[i], 4 * tolerance(dtype));
    CHECK(backward(in, 2, i)[i].value.same_bits(got[i].value));  // each gradient alone
  }
}

}  // namespace

TEST(window_attention_is_its_formula) {
  for (const Case& c : kCases)
    for (const Dtype dtype : kFloats) {
      const Scope scope(std::string(c.words) + ", " + name_of(dtype));
      check_case(c, dtype);
    }
}

}  // namespace fvm::test
