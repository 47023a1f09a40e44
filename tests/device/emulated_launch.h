// Launches with any arguments and scratch memory, over cuda_emulator.h.
#pragma once

#include <functional>

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace fastclust {

template <typename... Parameters, typename... Args>
void enqueue_shared(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes,
                    cudaStream_t stream, Args... args) {
  const auto call = [&] { kernel(args...); };
  using Call = decltype(call);
  void (*run)(const Call*) = [](const Call* c) { (*c)(); };
  launch(run, grid, threads, bytes, stream, &call);
}
template <typename... Parameters, typename... Args>
void enqueue(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
            Args... args) {
  enqueue_shared(kernel, grid, threads, 0, stream, args...);
}

}  // namespace fastclust

namespace emulator {

// Memory that starts as NaN in every format.
class Memory {
 public:
  std::function<void*(size_t)> allocate() {
    return [this](size_t bytes) -> void* {
      pieces_.emplace_back(new unsigned char[bytes + 64]);
      std::memset(pieces_.back().get(), 0xff, bytes + 64);
      return pieces_.back().get();
    };
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> pieces_;
};

}  // namespace emulator
