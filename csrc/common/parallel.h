// Work is cut into tasks whose size never depends on the number of threads, and every task
// writes to places of its own; which thread runs which task is left open. So results have the
// same bits for any thread count, and uneven tasks (triangular tiles, hub rows) still balance.
//
// The threads are torch's pool (no second OpenMP runtime). With FASTCLUST_STANDALONE the same
// interface runs on std::thread, for sanitizer builds and fuzzers that know no torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace fastclust {

// Threads that parallel work may use now (torch.get_num_threads()).
int num_threads();
#if defined(FASTCLUST_STANDALONE)
void set_num_threads(int n);  // not while parallel work is running
#endif

namespace detail {
using WorkerFn = void (*)(void* context, int worker);
void run_workers(int n_workers, WorkerFn fn, void* context);
}  // namespace detail

// Calls f(task, worker) once for each task in [0, n_tasks), in no particular order; worker is in
// [0, num_threads()) and is never shared by two running calls: index scratch memory with it.
// The first exception thrown by f is rethrown here after all workers have stopped.
template <typename F>
void parallel_tasks(int64_t n_tasks, const F& f) {
  if (n_tasks <= 0) return;
  struct Shared {
    const F* f;
    int64_t n_tasks;
    std::atomic<int64_t> next{0};
    std::mutex mutex{};
    std::exception_ptr error{};
  } shared{&f, n_tasks};
  const int64_t threads = num_threads();
  const int n_workers = static_cast<int>(n_tasks < threads ? n_tasks : threads);
  const auto body = [](void* context, int worker) {
    auto& s = *static_cast<Shared*>(context);
    try {
      for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.n_tasks;) {
        (*s.f)(i, worker);
      }
    } catch (...) {
      s.next.store(s.n_tasks, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(s.mutex);
      if (!s.error) s.error = std::current_exception();
    }
  };
  if (n_workers == 1) {
    body(&shared, 0);
  } else {
    detail::run_workers(n_workers, body, &shared);
  }
  if (shared.error) std::rethrow_exception(shared.error);
}

// Cuts [0, n) into ranges of `grain` elements and calls f(begin, end) for each.
template <typename F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  parallel_tasks((n + grain - 1) / grain, [&](int64_t task, int) {
    const int64_t begin = task * grain;
    f(begin, begin + grain < n ? begin + grain : n);
  });
}

}  // namespace fastclust
