// SPDX-License-Identifier: Apache-2.0
// The compiled core on one page: every kernel of every op, with the shape beside each pointer.
//
// Conventions. Tensors are contiguous, row-major. `Dtype` is the storage type of every `void` pointer of a call, unless
// a comment says otherwise; half types accumulate in float. A pointer is never null unless it is a `Maybe`. Gradients
// that are not wanted are null. Outputs come after inputs and are written whole. A kernel that reads indices returns the
// flat position of the first bad one, or kOk. `threads` bounds the team; results do not depend on it.
#pragma once
#include <cstdint>

namespace fvm {

enum class Dtype : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3, u8 = 4 };

template <class T> struct Maybe {  // a pointer that may be null
  T* p;
  __attribute__((always_inline)) explicit operator bool() const { return p != nullptr; }
};

constexpr int64_t kOk = -1;

// A number that comes from a tensor. Here it is the number, and on CUDA the address of the tensor (cuda/kernels.h), for
// to read it on the host would mean to wait for the device.
template <class T> struct FromTensor {
  T value;
  __attribute__((always_inline)) constexpr FromTensor(T value) : value(value) {}
  __attribute__((always_inline)) constexpr operator T() const { return value; }
};
using Scalar = FromTensor<double>;
using Seed = FromTensor<int64_t>;  // 0 or more; of dropout, and without it unused

// clang-format off: the shapes stand in a column
struct Kernels {
  const char* isa;

  // ---- contrastive_loss: pairs (x_i, y_j) with logits S_ij = scale x_i . y_j (+ bias); positive where ids are equal.
  // Gradients and sums have the accumulation type; a workspace is as many bytes as its function says.
  int64_t (*clip_loss_fwd_workspace)(int64_t n, int64_t m, int64_t D, int64_t teacher_D, Dtype dtype, int64_t threads);
  void (*clip_loss_fwd)(const void* x,                    // [n, D]
                        const void* y,                    // [m, D]
                        Maybe<const int32_t> row_ids,     // [n], 0 or more; null: their numbers
                        Maybe<const int32_t> col_ids,     // [m]
                        Maybe<const double> row_targets,  // [3, n]: weight of a row, of each of its positives, teacher's
                        Maybe<const double> col_targets,  // [3, m]  lse; null: one positive each, and no teacher
                        Maybe<const void> teacher_x,      // [n, teacher_D], teacher_D = 0 without it
                        Maybe<const void> teacher_y,      // [m, teacher_D]
                        double* lse,                      // [n + m]: of rows, then of columns
                        Maybe<double> target_sum,         // [1]: sum of targets times logits
                        Maybe<void> loss,                 // [1], where the pairs are all there are
                        Maybe<void> kept,                 // [kept_size]: similarities of first rows, for the backward
                        void* workspace, Scalar scale, Scalar teacher_scale, double teacher_weight,
                        double row_smoothing, double col_smoothing, int64_t n, int64_t m, int64_t D, int64_t teacher_D,
                        int64_t kept_size, Dtype dtype, int64_t threads);
  int64_t (*clip_loss_bwd_workspace)(int64_t n, int64_t m, int64_t D, int64_t teacher_D, bool want_x, bool want_y,
                                     Dtype dtype, int64_t threads);
  void (*clip_loss_bwd)(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids,
                        Maybe<const double> row_targets, Maybe<const double> col_targets, Maybe<const void> teacher_x,
                        Maybe<const void> teacher_y,
                        const double* lse,                // [n + m]
                        Maybe<const void> kept,           // [kept_size], as the forward left it
                        Maybe<void> dx,                   // [n, D]
                        Maybe<void> dy,                   // [m, D]
                        void* dscale,                     // [1]
                        void* workspace, Scalar scale, Scalar dloss, Scalar teacher_scale, double teacher_weight,
                        double row_smoothing, double col_smoothing, int64_t n, int64_t m, int64_t D, int64_t teacher_D,
                        int64_t kept_size, Dtype dtype, int64_t threads);
  int64_t (*info_nce_loss_fwd_workspace)(int64_t n, int64_t K, int64_t D, bool want_pull, Dtype dtype, int64_t threads);
  void (*info_nce_loss_fwd)(const void* query,           // [n, D]
                            Maybe<const void> positive,  // [n, D]: each query's own key, beside the keys of all
                            Maybe<const void> keys,      // [K, D], null when empty
                            double* stats,               // [3, n]: lse - own logit, 1 - own probability, lse
                            void* loss,                  // []: mean of the first
                            Maybe<void> pull,            // [n, D]: gradient of the first by the query, over the scale
                            void* workspace, Scalar scale, int64_t n, int64_t K, int64_t D, Dtype dtype,
                            int64_t threads);
  int64_t (*info_nce_loss_bwd_workspace)(int64_t n, int64_t K, int64_t D, Dtype dtype, int64_t threads);
  void (*info_nce_loss_bwd)(const void* query, const void* keys,
                            Maybe<const int32_t> row_ids,  // [n], 0 or more: positive where equal, if there are shares
                            Maybe<const int32_t> key_ids,  // [K], 0 or more
                            const double* lse,             // [n]
                            Maybe<const double> share,     // [n]: of a row in each of its positives
                            void* dkeys,                   // [K, D]
                            void* workspace, Scalar scale, Scalar dloss, int64_t n, int64_t K, int64_t D, Dtype dtype,
                            int64_t threads);
  int64_t (*nt_xent_loss_fwd_workspace)(int64_t R, int64_t D, Dtype dtype, int64_t threads);
  void (*nt_xent_loss_fwd)(const void* z,              // [R, D]: rows i and i + R/2 are positives of one another
                           double* lse,                // [R]: of a row's logits but its own
                           double* positive_sum,       // [1]: of the logits of the R/2 positive pairs
                           void* loss,                 // []: of these rows alone
                           void* workspace, Scalar scale, int64_t R, int64_t D, Dtype dtype, int64_t threads);
  int64_t (*nt_xent_loss_bwd_workspace)(int64_t R, int64_t D, Dtype dtype, int64_t threads);
  void (*nt_xent_loss_bwd)(const void* z,
                           const double* lse,          // [R]
                           Maybe<void> dz,             // [R, D]
                           void* dscale,               // []
                           void* workspace, Scalar scale,
                           double weight,              // of a row in the loss
                           Scalar dloss, int64_t R, int64_t D, Dtype dtype, int64_t threads);
  int64_t (*siglip_loss_workspace)(int64_t n, int64_t m, int64_t D, bool want_x, bool want_y, Dtype dtype,
                                   int64_t threads);
  void (*siglip_loss)(const void* x,                      // [n, D]
                      const void* y,                      // [m, D]
                      Maybe<const int32_t> row_ids,       // [n], 0 or more; null: their numbers
                      Maybe<const int32_t> col_ids,       // [m]
                      Scalar scale, Scalar bias,
                      double weight,                      // of a pair in the loss
                      void* loss,                         // [1]
                      void* slopes,                       // [2]: its derivatives by the scale and by the bias
                      Maybe<void> dx,                     // [n, D]
                      Maybe<void> dy,                     // [m, D]
                      void* workspace, int64_t n, int64_t m, int64_t D, Dtype dtype, int64_t threads);

  // ---- patch_embed: L = H/p * W/p patches and P + K tokens an image (K = L without ids), F = C * p * p values a patch
  int64_t (*patch_embed_fwd_workspace)(Dtype dtype, int64_t C, int64_t p, int64_t D, int64_t threads);  // in bytes
  int64_t (*patch_embed_fwd)(const void* images,             // [B, C, H, W], or [B, H, W, C] when channels_last
                             Dtype image_dtype,              // u8, f32 or that of the weight
                             bool channels_last,
                             const void* weight,             // [D, C, p, p]
                             Dtype dtype,                    // of the weight; S below is f64 for f64 and f32 for all else
                             Maybe<const void> bias,         // [D] of S
                             Maybe<const void> pos,          // [pos_rows, D] of S, pos_rows = P + L or L
                             Maybe<const void> prefix,       // [P, D] of S
                             Maybe<const int64_t> ids,       // [B, K] in [0, L)
                             Maybe<const double> mean,       // [C]
                             Maybe<const double> std,        // [C]
                             Maybe<const bool> mask,         // [B, L]: true takes the mask token
                             Maybe<const void> mask_token,   // [D] of S
                             void* out,                      // [B, P + K, D]
                             Dtype out_dtype,                // of the weight, or S
                             void* workspace, int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D, int64_t P,
                             int64_t K, int64_t pos_rows, int64_t threads);
  int64_t (*patch_embed_bwd_workspace)(Dtype dtype, int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D,
                                       int64_t P, int64_t K, int64_t threads);  // in bytes
  void (*patch_embed_bwd)(const void* dout,                  // [B, P + K, D]
                          Dtype out_dtype,
                          const void* images, Dtype image_dtype, bool channels_last, const void* weight, Dtype dtype,
                          Maybe<const int64_t> ids, Maybe<const double> mean, Maybe<const double> std,
                          Maybe<const bool> mask,
                          Maybe<void> dimages,               // as images; zero where no token looked
                          Maybe<void> dweight,               // [D, F] of S, features in the order of the images
                          Maybe<void> dbias,                 // [D] of S
                          Maybe<void> dpos,                  // [pos_rows, D] of S
                          Maybe<void> dprefix,               // [P, D] of S
                          Maybe<void> dmask_token,           // [D] of S
                          void* workspace, int64_t B, int64_t C, int64_t H, int64_t W, int64_t p, int64_t D, int64_t P,
                          int64_t K, int64_t pos_rows, int64_t threads);

  // ---- token_gather: rows moved by index
  int64_t (*gather_tokens_fwd)(const void* x,      // [B, L, D]
                               const int64_t* ids, // [B, K] in [0, L)
                               void* out,          // [B, K, D]
                               int64_t B, int64_t L, int64_t K, int64_t D, Dtype dtype, int64_t threads);
  void (*gather_tokens_bwd)(const void* dout,      // [B, K, D]
                            const int64_t* ids,    // [B, K], checked by the forward
                            void* dx,              // [B, L, D]: rows nobody took are zero, rows taken twice are summed
                            int64_t* workspace,    // [B, L + 1 + K]
                            int64_t B, int64_t L, int64_t K, int64_t D, Dtype dtype, int64_t threads);
  int64_t (*restore_tokens_fwd)(Maybe<const void> x,       // [B, P + K, D], null when empty
                                Maybe<const int64_t> ids,  // [B, L] in [0, L): a row of x when < K, else the mask token
                                const void* mask_token,    // [D]
                                Maybe<const void> pos,     // [pos_rows, D], pos_rows = P + L or L
                                void* out,                 // [B, P + L, D]
                                int64_t B, int64_t P, int64_t K, int64_t L, int64_t D, int64_t pos_rows, Dtype dtype,
                                int64_t threads);
  void (*restore_tokens_bwd)(const void* dout,             // [B, P + L, D]
                             Maybe<const int64_t> ids,     // [B, L]
                             Maybe<void> dx,               // [B, P + K, D]
                             Maybe<void> dmask_token,      // [D]
                             Maybe<void> dpos,             // [pos_rows, D]
                             int64_t* workspace,           // [B, K + 1 + L]
                             void* partial_sums,           // [P + L, D] of the accumulation type
                             int64_t B, int64_t P, int64_t K, int64_t L, int64_t D, int64_t pos_rows, Dtype dtype,
                             int64_t threads);

  // ---- window_attention: B maps of H x W tokens, cut into ceil(H/wh) x ceil(W/ww) windows of N = wh * ww tokens;
  // C = heads * d. S is f64 for f64 and f32 for all else. Workspaces in bytes
  int64_t (*window_attention_fwd_workspace)(int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t wh,
                                            int64_t ww, Dtype dtype, int64_t threads);
  void (*window_attention_fwd)(const void* qkv,                // [B, H, W, 3C]
                               Maybe<const void> bias,         // [heads, N, N] of S
                               Maybe<const void> logit_scale,  // [heads] of S: given, q and k are compared by cosine
                               Maybe<const void> pad_qkv,      // [3C] of S: tokens outside of the map, zero without it
                               void* out,                      // [B, H, W, C]
                               void* workspace, double scale, double mask_value, double dropout_p, Seed seed,
                               bool pad_then_roll, bool heads_outermost, int64_t B, int64_t H, int64_t W, int64_t heads,
                               int64_t d, int64_t wh, int64_t ww, int64_t sh, int64_t sw, Dtype dtype, int64_t threads);
  int64_t (*window_attention_bwd_workspace)(int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t wh,
                                            int64_t ww, bool want_bias, Dtype dtype, int64_t threads);
  void (*window_attention_bwd)(const void* dout,               // [B, H, W, C]
                               const void* qkv, Maybe<const void> bias, Maybe<const void> logit_scale,
                               Maybe<const void> pad_qkv,
                               Maybe<void> dqkv,               // [B, H, W, 3C]
                               Maybe<void> dbias,              // [heads, N, N] of S
                               Maybe<void> dlogit_scale,       // [heads] of S
                               Maybe<void> dpad_qkv,           // [3C] of S
                               void* workspace, double scale, double mask_value, double dropout_p, Seed seed,
                               bool pad_then_roll, bool heads_outermost, int64_t B, int64_t H, int64_t W, int64_t heads,
                               int64_t d, int64_t wh, int64_t ww, int64_t sh, int64_t sw, Dtype dtype, int64_t threads);
};
// clang-format on

// Every kernel once: declares them, fills the table of each instruction set and makes the Python bindings.
#define FVM_KERNELS(X)              \
  X(clip_loss_fwd_workspace)        \
  X(clip_loss_fwd)                  \
  X(clip_loss_bwd_workspace)        \
  X(clip_loss_bwd)                  \
  X(info_nce_loss_fwd_workspace)    \
  X(info_nce_loss_fwd)              \
  X(info_nce_loss_bwd_workspace)    \
  X(info_nce_loss_bwd)              \
  X(nt_xent_loss_fwd_workspace)     \
  X(nt_xent_loss_fwd)               \
  X(nt_xent_loss_bwd_workspace)     \
  X(nt_xent_loss_bwd)               \
  X(siglip_loss_workspace)          \
  X(siglip_loss)                    \
  X(patch_embed_fwd_workspace)      \
  X(patch_embed_fwd)                \
  X(patch_embed_bwd_workspace)      \
  X(patch_embed_bwd)                \
  X(gather_tokens_fwd)              \
  X(gather_tokens_bwd)              \
  X(restore_tokens_fwd)             \
  X(restore_tokens_bwd)             \
  X(window_attention_fwd_workspace) \
  X(window_attention_fwd)           \
  X(window_attention_bwd_workspace) \
  X(window_attention_bwd)

}  // namespace fvm
