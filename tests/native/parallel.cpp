// The task loop itself: every task once, workers never shared, exceptions passed on, nesting.
#include "native/harness.h"

#include <stdexcept>

namespace {

using namespace native;

void run() {
  for (const int threads : {1, 2, 4}) {
    fastclust::set_num_threads(threads);
    for (const int64_t n : {0, 1, 2, 3, 1000}) {
      std::vector<int> count(n, 0);        // plain ints: a task run twice is a race
      std::vector<int64_t> busy(threads);  // plain: a worker shared by two calls is a race
      fastclust::parallel_tasks(n, [&](int64_t task, int worker) {
        ++count[task];
        ++busy[worker];
      });
      int64_t total = 0;
      for (const int64_t tasks : busy) total += tasks;
      expect(std::all_of(count.begin(), count.end(), [](int c) { return c == 1; }), "tasks",
             "%d tasks did not run once each", static_cast<int>(n));
      expect(total == n, "workers", "%d tasks counted, not %d", static_cast<int>(total),
             static_cast<int>(n));
    }
    std::vector<int> cover(1001, 0);
    fastclust::parallel_for(1001, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++cover[i];
    });
    expect(std::all_of(cover.begin(), cover.end(), [](int c) { return c == 1; }), "ranges",
           "an element was left out or taken twice");
    std::vector<int> inner(64, 0);
    fastclust::parallel_tasks(8, [&](int64_t i, int) {
      fastclust::parallel_tasks(8, [&](int64_t j, int) { ++inner[8 * i + j]; });
    });
    expect(std::all_of(inner.begin(), inner.end(), [](int c) { return c == 1; }), "nested",
           "an inner task was left out or ran twice");
    bool caught = false;
    try {
      fastclust::parallel_tasks(100, [](int64_t task, int) {
        if (task % 7 == 3) throw std::runtime_error("task");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    expect(caught, "exception", "an exception of a task was lost");
  }
}

const Register parallel("parallel", run);

}  // namespace
