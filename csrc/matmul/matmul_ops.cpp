// Registers the dense product of common/gemm.h: tensors of any strides in, no copy of a transpose.
#include <algorithm>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace fastclust {
namespace {

template <typename T>
void run(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Tensor& out) {
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  T* c = write_ptr<T>(out);  // [m, n]
  if (bias) {
    const T* row = read_ptr<T>(*bias);  // [n]
    parallel_for(m, 1 + 65536 / (n + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::copy(row, row + n, c + i * n);
    });
  }
  const MatrixView<T> left{read_ptr<T>(a), a.stride(0), a.stride(1)};
  const MatrixView<T> right{read_ptr<T>(b), b.stride(0), b.stride(1)};
  parallel_gemm<T>(m, n, k, T(1), left, right, bias ? T(1) : T(0), c, n);
}

void matmul_out(Tensor out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
                  "a and b must have shapes [m, k] and [k, n]");
  const ScalarType dtype = a.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "a must be float32 or float64, got ", torch::headeronly::toString(dtype));
  check_dtype(b, "b", dtype);
  check_dtype(out, "out", dtype);
  check_shape(out, "out", {a.size(0), b.size(1)});
  if (bias) {
    check_dtype(*bias, "bias", dtype);
    check_shape(*bias, "bias", {b.size(1)});
  }
  dtype == ScalarType::Double ? run<double>(a, b, bias, out) : run<float>(a, b, bias, out);
}

Tensor matmul(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must have 2 dimensions");
  Tensor out = new_empty(a, {a.size(0), b.size(1)});
  matmul_out(out, a, b, bias);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CPU, m) {
  m.impl("matmul", TORCH_BOX(&matmul));
  m.impl("matmul_out", TORCH_BOX(&matmul_out));
}

}  // namespace fastclust
