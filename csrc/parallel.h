// SPDX-License-Identifier: Apache-2.0
// Loops over independent tasks. A task's result never depends on which thread ran it, so results do not depend on the
// number of threads; what tasks share is reduced by the caller in a fixed order.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fvm::FVM_ISA {

// Calls f(task, thread) for every task in [0, tasks), thread in [0, threads).
// One thread means no parallel region at all: a child of fork() has no OpenMP workers and would wait for them for ever.
template <class F> static inline void parallel_for(int64_t tasks, int64_t threads, F&& f) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
    int64_t team = threads < tasks ? threads : tasks;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(team))
    for (int64_t task = 0; task < tasks; task++) f(task, int64_t(omp_get_thread_num()));
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; task++) f(task, int64_t(0));
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fvm::FVM_ISA
