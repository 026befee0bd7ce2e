// SPDX-License-Identifier: Apache-2.0
// patch_embed against its formula: out[b, P + k] = W patch(b, id) + bias + pos, where masked the mask token + pos.
#include "arrays.h"
#include "harness.h"

namespace fvm::test {
namespace {

enum class Images { like_weight, f32, u8 };

struct Case {
  const char* words;
  int64_t B, C, H, W, p, D, P;
  int64_t K;  // tokens by id, or 0 for all patches
  bool channels_last = false, bias = true, statistics = false, mask = false;
  enum Positions { none, patches, all } positions = all;
  Images images = Images::like_weight;
  bool wide_out = false;  // tokens in the type of the parameters

  int64_t L() const { return H / p * (W / p); }
  int64_t tokens() const { return P + (K ? K : L()); }
  int64_t pos_rows() const { return positions == none ? 0 : positions == patches ? L() : P + L(); }
  int64_t F() const { return C * p * p; }
  Dtype image_dtype(Dtype dtype) const {
    return images == Images::like_weight ? dtype : images == Images::f32 ? Dtype::f32 : Dtype::u8;
  }
  Dtype out_dtype(Dtype dtype) const { return wide_out ? accumulation(dtype) : dtype; }
};

const Case kCases[] = {
    {.words = "one value", .B = 1, .C = 1, .H = 1, .W = 1, .p = 1, .D = 1, .P = 0, .K = 0},
    {.words = "odd", .B = 2, .C = 3, .H = 9, .W = 15, .p = 3, .D = 37, .P = 1, .K = 0},
    {.words = "plain",
     .B = 1,
     .C = 2,
     .H = 4,
     .W = 6,
     .p = 2,
     .D = 5,
     .P = 0,
     .K = 0,
     .bias = false,
     .positions = Case::none},
    {.words = "channels last",
     .B = 2,
     .C = 3,
     .H = 10,
     .W = 5,
     .p = 5,
     .D = 33,
     .P = 2,
     .K = 0,
     .channels_last = true,
     .statistics = true,
     .positions = Case::patches},
    {.words = "more features than a chunk",
     .B = 1,
     .C = 3,
     .H = 20,
     .W = 30,
     .p = 10,
     .D = 70,
     .P = 1,
     .K = 0,
     .statistics = true},
    {.words = "repeated ids", .B = 3, .C = 1, .H = 8, .W = 12, .p = 4, .D = 17, .P = 1, .K = 9, .mask = true},
    {.words = "one kept", .B = 2, .C = 3, .H = 7, .W = 7, .p = 1, .D = 9, .P = 0, .K = 1, .channels_last = true},
    {.words = "float images",
     .B = 2,
     .C = 3,
     .H = 8,
     .W = 8,
     .p = 4,
     .D = 20,
     .P = 1,
     .K = 3,
     .statistics = true,
     .mask = true,
     .images = Images::f32,
     .wide_out = true},
    {.words = "bytes",
     .B = 2,
     .C = 3,
     .H = 14,
     .W = 21,
     .p = 7,
     .D = 40,
     .P = 1,
     .K = 0,
     .statistics = true,
     .mask = true,
     .images = Images::u8},
    {.words = "bytes, channels last",
     .B = 1,
     .C = 5,
     .H = 6,
     .W = 9,
     .p = 3,
     .D = 11,
     .P = 0,
     .K = 4,
     .channels_last = true,
     .images = Images::u8,
     .wide_out = true},
};

struct Inputs {
  Case c;
  Dtype dtype;
  Array images, weight, bias, pos, prefix, mask_token, dout;
  Numbers<int64_t> ids;
  Numbers<double> mean, std;
  Numbers<bool> mask;

  Inputs(const Case& c, Dtype dtype)
      : c(c),
        dtype(dtype),
        images(c.image_dtype(dtype),
               c.images == Images::u8 ? uniform(c.B * c.C * c.H * c.W, 1, 0, 256) : uniform(c.B * c.C * c.H * c.W, 1)),
        weight(dtype, uniform(c.D * c.F(), 2)),
        dout(c.out_dtype(dtype), uniform(c.B * c.tokens() * c.D, 3)),
        ids(random_ids(c.B * c.K, c.L(), 4)),
        mean(uniform(c.C, 5)),
        std(uniform(c.C, 6, 0.5, 2)),
        mask(c.B * c.L()) {
    const Dtype S = accumulation(dtype);
    if (c.bias) bias = Array(S, uniform(c.D, 7));
    if (c.positions) pos = Array(S, uniform(c.pos_rows() * c.D, 8));
    if (c.P) prefix = Array(S, uniform(c.P * c.D, 9));
    if (c.mask) mask_token = Array(S, uniform(c.D, 10));
    const std::vector<double> coins = uniform(c.B * c.L(), 11);
    for (int64_t i = 0; i < c.B * c.L(); i++) mask[i] = coins[i] < 0;
  }
  Maybe<const int64_t> maybe_ids() const { return {c.K ? ids.data() : nullptr}; }
  Maybe<const double> maybe(const Numbers<double>& s) const { return {c.statistics ? s.data() : nullptr}; }
  Maybe<const bool> maybe_mask() const { return {c.mask ? mask.data() : nullptr}; }
  int64_t K() const { return c.K ? c.K : c.L(); }

  // place in the images of feature (channel, y, x) of a patch
  int64_t pixel(int64_t b, int64_t patch, int64_t channel, int64_t y, int64_t x) const {
    const int64_t columns = c.W / c.p, row = patch / columns * c.p + y, column = patch % columns * c.p + x;
    return c.channels_last ? ((b * c.H + row) * c.W + column) * c.C + channel
                           : ((b * c.C + channel) * c.H + row) * c.W + column;
  }
};

// ---- plain loops

struct Results { std::vector<double> out, dimages, dweight, dbias, dpos, dprefix, dmask_token; };

class Reference {
 public:
  explicit Reference(const Inputs& in) : in_(in), c_(in.c) {
    r_.out.resize(c_.B * c_.tokens() * c_.D), r_.dimages.resize(images_.size()), r_.dweight.resize(c_.D * c_.F());
    r_.dbias.resize(c_.D), r_.dpos.resize(c_.pos_rows() * c_.D), r_.dprefix.resize(c_.P * c_.D);
    r_.dmask_token.resize(c_.D);
  }

  const Results& compute() {
    for (int64_t b = 0; b < c_.B; b++)
      for (int64_t t = 0; t < c_.tokens(); t++)
        for (int64_t d = 0; d < c_.D; d++) token(b, t, d);
    return r_;
  }

 private:
  void token(int64_t b, int64_t t, int64_t d) {
    const int64_t k = t - c_.P, at = (b * c_.tokens() + t) * c_.D + d;
    const int64_t patch = k < 0 ? 0 : c_.K ? in_.ids[b * c_.K + k] : k;
    const double dout = dout_[at];
    double value = 0;
    if (k < 0)
      value = prefix_[t * c_.D + d], r_.dprefix[t * c_.D + d] += dout;
    else if (c_.mask && in_.mask[b * c_.L() + patch])
      value = mask_token_[d], r_.dmask_token[d] += dout;
    else
      value = embed(b, patch, d, dout);
    const int64_t place = (k < 0 ? t : c_.P + patch) - (c_.P + c_.L() - c_.pos_rows());
    if (place >= 0) value += pos_[place * c_.D + d], r_.dpos[place * c_.D + d] += dout;
    r_.out[at] = value;
  }

  double embed(int64_t b, int64_t patch, int64_t d, double dout) {
    double value = c_.bias ? bias_[d] : 0;
    r_.dbias[d] += dout;
    for (int64_t channel = 0; channel < c_.C; channel++) {
      const double unit = c_.images == Images::u8 ? 255 : 1, std = c_.statistics ? in_.std[channel] : 1;
      const double mean = c_.statistics ? in_.mean[channel] : 0;
      for (int64_t y = 0; y < c_.p; y++)
        for (int64_t x = 0; x < c_.p; x++) {
          const int64_t pixel = in_.pixel(b, patch, channel, y, x), w = ((d * c_.C + channel) * c_.p + y) * c_.p + x;
          const int64_t dw = c_.channels_last ? ((d * c_.p + y) * c_.p + x) * c_.C + channel : w;
          const double seen = (images_[pixel] / unit - mean) / std;
          value += weight_[w] * seen;
          r_.dweight[dw] += dout * seen;
          r_.dimages[pixel] += dout * weight_[w] / std;
        }
    }
    return value;
  }

  const Inputs& in_;
  const Case& c_;
  const std::vector<double> images_ = in_.images.values(), weight_ = in_.weight.values(), bias_ = in_.bias.values(),
                            pos_ = in_.pos.values(), prefix_ = in_.prefix.values(),
                            mask_token_ = in_.mask_token.values(), dout_ = in_.dout.values();
  Results r_;
};

// ---- the kernels

enum Gradient { kImages, kWeight, kBias, kPos, kPrefix, kMaskToken, kGradients };

int64_t forward(const Inputs& in, const Array& to, int64_t threads) {
  const Case& c = in.c;
  const Block workspace(RUN(patch_embed_fwd_workspace, in.dtype, c.C, c.p, c.D, threads));
  return RUN(patch_embed_fwd, in.images, c.image_dtype(in.dtype), c.channels_last, in.weight, in.dtype,
             test::in(in.bias), test::in(in.pos), test::in(in.prefix), in.maybe_ids(), in.maybe(in.mean),
             in.maybe(in.std), in.maybe_mask(), test::in(in.mask_token), to, c.out_dtype(in.dtype), workspace.data(),
             c.B, c.C, c.H, c.W, c.p, c.D, c.P, in.K(), c.pos_rows(), threads);
}

Outputs backward(const Inputs& in, int64_t threads, int only = kGradients) {
  const Case& c = in.c;
  const Dtype S = accumulation(in.dtype);
  const bool exists[] = {c.images != Images::u8, true, c.bias, c.positions != Case::none, c.P > 0, c.mask};
  const int64_t sizes[] = {c.B * c.C * c.H * c.W, c.D * c.F(), c.D, c.pos_rows() * c.D, c.P * c.D, c.D};
  constexpr const char* kNames[] = {"dimages", "dweight", "dbias", "dpos", "dprefix", "dmask_token"};
  Outputs g;
  for (int i = 0; i < kGradients; i++) {
    const bool wanted = exists[i] && (only == kGradients || only == i);
    g.push_back({kNames[i], wanted ? Array(i == kImages ? c.image_dtype(in.dtype) : S, sizes[i]) : Array()});
  }
  const Block workspace(RUN(patch_embed_bwd_workspace, in.dtype, c.B, c.C, c.H, c.W, c.p, c.D, c.P, in.K(), threads));
  RUN(patch_embed_bwd, in.dout, c.out_dtype(in.dtype), in.images, c.image_dtype(in.dtype), c.channels_last, in.weight,
      in.dtype, in.maybe_ids(), in.maybe(in.mean), in.maybe(in.std), in.maybe_mask(), out(g[kImages].value),
      out(g[kWeight].value), out(g[kBias].value), out(g[kPos].value), out(g[kPrefix].value), out(g[kMaskToken].value),
      workspace.data(), c.B, c.C, c.H, c.W, c.p, c.D, c.P, in.K(), c.pos_rows(), threads);
  return g;
}

void check_case(const Case& c, Dtype dtype) {
  const Inputs inputs(c, dtype);
  const Results expected = Reference(inputs).compute();
  const Outputs tokens = run_on_threads([&](int64_t threads) {
    Outputs outputs;
    outputs.push_back({"out", Array(c.out_dtype(dtype), c.B * c.tokens() * c.D)});
    CHECK(forward(inputs, outputs[0].value, threads) == kOk);
    return outputs;
  });
  check_close("out", tokens[0].value.values(), expected.out, tolerance(dtype));
  const Outputs got = run_on_threads([&](int64_t threads) { return backward(inputs, threads); });
  const std::vector<double>* exact[] = {&expected.dimages, &expected.dweight, &expected.dbias,
                                        &expected.dpos,    &expected.dprefix, &expected.dmask_token};
  for (int i = 0; i < kGradients; i++) {
    if (!got[i].value.data()) continue;
    check_close(got[i].name, got[i].value.values(), *exact[i], tolerance(dtype));
    CHECK(backward(inputs, 2, i)[i].value.same_bits(got[i].value));  // each gradient alone
  }
}

}  // namespace

TEST(patch_embed_is_its_formula) {
  for (const Case& c : kCases)
    for (const Dtype dtype : kFloats) {
      if (c.images == Images::f32 && dtype == Dtype::f64) continue;  // images beside a wider weight do not exist
      const Scope scope(std::string(c.words) + ", " + name_of(dtype));
      check_case(c, dtype);
    }
}

TEST(patch_embed_names_the_first_bad_id) {
  Inputs inputs(kCases[5], Dtype::f32);
  const Array tokens(Dtype::f32, inputs.c.B * inputs.c.tokens() * inputs.c.D);
  for (const int64_t bad : {int64_t(-1), inputs.c.L(), INT64_MIN}) {
    inputs.ids[11] = bad;
    CHECK(forward(inputs, tokens, 1) == 11);
  }
}

}  // namespace fvm::test
