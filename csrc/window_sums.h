// SPDX-License-Identifier: Apache-2.0
// Gradients that all windows share. A group of windows adds to sums of its own, which are added up in the order of the
// groups: nothing depends on the number of threads.
#pragma once
#include "window_attention.h"

namespace fvm::FVM_ISA {

// What one window and head adds to
template <class S> struct UnitSums {
  S *dbias, *dpad;
  double* dlogit_scale;
};

template <class T> struct PartialSums {
  using S = Acc<T>;
  WindowGrid grid;
  int64_t size;  // of a head's bias
  WindowTasks tasks;
  S* dbias;              // [groups, heads, size], or null when not wanted
  S* dpad;               // [groups, 3C]
  double* dlogit_scale;  // [groups, heads]

  PartialSums(Workspace& space, const WindowGrid& grid, bool want_bias)
      : grid(grid),
        size(bias_size(grid)),
        tasks(grid, most_groups(grid, grid.heads * size * int64_t(sizeof(S))), 2 * size * int64_t(sizeof(S))) {
    dbias = want_bias ? space.take<S>(tasks.window_groups * grid.heads * size) : nullptr;
    dpad = space.take<S>(tasks.window_groups * 3 * grid.C());
    dlogit_scale = space.take<double>(tasks.window_groups * grid.heads);
  }

  // Enough to keep the threads busy, but not so many that clearing and adding up their bias gradients costs more than
  // they serve. The same whichever gradients are wanted: so are the bits of the others.
  static int64_t most_groups(const WindowGrid& grid, int64_t bytes) {
    constexpr int64_t kGroups = 128, kWindows = 8, kTasks = 16, kBytes = int64_t(16) << 20;
    const int64_t few = ceil_div(kTasks, grid.heads), wanted = min(kGroups, grid.windows() / kWindows);
    return min(wanted < few ? few : wanted, kBytes / bytes);
  }

  UnitSums<S> of(int64_t group, int64_t head) const {
    const int64_t unit = group * grid.heads + head;
    return {dbias ? dbias + unit * size : nullptr, dpad + group * 3 * grid.C(), dlogit_scale + unit};
  }

  // Zeroes what a task adds to
  void clear(const WindowInputs<T>& in, int64_t task) const {
    const int64_t group = tasks.window_group(task), h0 = tasks.first_head(task);
    for (int64_t h = h0; h < min(h0 + tasks.heads, grid.heads); h++) {
      const UnitSums<S> sums = of(group, h);
      if (dbias) memset(static_cast<void*>(sums.dbias), 0, size * sizeof(S));
      for (Part part = kQ; part <= kV; part = Part(part + 1))
        memset(static_cast<void*>(sums.dpad + in.channel(part, h)), 0, grid.d * sizeof(S));
      *sums.dlogit_scale = 0;
    }
  }

  // total[h, i, j] = the sum over the groups
  void add_bias(S* total, int64_t threads) const {
    constexpr int L = kLanes<S>;
    const int64_t N = grid.N(), blocks = ceil_div(N, kQueries);
    parallel_for(grid.heads * blocks, threads, [&](int64_t task, int64_t) {
      const int64_t h = task / blocks, first = task % blocks * kQueries;
      S rows[L * kQueries];  // of a vector of keys
      for (int64_t j = 0; j < N; j += L) {
        const int64_t keys = min(L, N - j);
        memset(static_cast<void*>(rows), 0, sizeof(rows));
        for (int64_t g = 0; g < tasks.window_groups; g++)
          accumulate(rows, of(g, h).dbias + first * N + j * kQueries, keys * kQueries);
        for (int64_t i = 0; i < min(kQueries, N - first); i += L)
          transpose_tile(total + (h * N + first + i) * N + j, N, rows + i, kQueries, keys, N - first - i, keys);
      }
    });
  }
};

// total[0:n] = the sum over the groups
template <class S, class A> static inline void add_groups(const A* partial, int64_t groups, int64_t n, S* total) {
  for (int64_t i = 0; i < n; i++) {
    A sum = 0;
    for (int64_t g = 0; g < groups; g++) sum += partial[g * n + i];
    total[i] = S(sum);
  }
}

}  // namespace fvm::FVM_ISA
