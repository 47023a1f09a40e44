// The packed matrix product: sizes around the register tile, the slivers and the blocks, any
// strides, C never read where beta is 0.
#include "common/gemm.h"

#include "native/harness.h"

namespace {

using namespace native;
using fastclust::MatrixView;

// Strides of a matrix [rows, columns]: by rows, by columns, rows with a gap, every other element.
struct Layout {
  int64_t row_stride, col_stride, size;
};
Layout layout(int form, int64_t rows, int64_t columns) {
  if (rows == 0 || columns == 0) return {columns, 1, 0};
  switch (form) {
    case 0: return {columns, 1, rows * columns};
    case 1: return {1, rows, rows * columns};
    case 2: return {columns + 3, 1, (rows - 1) * (columns + 3) + columns};
    default: return {4 * columns, 2, (rows - 1) * 4 * columns + 2 * columns - 1};
  }
}

template <typename T>
void product(int64_t m, int64_t n, int64_t k, int form, T alpha, T beta, bool parallel) {
  const Layout la = layout(form % 4, m, k), lb = layout(form / 4 % 4, k, n);
  const int64_t ldc = n + form % 3;
  const auto a = normal<T>(la.size, 1), b = normal<T>(lb.size, 2), c = normal<T>(m * ldc, 3);
  const auto at = [](const Array<T>& x, const Layout& l, int64_t i, int64_t j) {
    return double(x[i * l.row_stride + j * l.col_stride]);
  };
  Values expected, bound;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t p = 0; p < k; ++p) {
        const double term = at(a, la, i, p) * at(b, lb, p, j);
        sum += term;
        size += std::abs(term);
      }
      const double old = beta == T(0) ? 0 : double(c[i * ldc + j]);
      expected.push_back(double(alpha) * sum + double(beta) * old);
      bound.push_back(kEpsilon<T> * (double(k) + 2) *
                      (std::abs(alpha) * size + std::abs(beta * old)) + 1e-300);
    }
  }
  char name[96];
  std::snprintf(name, sizeof(name), "gemm %s %d x %d x %d, strides %d%s", kTypeName<T>, int(m),
                int(n), int(k), form, parallel ? ", parallel" : "");
  at_every_setting(
      name,
      [&] {
        Array<T> out(m * ldc);  // NaN where beta is 0
        if (beta != T(0)) std::copy_n(c.data(), c.size(), out.data());
        const MatrixView<T> va{a.data(), la.row_stride, la.col_stride};
        const MatrixView<T> vb{b.data(), lb.row_stride, lb.col_stride};
        (parallel ? fastclust::parallel_gemm<T> : fastclust::gemm<T>)(m, n, k, alpha, va, vb, beta,
                                                                      out.data(), ldc);
        Values got;
        for (int64_t i = 0; i < m; ++i) {
          got.insert(got.end(), out.data() + i * ldc, out.data() + i * ldc + n);
        }
        return got;
      },
      [&](const Values& got) { expect_close(name, got, expected, bound); });
}

template <typename T>
void run_type() {
  int form = 0;
  for (const int64_t m : {1, 3, 8, 9}) {
    for (const int64_t n : {1, 7, 17, 48, 49}) {
      for (const int64_t k : {0, 1, 7, 33}) {
        const T beta = T(form % 3) * T(0.5);
        product<T>(m, n, k, form, T(1.5), beta, form % 2 == 1);
        ++form;
      }
    }
  }
  product<T>(193, 50, 257, 1, T(1), T(0), true);  // past one block of rows and of depth
  product<T>(70, 193, 64, 0, T(-1), T(1), true);
  product<T>(3, 1921, 2, 4, T(1), T(0), false);  // past one block of columns
  product<T>(9, 1930, 30, 4, T(1), T(0), true);
}

void run() {
  run_type<float>();
  run_type<double>();
}

const Register gemm("gemm", run);

}  // namespace
