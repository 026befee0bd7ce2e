// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels: those of csrc/kernels.h, where shapes and meaning stand, with a Launch in the place of `threads`.
//
// The pointers are device pointers, those of results such as `dscale` and of a Scalar too; other numbers are the host's.
// What is called here only enqueues: it allocates nothing and waits for nothing, so it can be captured into a graph. The
// result is a cudaError_t (cudaSuccess is 0). A bad index is never followed: the row it stands for is NaN, and in a
// gradient it adds nothing.
#pragma once
#include <cuda_runtime_api.h>

#include <type_traits>

#include "../csrc/kernels.h"

namespace fvm::cuda {

struct Launch {
  int device;  // the current one of the calling thread, to which every pointer belongs
  cudaStream_t stream;
  Maybe<int64_t> bad_id;  // [1] on the device, kOk before: receives the flat position of the first bad index, if any
};

// ---- from the type of a CPU kernel to that of its CUDA twin

// What comes from a tensor stays in it: the kernels read it on the device. There is a seed only if there is dropout.
template <class A> struct TwinArgument { using type = A; };
template <> struct TwinArgument<Scalar> { using type = const double*; };
template <> struct TwinArgument<Seed> { using type = Maybe<const int64_t>; };

template <class A> struct IsPointer : std::is_pointer<A> {};
template <class T> struct IsPointer<Maybe<T>> : std::true_type {};

// A kernel's last argument becomes the Launch; a function without pointers, which tells a size, loses it.
template <class Front, class... Rest> struct TwinOf;
template <class... A> struct TwinOf<void(A...), int64_t> {
  static constexpr bool kIsSize = !(IsPointer<A>::value || ...);
  using type = std::conditional_t<kIsSize, int64_t(A...), cudaError_t(A..., Launch)>;
};
template <class... A, class Next, class... Rest>
struct TwinOf<void(A...), Next, Rest...> : TwinOf<void(A..., typename TwinArgument<Next>::type), Rest...> {};

template <class Kernel> struct OnDevice;
template <class R, class... A> struct OnDevice<R (*)(A...)> : TwinOf<void(), A...> {};

// The kernels that have a twin. A family joins with its .cu file, here and in FVM_CUDA_OPS of CMakeLists.txt.
#define FVM_CUDA_KERNELS(X)         \
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

// C names cannot be overloaded: a definition of another type than this one does not compile.
extern "C" {
#define FVM_DECLARE(name) OnDevice<decltype(Kernels::name)>::type name;
FVM_CUDA_KERNELS(FVM_DECLARE)
#undef FVM_DECLARE
}

}  // namespace fvm::cuda
