// The pybind11 module fastclust._C: what is not a tensor operator. Importing it also registers the
// CPU operators, because they are linked into the same library.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "common/cpu.h"
#include "common/gemm.h"

namespace py = pybind11;

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

// C = alpha A B + beta C in place, for tests and benchmarks of the product inside the kernels.
template <typename T>
void gemm(T alpha, py::array_t<T> a, py::array_t<T> b, T beta, py::array_t<T> c, bool parallel) {
  const auto size = static_cast<py::ssize_t>(sizeof(T));
  if (a.ndim() != 2 || b.ndim() != 2 || c.ndim() != 2 || a.shape(1) != b.shape(0) ||
      c.shape(0) != a.shape(0) || c.shape(1) != b.shape(1)) {
    throw std::invalid_argument("a, b, c must have shapes [m, k], [k, n], [m, n]");
  }
  if (c.shape(1) > 1 && c.strides(1) != size) {
    throw std::invalid_argument("c must have contiguous rows");
  }
  const auto view = [size](const py::array_t<T>& x) {
    return fastclust::MatrixView<T>{x.data(), x.strides(0) / size, x.strides(1) / size};
  };
  auto* product = parallel ? fastclust::parallel_gemm<T> : fastclust::gemm<T>;
  product(a.shape(0), b.shape(1), a.shape(1), alpha, view(a), view(b), beta, c.mutable_data(),
          c.strides(0) / size);
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
  const auto def_gemm = [&m](auto product) {
    m.def("gemm", product, py::arg("alpha"), py::arg("a").noconvert(), py::arg("b").noconvert(),
          py::arg("beta"), py::arg("c").noconvert(), py::arg("parallel") = false,
          "c = alpha a b + beta c in place: the matrix product inside the kernels, for tests.");
  };
  def_gemm(&gemm<float>);
  def_gemm(&gemm<double>);
  m.def(
      "fma_peak_gflops",
      [](bool float64) {
        return float64 ? fastclust::fma_peak_gflops<double>() : fastclust::fma_peak_gflops<float>();
      },
      py::arg("float64") = false,
      "Measured fused multiply-add rate of one core at the dispatch level in force, Gflop/s.");
}
