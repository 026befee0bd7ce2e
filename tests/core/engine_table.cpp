// SPDX-License-Identifier: Apache-2.0
// Compiled once for each instruction set.
#include "engine_table.h"

#include "dtype_dispatch.h"
#include "gemm.h"
#include "row_panels.h"
#include "workspace.h"

#define FVM_JOIN_(a, b) a##b
#define FVM_JOIN(a, b) FVM_JOIN_(a, b)
#define FVM_STRING_(a) #a
#define FVM_STRING(a) FVM_STRING_(a)

namespace fvm {
namespace FVM_ISA {
namespace {

using test::Layout;
using test::Operands;
using test::Path;

template <class F> void for_each_vector(Dtype dtype, const void* x, void* y, int64_t n, F&& f) {
  auto loop = [&]<class A>(A) {
    for (int64_t i = 0; i < n; i += kLanes<A>) store(static_cast<A*>(y) + i, f(load(static_cast<const A*>(x) + i)));
  };
  dtype == Dtype::f64 ? loop(double()) : loop(float());
}

void exp_of(Dtype dtype, const void* x, void* y, int64_t n) {
  for_each_vector(dtype, x, y, n, [](auto v) { return vexp(v); });
}
void log1p_of(Dtype dtype, const void* x, void* y, int64_t n) {
  for_each_vector(dtype, x, y, n, [](auto v) { return vlog1p(v); });
}

void transpose_of(Dtype dtype, void* rows) {
  auto square = [&]<class A>(A* memory) {
    Vec<A> v[kLanes<A>];
    for (int i = 0; i < kLanes<A>; i++) v[i] = load(memory + i * kLanes<A>);
    transpose<A>(v);
    for (int i = 0; i < kLanes<A>; i++) store(memory + i * kLanes<A>, v[i]);
  };
  dtype == Dtype::f64 ? square(static_cast<double*>(rows)) : square(static_cast<float*>(rows));
}

void widen_row(Dtype dtype, const void* x, void* y, int64_t n) {
  with_dtype(dtype, [&]<class T>() { convert_row(static_cast<Acc<T>*>(y), static_cast<const T*>(x), n); });
}
void narrow_row(Dtype dtype, const void* x, void* y, int64_t n) {
  with_dtype(dtype, [&]<class T>() { convert_row(static_cast<T*>(y), static_cast<const Acc<T>*>(x), n); });
}
void add_row(Dtype dtype, const void* x, void* sum, int64_t n) {
  with_dtype(dtype, [&]<class T>() { accumulate(static_cast<Acc<T>*>(sum), static_cast<const T*>(x), n); });
}

// ---- products

template <class T> struct Packed {
  using P = Operand<T>;
  P *a, *b;
  Acc<T>* row;  // a row of A, with zeros and room behind it
  Packed(Workspace& space, int64_t m, int64_t n, int64_t K, Path path)
      : a(space.take<P>(path == Path::row_panels ? row_panels_size<P>(m, K) : packed_size<P>(m, K, Tile<P>::MR))),
        b(space.take<P>(packed_size<P>(n, K, Tile<P>::NR))),
        row(space.take<Acc<T>>(K + 4 * kLanes<Acc<T>>)) {}
};

template <int WIDTH, class P, class T> void pack(P* dst, const void* src, Layout layout, int64_t n, int64_t K) {
  if (layout == Layout::rows)
    pack_rows<WIDTH>(dst, static_cast<const T*>(src), K, n, K);
  else
    pack_columns<WIDTH>(dst, static_cast<const T*>(src), n, n, K);
}

template <class T> void pack_row_panels(const Packed<T>& packed, const Operands& in) {
  for (int64_t i = 0; i < in.m; i++) {
    convert_row(packed.row, static_cast<const T*>(in.a) + i * in.K, in.K);
    store(packed.row + in.K, Vec<Acc<T>>{});
    pack_row(packed.a, i, packed.row, in.K);
  }
}

template <class T> void multiply(Path path, const Operands& in, void* workspace, Acc<T>* out) {
  using P = Operand<T>;
  constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, KU = Tile<P>::KU;
  Workspace space(workspace);
  const Packed<T> packed(space, in.m, in.n, in.K, path);
  auto write = [&](int64_t i0, int64_t j0, int64_t rows, int64_t columns, const Acc<T>* acc) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) out[(i0 + i) * in.n + j0 + j] = acc[i * NR + j];
  };
  pack<NR, P, T>(packed.b, in.b, in.b_layout, in.n, in.K);
  if (path == Path::row_panels) {
    pack_row_panels<T>(packed, in);
    return gemm_rows<P>(in.m, in.n, in.K, packed.a, packed.b, write);
  }
  pack<MR, P, T>(packed.a, in.a, in.a_layout, in.m, in.K);
  if (path == Path::packed) return gemm<P>(in.m, in.n, in.K, packed.a, packed.b, write);
  const int64_t Kp = padded_k<P>(in.K);
  for (int add = 0; add < 2; add++)
    for (int64_t i = 0; i < in.m; i += MR)
      for (int64_t j = 0; j < in.n; j += NR)
        tile_partial<P, KU, MR * KU>(in.K, packed.a + i * Kp, packed.b + j * Kp, out + i * in.n + j, in.n, add != 0,
                                     min(MR, in.m - i), min(NR, in.n - j));
}

int64_t product_workspace(Dtype dtype, int64_t m, int64_t n, int64_t K, Path path) {
  return with_dtype(dtype, [&]<class T>() {
    Workspace space(nullptr);
    Packed<T>(space, m, n, K, path);
    return space.bytes();
  });
}

void product(Dtype dtype, Path path, const Operands& in, void* workspace, void* out) {
  with_dtype(dtype, [&]<class T>() { multiply<T>(path, in, workspace, static_cast<Acc<T>*>(out)); });
}

}  // namespace
}  // namespace FVM_ISA

namespace test {
extern const Engine FVM_JOIN(engine_, FVM_ISA) = {
    .isa = FVM_STRING(FVM_ISA),
    .lanes = FVM_ISA::kLanes<float>,
    .exp = FVM_ISA::exp_of,
    .log1p = FVM_ISA::log1p_of,
    .transpose = FVM_ISA::transpose_of,
    .widen = FVM_ISA::widen_row,
    .narrow = FVM_ISA::narrow_row,
    .accumulate = FVM_ISA::add_row,
    .product_workspace = FVM_ISA::product_workspace,
    .product = FVM_ISA::product,
};
}  // namespace test
}  // namespace fvm
