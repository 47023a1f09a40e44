#include "common/cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fastclust {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

CpuLevel detect() {
#if defined(FASTCLUST_X86_SIMD) && (defined(__x86_64__) || defined(__i386__))
  // __builtin_cpu_supports also asks the operating system whether it saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return CpuLevel::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kPortable;
}

CpuLevel initial_level() {
  const CpuLevel best = max_cpu_level();
  const char* wanted = std::getenv("FASTCLUST_CPU_LEVEL");
  if (wanted == nullptr) return best;
  for (int i = 0; i < static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<CpuLevel>(i);
  }
  return best;
}

std::atomic<CpuLevel>& level_in_force() {
  static std::atomic<CpuLevel> level{initial_level()};
  return level;
}

}  // namespace

CpuLevel max_cpu_level() {
  static const CpuLevel best = detect();
  return best;
}

CpuLevel cpu_level() { return level_in_force().load(std::memory_order_relaxed); }

CpuLevel set_cpu_level(CpuLevel level) {
  if (level > max_cpu_level()) level = max_cpu_level();
  level_in_force().store(level, std::memory_order_relaxed);
  return level;
}

bool has_avx512_bf16() {
#if defined(FASTCLUST_X86_SIMD) && (defined(__x86_64__) || defined(__i386__))
  return cpu_level() == CpuLevel::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* cpu_level_name(CpuLevel level) { return kNames[static_cast<int>(level)]; }

}  // namespace fastclust
