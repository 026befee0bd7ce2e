// SPDX-License-Identifier: Apache-2.0
// Images to tokens in one pass: out[b, i] = W patch(b, id) + bias + pos, or the mask token + pos, prefix tokens in front.
// A block makes 128 columns of 128 tokens; their pixels go from the images straight into shared memory.
#include "patch_embed.cuh"

namespace fvm::cuda {

namespace {

// What a row of `out` begins as: 1 + the place of its first pixel in the images, or one of these
constexpr int64_t kMaskToken = 0, kBad = -1, kPrefix = -2;  // kPrefix - i: prefix token i

template <class T> struct Output {
  void* out;
  bool is_wide;    // of S, not T
  bool in_chunks;  // rows can be cut into chunks at aligned addresses
  int64_t D, pos_rows;
  const Acc<T>*bias, *pos, *prefix, *mask_token;
};

template <class T> struct Embedding {
  Patches<T> patches;
  Matrix<T> weight;
  Tokens tokens;
  Output<T> output;
  int64_t* bad_id;
};

// Of row r of `out`: what it begins as, and its row of pos, or -1
template <class T> __device__ void look_up(const Embedding<T>& e, int64_t r, int64_t& begin, int64_t& position) {
  const Tokens& tokens = e.tokens;
  const int64_t b = r / tokens.rows(), i = r % tokens.rows(), k = i - tokens.P;
  const int64_t patch = k < 0 ? k : tokens.patch(b, k);
  position = tokens.P + patch - (tokens.P + tokens.L - e.output.pos_rows);
  if (k < 0)
    begin = kPrefix - i;
  else if (!is_index(patch, tokens.L)) {
    begin = kBad, position = -1;
    report_bad(e.bad_id, b * tokens.K + k);
  } else if (tokens.masked(b, patch))
    begin = kMaskToken;
  else
    begin = 1 + b * e.patches.grid.image_size() + e.patches.grid.origin(patch);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>) embed(const __grid_constant__ Embedding<T> e) {
  using S = Acc<T>;
  __shared__ int64_t begins[kTile], positions[kTile];
  const Output<T>& output = e.output;
  const int64_t rows = e.patches.rows, D = output.D, across = ceil_div<int64_t>(D, kTile);
  const int64_t row0 = blockIdx.x / across * kTile, column0 = blockIdx.x % across * kTile;
  if (const int i = threadIdx.x; i < kTile) {
    begins[i] = 0;
    if (row0 + i < rows) look_up(e, row0 + i, begins[i], positions[i]);
  }
  __syncthreads();
  Patches<T> patches = e.patches;
  patches.begins = begins;
  Tile<T, Layout::step_inside, Layout::step_inside> tile;
  multiply<T, Layout::step_inside, Layout::step_inside>(tile, patches, e.weight, row0, column0, int(e.weight.columns),
                                                        [](int) {});
  for_each_pack(tile, [&](int row, int column, auto sum) {
    const int64_t r = row0 + row, d = column0 + column, left = D - d;
    if (r >= rows || left <= 0) return;
    const int64_t what = begins[row], position = positions[row];
    if (what <= 0) sum = {};
    auto add = [&](const S* values) { add_some(sum, values + d, output.in_chunks, left); };
    if (what <= kPrefix)
      add(output.prefix + (kPrefix - what) * D);
    else if (what == kBad)
      for (S& x : sum.at) x = not_a_number<S>();
    else if (what == kMaskToken || output.bias)
      add(what == kMaskToken ? output.mask_token : output.bias);
    if (output.pos && position >= 0) add(output.pos + position * D);
    if (output.is_wide)
      write_some(static_cast<S*>(output.out) + r * D + d, sum, output.in_chunks, left);
    else
      write_some(static_cast<T*>(output.out) + r * D + d, sum, output.in_chunks, left);
  });
}

template <class T> struct ForwardSpace {
  Acc<T>* statistics;  // scale and shift of each feature
  T* weight;           // a copy

  ForwardSpace(Workspace& space, int64_t F, int64_t D)
      : statistics(space.take<Acc<T>>(2 * F)), weight(space.take<T>(D * in_chunks<T>(F))) {}
};

}  // namespace

int64_t patch_embed_fwd_workspace(Dtype dtype, int64_t C, int64_t p, int64_t D) {
  Workspace space(nullptr);
  if (dtype == Dtype::f64)
    ForwardSpace<double>(space, C * p * p, D);
  else
    ForwardSpace<float>(space, C * p * p, D);  // half types need less
  return space.bytes();
}

cudaError_t patch_embed_fwd(const void* images, Dtype image_dtype, bool channels_last, const void* weight, Dtype dtype,
                            Maybe<const void> bias, Maybe<const void> pos, Maybe<const void> prefix,
                            Maybe<const int64_t> ids, Maybe<const double> mean, Maybe<const double> std,
                            Maybe<const bool> mask, Maybe<const void> mask_token, void* out, Dtype out_dtype,
                            void* workspace, int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D,
                            int64_t P, int64_t K, int64_t pos_rows, Launch launch) {
  const PatchGrid grid(C, H, W, p, channels_last);
  const Tokens tokens{B, P, K, grid.patches(), ids.p, mask.p};
  const int64_t rows = B * tokens.rows();
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Acc<T>;
    auto parameter = [](Maybe<const void> values) { return static_cast<const S*>(values.p); };
    Workspace arena(workspace);
    const ForwardSpace<T> space(arena, grid.features(), D);
    Matrix<T> matrix;
    FVM_TRY(prepare_statistics(space.statistics, grid, image_dtype, mean, std, launch.stream));
    FVM_TRY(prepare_weight(matrix, static_cast<const T*>(weight), space.weight, grid, D, launch.stream));
    const bool in_chunks = D % kChunk<S> == 0 && aligned(16, out, bias.p, pos.p, prefix.p, mask_token.p);
    const Embedding<T> embedding{
        patches_of<T>(grid, images, image_dtype, rows, is_normalised(image_dtype, mean) ? space.statistics : nullptr),
        matrix,
        tokens,
        {out, out_dtype != dtype, in_chunks, D, pos_rows, parameter(bias), parameter(pos), parameter(prefix),
         parameter(mask_token)},
        launch.bad_id.p};
    const Grid blocks{ceil_div<int64_t>(rows, kTile) * ceil_div<int64_t>(D, kTile)};
    return FVM_LAUNCH(embed<T>, blocks, kTileThreads, kTileShared, launch.stream, embedding);
  });
}

}  // namespace fvm::cuda
