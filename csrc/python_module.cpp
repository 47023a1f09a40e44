// The pybind11 module fastclust._C: what is not a tensor operator. Importing it also registers the
// CPU operators, because they are linked into the same library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "common/cpu.h"

namespace {

using fastclust::CpuLevel;

CpuLevel level_from_name(const std::string& name) {
  for (const CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (name == fastclust::cpu_level_name(level)) return level;
  }
  throw std::invalid_argument("level must be 'portable', 'avx2' or 'avx512', got '" + name + "'");
}

std::map<std::string, std::string> build_info() {
  return {
      {"torch", FASTCLUST_BUILD_TORCH},
      {"compiler", FASTCLUST_BUILD_COMPILER},
      {"cuda", FASTCLUST_BUILD_CUDA},
      {"cuda_archs", FASTCLUST_BUILD_CUDA_ARCHS},
  };
}

std::map<std::string, bool> cpu_features() {
  const CpuLevel best = fastclust::max_cpu_level();
  return {
      {"avx2", best >= CpuLevel::kAvx2},
      {"avx512", best >= CpuLevel::kAvx512},
      {"avx512_bf16", fastclust::has_avx512_bf16()},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fastclust: CPU operators, build information, CPU dispatch.";
  m.def("build_info", &build_info,
        "Versions this library was built with; 'cuda' and 'cuda_archs' are empty without CUDA.");
  m.def("cpu_features", &cpu_features, "Instruction sets that the dispatcher may use here.");
  m.def("cpu_level", [] { return fastclust::cpu_level_name(fastclust::cpu_level()); },
        "Name of the dispatch level in force: 'portable', 'avx2' or 'avx512'.");
  m.def(
      "set_cpu_level",
      [](const std::string& name) {
        return fastclust::cpu_level_name(fastclust::set_cpu_level(level_from_name(name)));
      },
      pybind11::arg("level"),
      "Lower the dispatch level of this process; returns the level now in force.");
}
