#include "common/parallel.h"

#if defined(FASTCLUST_STANDALONE)
#include <thread>
#include <vector>
#else
#include <torch/csrc/stable/ops.h>
#endif

namespace fastclust {

#if defined(FASTCLUST_STANDALONE)

namespace {
int threads_in_force = 2;
}

int num_threads() { return threads_in_force; }
void set_num_threads(int n) { threads_in_force = n; }

void detail::run_workers(int n_workers, WorkerFn fn, void* context) {
  std::vector<std::thread> threads;
  for (int w = 1; w < n_workers; ++w) threads.emplace_back(fn, context, w);
  fn(context, 0);
  for (auto& thread : threads) thread.join();
}

#else

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void detail::run_workers(int n_workers, WorkerFn fn, void* context) {
  // Inside another parallel region torch runs the whole range on one thread: still correct,
  // the first worker then takes every task.
  torch::stable::parallel_for(0, n_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) fn(context, static_cast<int>(w));
  });
}

#endif

}  // namespace fastclust
