// SPDX-License-Identifier: Apache-2.0
// The entry points of GCC's OpenMP library that the kernels use, with plain threads and atomics that ThreadSanitizer
// understands. Tasks are dealt from the last to the first, so that results that lean on the usual order change.
#include <atomic>
#include <thread>
#include <vector>

namespace {

std::atomic<long> dealt;  // tasks of the one parallel region that runs; regions are not nested
struct Loop { long first, step, tasks; };
thread_local Loop loop;
thread_local int number = 0;

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  const long i = dealt.fetch_add(1);
  if (i >= loop.tasks) return false;
  *begin = loop.first + (loop.tasks - 1 - i) * loop.step;
  *end = *begin + loop.step;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long, long* begin, long* end) {
  loop = {first, step, (last - first + step - 1) / step};
  return GOMP_loop_nonmonotonic_dynamic_next(begin, end);
}

void GOMP_loop_end_nowait() {}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  dealt = 0;
  std::vector<std::thread> team;
  for (unsigned t = 1; t < threads; t++) team.emplace_back([=] { number = int(t), body(data); });
  body(data);
  for (std::thread& thread : team) thread.join();
}

}  // extern "C"
