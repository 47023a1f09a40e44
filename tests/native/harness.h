// What the stand-alone tests of the CPU kernels share. They know no torch, so that AddressSanitizer,
// UndefinedBehaviorSanitizer and ThreadSanitizer see the kernels alone; tests/test_native.py builds
// and runs them.
//
// A test computes once at every dispatch level and with 1, 2 and 4 threads. The thread counts must
// agree to the bit; every level is compared with a plain loop in double.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/cpu.h"
#include "common/parallel.h"

namespace native {

using Values = std::vector<double>;

// With --guard-pages every array ends where an unreadable page begins: the sanitizers do not see
// masked vector loads, the processor does.
inline bool guard_pages = false;

// Memory of exactly n elements, all bytes 0xff (NaN) until they are set. Copies share it.
template <typename T>
class Array {
 public:
  explicit Array(int64_t n) : n_(n) {
    const size_t bytes = n * sizeof(T);
    void* p = nullptr;
    if (guard_pages) {
      const size_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
      char* base = static_cast<char*>(mmap(nullptr, size + page, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      mprotect(base + size, page, PROT_NONE);
      memory_.reset(base, [size, page](void* q) { munmap(q, size + page); });
      p = base + size - bytes;
    } else {
      // k-means asks for 64-byte alignment
      if (posix_memalign(&p, 64, bytes == 0 ? 1 : bytes) != 0) std::abort();
      memory_.reset(p, std::free);
    }
    data_ = static_cast<T*>(p);
    std::memset(p, 0xff, bytes);
  }
  template <typename U>
  explicit Array(const std::vector<U>& values) : Array(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data_);
  }

  T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t n_;
  T* data_;
  std::shared_ptr<void> memory_;
};

// Standard normal numbers; the same ones in every run.
template <typename T>
Array<T> normal(int64_t n, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> draw;
  Array<T> out(n);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(draw(engine));
  return out;
}

template <typename T>
void append(Values& to, const Array<T>& from) {
  to.insert(to.end(), from.data(), from.data() + from.size());
}

inline int n_failed = 0, n_passed = 0;

template <typename... Args>
void expect(bool holds, const std::string& name, const char* format, Args... args) {
  ++(holds ? n_passed : n_failed);
  if (holds || n_failed > 20) return;
  std::printf("FAILED %s at %s with %d threads: ", name.c_str(),
              fastclust::cpu_level_name(fastclust::cpu_level()), fastclust::num_threads());
  std::printf(format, args...);
  std::printf("\n");
}

// |got - expected| <= bound, element by element; a NaN fails.
inline void expect_close(const std::string& name, const Values& got, const Values& expected,
                         const Values& bound) {
  expect(got.size() == expected.size() && got.size() == bound.size(), name, "%zu values, not %zu",
         got.size(), expected.size());
  for (size_t i = 0; i < std::min(got.size(), expected.size()); ++i) {
    const bool close = std::abs(got[i] - expected[i]) <= bound[i];
    expect(close, name, "element %zu is %.9g, not %.9g within %.2g", i, got[i], expected[i],
           bound[i]);
    if (!close) return;
  }
}

// Calls run() at every level and number of threads, and verify(its result) once a level.
inline void at_every_setting(const std::string& name, const std::function<Values()>& run,
                             const std::function<void(const Values&)>& verify) {
  for (int level = 0; level <= static_cast<int>(fastclust::max_cpu_level()); ++level) {
    fastclust::set_cpu_level(static_cast<fastclust::CpuLevel>(level));
    Values first;
    for (const int threads : {1, 2, 4}) {
      fastclust::set_num_threads(threads);
      const Values got = run();
      if (threads == 1) {
        first = got;
        verify(got);
      }
      const auto same_bits = [](double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0; };
      const bool same = std::equal(got.begin(), got.end(), first.begin(), first.end(), same_bits);
      expect(same, name, "other bits than on one thread");
    }
  }
  fastclust::set_cpu_level(fastclust::max_cpu_level());
}

// The tests of one kernel register under its name; main() runs those that are named, or all.
struct Suite {
  const char* name;
  void (*run)();
};
inline std::vector<Suite>& suites() {
  static std::vector<Suite> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { suites().push_back({name, run}); }
};

template <typename T>
constexpr double kEpsilon = std::numeric_limits<T>::epsilon();
template <typename T>
constexpr const char* kTypeName = sizeof(T) == 4 ? "float" : "double";

}  // namespace native
