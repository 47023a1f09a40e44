// Run-time choice of the instruction set. Every kernel asks cpu_level() and takes the best
// translation unit that was compiled for it; nothing else in the package looks at the CPU.
#pragma once

namespace fastclust {

// Ordered: a level includes all lower ones.
enum class CpuLevel : int {
  kPortable = 0,   // what the compiler emits without any flag
  kAvx2 = 1,       // AVX2 + FMA + F16C
  kAvx512 = 2,     // AVX-512 F, BW, DQ, VL
};

// Highest level that was compiled in and that this processor and operating system support.
CpuLevel max_cpu_level();

// The level in force: max_cpu_level(), lowered by the environment variable FASTCLUST_CPU_LEVEL
// (portable, avx2, avx512; read once) or by set_cpu_level().
CpuLevel cpu_level();

// Lowers the level for this process (tests and benchmarks). Returns the level now in force,
// which never exceeds max_cpu_level().
CpuLevel set_cpu_level(CpuLevel level);

// True when AVX-512 BF16 dot products exist and cpu_level() is kAvx512.
bool has_avx512_bf16();

const char* cpu_level_name(CpuLevel level);

}  // namespace fastclust
