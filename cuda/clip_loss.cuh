// SPDX-License-Identifier: Apache-2.0
// clip_loss: what both passes know of the rows, the columns and their targets. Formulas: csrc/clip_loss.h.
#pragma once
#include "contrastive_products.cuh"

namespace fvm::cuda {

// What is known of each row, or column: arrays padded to whole tiles with what adds nothing.
template <class A> struct Side {
  int64_t n, padded;
  A *weight, *ref, *rest, *teacher_ref, *teacher_rest;
  const int32_t* ids;     // null: their numbers
  const double* targets;  // [3, n] or null: one positive each, `single` of its term
  double single;

  Side(Workspace& arena, int64_t n) : n(n), padded(round_up(n, kTile)) {
    for (A** array : {&weight, &ref, &rest, &teacher_ref, &teacher_rest}) *array = arena.take<A>(padded);
  }
  __device__ __forceinline__ int32_t id(int64_t i) const { return ids ? ids[i] : int32_t(i); }
  __device__ __forceinline__ double positive(int64_t i) const { return targets ? targets[n + i] : single; }
};

namespace {

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    fill_side(Side<A> side, const double* __restrict__ lse, const double* scale, const double* teacher_scale) {
  const int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= side.padded) return;
  const bool inside = i < side.n;
  const double single = 0.5 / double(side.n);
  side.weight[i] = inside ? A(side.targets ? side.targets[i] : single) : 0;
  const Lse<A> own(inside && lse ? lse[i] : 0, Scale<A>(scale));
  const Lse<A> teacher(inside && side.targets ? side.targets[2 * side.n + i] : 0, Scale<A>(teacher_scale));
  side.ref[i] = own.ref, side.rest[i] = own.rest;
  side.teacher_ref[i] = teacher.ref, side.teacher_rest[i] = teacher.rest;
}

template <class A>
cudaError_t fill(const Side<A>& side, const double* lse, const double* scale, const double* teacher_scale,
                 cudaStream_t stream) {
  return FVM_LAUNCH(fill_side<A>, ceil_div<int64_t>(side.padded, kTileThreads), kTileThreads, 0, stream, side, lse,
                    scale, teacher_scale);
}

}  // namespace

template <class A> struct ClipTargets {
  static constexpr int N = kChunk<A>;
  Side<A> row, column;
  A* dense;  // [chunk, pitch]: with a teacher, what every pair of the chunk's rows has as target; else null
  int64_t dense_first, pitch;
  const double *scale, *teacher_scale;  // [1] each, on the device
  A teacher_weight, row_smoothing, col_smoothing;

  ClipTargets(Workspace& arena, int64_t n, int64_t m, const double* scale, const double* teacher_scale)
      : row(arena, n),
        column(arena, m),
        dense(nullptr),
        dense_first(0),
        pitch(pitch_of(m)),
        scale(scale),
        teacher_scale(teacher_scale) {}

  // At least that of G in any dtype
  static int64_t pitch_of(int64_t m) { return round_up(m, kChunk<fp16>); }
  static int64_t dense_bytes_of_tile(int64_t m, int64_t teacher_D) {
    return teacher_D ? kTile * pitch_of(m) * int64_t(sizeof(A)) : 0;
  }

  // ---- on the device

  struct Columns {
    int32_t id[N];
    Pack<A, N> weight;
  };
  __device__ __forceinline__ bool skips(int64_t, int64_t) const { return false; }
  __device__ __forceinline__ bool counts(int64_t i, int64_t j) const { return i < row.n && j < column.n; }
  __device__ __forceinline__ Columns columns(int64_t j) const {
    Columns of;
#pragma unroll
    for (int k = 0; k < N; k++) of.id[k] = j + k < column.n ? column.id(j + k) : -1;
    of.weight = load<N>(column.weight + j);
    return of;
  }
  __device__ __forceinline__ bool has_dense() const { return dense || row_smoothing != 0 || col_smoothing != 0; }

  // What pairs (i, j) to (i, j + N) have as every pair has
  __device__ __forceinline__ Pack<A, N> targets(const Columns& of, int64_t i, int64_t j) const {
    if (dense) return load<N>(dense + (i - dense_first) * pitch + j);
    const A of_row = row.weight[i] * row_smoothing;
    Pack<A, N> q;
#pragma unroll
    for (int k = 0; k < N; k++) q.at[k] = of_row + of.weight.at[k] * col_smoothing;
    return q;
  }
  // And what a positive one has beside that
  __device__ __forceinline__ double positive(int64_t i, int64_t j) const {
    return row.positive(i) + column.positive(j);
  }

  __device__ __forceinline__ void add_targets(const Columns& of, int64_t i, int64_t j, const A (&u)[N], double& target,
                                              A& sum) const {
    if (i >= row.n || j >= pitch) return;
    const int32_t id = row.id(i);
#pragma unroll
    for (int k = 0; k < N; k++)
      if (id == of.id[k]) target += positive(i, j + k) * double(u[k]);
    if (!has_dense()) return;
    const Pack<A, N> q = targets(of, i, j);
#pragma unroll
    for (int k = 0; k < N; k++) sum += q.at[k] * u[k];  // of no pair u is zero
  }
};

namespace {

// The teacher's similarities become targets, in place: of no pair zero.
template <class A>
__global__ void __launch_bounds__(kTileThreads) make_targets(ClipTargets<A> t, int64_t rows) {
  const int64_t e = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  if (e >= rows * t.pitch) return;
  const int64_t i = t.dense_first + e / t.pitch, j = e % t.pitch;
  const Scale<A> of_teacher(t.teacher_scale);
  const A scale = of_teacher.size, u = t.dense[e] * of_teacher.sign;
  const A by_row = probability(u, scale, t.row.teacher_ref[i], t.row.teacher_rest[i]);
  const A by_column = probability(u, scale, t.column.teacher_ref[j], t.column.teacher_rest[j]);
  t.dense[e] = t.row.weight[i] * (t.row_smoothing + t.teacher_weight * by_row) +
               t.column.weight[j] * (t.col_smoothing + t.teacher_weight * by_column);
}

}  // namespace

// Arguments that both passes take
template <class T> struct ClipInputs {
  Features<T> x, y;
  const T *teacher_x, *teacher_y;
  int64_t teacher_D;
  const double *scale, *teacher_scale;  // [1] each, on the device
  double teacher_weight, row_smoothing, col_smoothing;
  const int32_t *row_ids, *col_ids;
  const double *row_targets, *col_targets;

  Pairs<T> pairs() const { return {x, y}; }
};

// From the arguments that both launchers have, under their names
template <class T>
ClipInputs<T> clip_inputs(const void* x, const void* y, Maybe<const int32_t> row_ids, Maybe<const int32_t> col_ids,
                          Maybe<const double> row_targets, Maybe<const double> col_targets, Maybe<const void> teacher_x,
                          Maybe<const void> teacher_y, const double* scale, const double* teacher_scale,
                          double teacher_weight, double row_smoothing, double col_smoothing, int64_t n, int64_t m,
                          int64_t D, int64_t teacher_D) {
  return {{static_cast<const T*>(x), n, D},
          {static_cast<const T*>(y), m, D},
          static_cast<const T*>(teacher_x.p),
          static_cast<const T*>(teacher_y.p),
          teacher_D,
          scale,
          teacher_scale,
          teacher_weight,
          row_smoothing,
          col_smoothing,
          row_ids.p,
          col_ids.p,
          row_targets.p,
          col_targets.p};
}

template <class T> void set_options(ClipTargets<Acc<T>>& targets, const ClipInputs<T>& in) {
  targets.teacher_weight = Acc<T>(in.teacher_weight);
  targets.row_smoothing = Acc<T>(in.row_smoothing), targets.col_smoothing = Acc<T>(in.col_smoothing);
  targets.row.ids = in.row_ids, targets.column.ids = in.col_ids;
  targets.row.targets = in.row_targets, targets.column.targets = in.col_targets;
  const double hard = 1 - in.row_smoothing * double(in.y.rows);
  targets.row.single = 0.5 / double(in.x.rows) * hard, targets.column.single = 0.5 / double(in.y.rows) * hard;
}

// What the teacher has to say about the rows of a chunk.
template <class T>
cudaError_t ask_teacher(ClipTargets<Acc<T>>& targets, const ClipInputs<T>& in, const Chunk& chunk,
                        cudaStream_t stream) {
  if (!in.teacher_D) return cudaSuccess;
  targets.dense_first = chunk.first;
  FVM_TRY(similarities(Features<T>(in.teacher_x + chunk.first * in.teacher_D, chunk.rows, in.teacher_D),
                       Features<T>(in.teacher_y, in.y.rows, in.teacher_D), targets.dense, targets.pitch, stream));
  return FVM_LAUNCH(make_targets<Acc<T>>, ceil_div<int64_t>(chunk.rows * targets.pitch, kTileThreads), kTileThreads, 0,
                    stream, targets, chunk.rows);
}

}  // namespace fvm::cuda
