// The pieces of the batched SVD: dense and CSR rows, ragged batches, constant and zero data, widths
// around the blocks of columns, one row, one column.
#include "lowrank/lowrank.h"

#include "native/harness.h"

namespace {

using namespace native;
using namespace fastclust::lowrank;

// X [n, d] in dense and CSR form, in batches, and what is to be subtracted.
template <typename T>
struct Data {
  int64_t n, d, b;
  bool sparse;
  Array<T> dense, mean;
  std::vector<double> values;
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  Array<T> value_array{0};
  Array<int64_t> indptr_array{0};
  Array<int32_t> index_array{0};

  // One entry in `thinning` is kept; 1 keeps all of them.
  Data(int64_t n, int64_t d, int64_t b, bool sparse, int thinning)
      : n(n), d(d), b(b), sparse(sparse), dense(normal<T>(n * d, 1)),
        mean(normal<T>(batches() * d, 2)) {
    for (int64_t k = 0; k < n * d; ++k) {
      if (k * 7 % thinning != 0 || (thinning > 1 && k / d == n / 2)) dense[k] = T(0);  // an empty row
      if (dense[k] != T(0)) {
        values.push_back(dense[k]);
        indices.push_back(int32_t(k % d));
      }
      if (k % d == d - 1) indptr.push_back(int64_t(values.size()));
    }
    value_array = Array<T>(values);
    indptr_array = Array<int64_t>(indptr);
    index_array = Array<int32_t>(indices);
  }
  int64_t batches() const { return (n + b - 1) / b; }
  int64_t batch_rows(int64_t batch) const { return std::min(b, n - batch * b); }
  double centred(bool with_mean, int64_t i, int64_t j) const {
    return double(dense[i * d + j]) - (with_mean ? double(mean[i / b * d + j]) : 0.0);
  }
  Rows<T> rows(bool with_mean) const {
    const T* subtract = with_mean ? mean.data() : nullptr;
    if (!sparse) return {dense.data(), nullptr, nullptr, subtract, n, d, b};
    return {value_array.data(), indptr_array.data(), index_array.data(), subtract, n, d, b};
  }
};

// a [rows, k] b [k, columns], given by elements; appends the product and its bound.
template <typename T, typename A, typename B>
void multiply_into(int64_t rows, int64_t columns, int64_t k, const A& a, const B& b,
                   Values& expected, Values& bound) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, size = 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += a(i, p) * b(p, j);
        size += std::abs(a(i, p) * b(p, j));
      }
      expected.push_back(sum);
      bound.push_back(8 * kEpsilon<T> * (double(k) + 4) * (size + 1));
    }
  }
}

template <typename T>
void products(int64_t n, int64_t d, int64_t b, int64_t width, bool sparse, int thinning,
              bool with_mean) {
  char text[96];
  std::snprintf(text, sizeof(text), "lowrank %s [%d, %d] %s / %d, B %d, l %d%s", kTypeName<T>,
                int(n), int(d), sparse ? "CSR" : "dense", thinning, int(b), int(width),
                with_mean ? ", centred" : "");
  const std::string name = text;
  const Data<T> data(n, d, b, sparse, thinning);
  const int64_t m = data.batches();
  const auto v = normal<T>(m * d * width, 3), q = normal<T>(m * b * width, 4);
  Values expected, bound;
  for (int64_t batch = 0; batch < m; ++batch) {  // column means
    for (int64_t j = 0; j < d; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < data.batch_rows(batch); ++i) sum += data.centred(false, batch * b + i, j);
      expected.push_back(sum / double(data.batch_rows(batch)));
      bound.push_back(64 * kEpsilon<T>);
    }
  }
  for (int64_t batch = 0; batch < m; ++batch) {
    const auto x = [&](int64_t i, int64_t j) { return data.centred(with_mean, batch * b + i, j); };
    const auto xt = [&](int64_t i, int64_t j) { return x(j, i); };
    multiply_into<T>(d, d, data.batch_rows(batch), xt, x, expected, bound);  // Gram
  }
  for (int64_t batch = 0; batch < m; ++batch) {
    const int64_t rows = data.batch_rows(batch);
    multiply_into<T>(
        b, width, d,
        [&](int64_t i, int64_t j) {
          return i < rows ? data.centred(with_mean, batch * b + i, j) : 0.0;
        },
        [&](int64_t i, int64_t j) { return double(v[(batch * d + i) * width + j]); }, expected,
        bound);
  }
  for (int64_t batch = 0; batch < m; ++batch) {
    multiply_into<T>(
        d, width, data.batch_rows(batch),
        [&](int64_t i, int64_t j) { return data.centred(with_mean, batch * b + j, i); },
        [&](int64_t i, int64_t j) { return double(q[(batch * b + i) * width + j]); }, expected,
        bound);
  }
  at_every_setting(
      name,
      [&] {
        const Rows<T> x = data.rows(with_mean);
        Array<T> means(m * d), grams(m * d * d), xv(m * b * width), xtq(m * d * width);
        column_means(data.rows(false), means.data());
        gram(x, grams.data());
        project(x, width, v.data(), xv.data());
        project_transposed(x, width, q.data(), xtq.data());
        Values got;
        append(got, means);
        append(got, grams);
        append(got, xv);
        append(got, xtq);
        return got;
      },
      [&](const Values& got) { expect_close(name, got, expected, bound); });
}

// y [batches, n, width] whose columns from `rank` on repeat the ones before.
template <typename T>
Array<T> deficient(int64_t batches, int64_t n, int64_t width, int64_t rank) {
  const auto y = normal<T>(batches * n * width, 1);
  for (int64_t k = 0; k < y.size(); ++k) {
    const int64_t j = k % width;
    if (j >= rank) y[k] = rank == 0 ? T(0) : y[k - j + j % rank];
  }
  return y;
}

double length(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return std::sqrt(sum);
}

// The columns of q are orthonormal or zero, and span those of y + shift v.
template <typename T>
void basis(int64_t batches, int64_t n, int64_t width, int64_t rank, bool with_v, int passes) {
  char text[96];
  std::snprintf(text, sizeof(text), "orthonormalize %s [%d, %d, %d], rank %d%s, %d passes",
                kTypeName<T>, int(batches), int(n), int(width), int(rank), with_v ? ", v" : "",
                passes);
  const std::string name = text;
  const auto y = deficient<T>(batches, n, width, rank);
  const auto v = normal<T>(y.size(), 2);
  const double root = 0.25, bound = 0.5;
  const Array<double> bounds(std::vector<double>(batches, bound));
  at_every_setting(
      name,
      [&] {
        Array<T> q(y.size());
        Array<double> new_bounds(batches);
        orthonormalize<T>({batches, n, width, passes, with_v ? root : 0.0, y.data(),
                           with_v ? v.data() : nullptr, with_v ? bounds.data() : nullptr, q.data(),
                           new_bounds.data()});
        Values got;
        append(got, q);
        append(got, new_bounds);
        return got;
      },
      [&](const Values& got) {
        const double tolerance = (passes == 2 ? 100 : 1e4) * kEpsilon<T> * double(n + width);
        for (int64_t batch = 0; batch < batches; ++batch) {
          const double* q = got.data() + batch * n * width;
          Values x(y.data() + batch * n * width, y.data() + (batch + 1) * n * width);
          const double norm = length(x.data(), n * width);
          const double shift = with_v ? 32 * kEpsilon<T> * norm - root * bound : 0;
          for (int64_t k = 0; k < n * width; ++k) x[k] += shift * double(v[batch * n * width + k]);
          Values inner(width * width);  // q^T x
          for (int64_t j = 0; j < width; ++j) {
            for (int64_t k = 0; k < width; ++k) {
              double sum = 0;
              for (int64_t i = 0; i < n; ++i) {
                sum += q[i * width + j] * q[i * width + k];
                inner[j * width + k] += q[i * width + j] * x[i * width + k];
              }
              const bool fine = j == k ? sum == 0 || std::abs(sum - 1) <= tolerance
                                       : std::abs(sum) <= tolerance;
              expect(fine, name, "columns %d and %d have the product %g", int(j), int(k), sum);
            }
          }
          for (int64_t k = 0; k < n * width; ++k) {
            double sum = 0;
            for (int64_t j = 0; j < width; ++j) {
              sum += q[k / width * width + j] * inner[j * width + k % width];
            }
            expect(std::abs(sum - x[k]) <= tolerance * (1 + norm), name, "q q^T x is %g, not %g",
                   sum, x[k]);
          }
          const double known = got[batches * n * width + batch];
          expect(known >= (with_v ? bound : 0) && known <= 2 * norm + bound, name, "bound %g",
                 known);
        }
      });
}

template <typename T>
void svd(int64_t batches, int64_t n, int64_t width, int64_t rank, int64_t wanted) {
  char text[96];
  std::snprintf(text, sizeof(text), "thin_svd %s [%d, %d, %d], rank %d, %d wanted", kTypeName<T>,
                int(batches), int(n), int(width), int(rank), int(wanted));
  const std::string name = text;
  const auto y = deficient<T>(batches, n, width, rank);
  at_every_setting(
      name,
      [&] {
        Array<T> u(batches * n * wanted);
        Array<double> s(batches * width), vt(batches * width * width);
        thin_svd<T>({batches, n, width, wanted, y.data(), u.data(), s.data(), vt.data()});
        Values got;
        append(got, u);
        append(got, s);
        append(got, vt);
        return got;
      },
      [&](const Values& got) {
        for (int64_t batch = 0; batch < batches; ++batch) {
          const double* u = got.data() + batch * n * wanted;
          const double* s = got.data() + batches * n * wanted + batch * width;
          const double* vt = s + (batches - batch) * width + batch * width * width;
          const Values x(y.data() + batch * n * width, y.data() + (batch + 1) * n * width);
          const double norm = length(x.data(), n * width);
          const double tolerance = 100 * kEpsilon<T> * double(n + width);
          expect(std::abs(length(s, width) - norm) <= tolerance * (1 + norm), name,
                 "the singular values have the length %g, not %g", length(s, width), norm);
          const double noise = 10 * tolerance * s[0];  // below, there is no direction
          for (int64_t j = 0; j < width; ++j) {
            expect(j == 0 || s[j] <= s[j - 1], name, "s does not descend");
            for (int64_t k = 0; k <= j; ++k) {
              double rows = 0, columns = 0;
              for (int64_t i = 0; i < width; ++i) rows += vt[j * width + i] * vt[k * width + i];
              for (int64_t i = 0; j < wanted && i < n; ++i) {
                columns += u[i * wanted + j] * u[i * wanted + k];
              }
              if (s[j] <= noise) continue;
              expect(std::abs(rows - (j == k)) <= tolerance, name, "vt %d, %d: %g", int(j), int(k),
                     rows);
              expect(j >= wanted || std::abs(columns - (j == k)) <= 10 * tolerance, name,
                     "u %d, %d: %g", int(j), int(k), columns);
            }
            for (int64_t i = 0; j < wanted && i < n; ++i) {
              double sum = 0;
              for (int64_t k = 0; k < width; ++k) sum += x[i * width + k] * vt[j * width + k];
              expect(std::abs(sum - u[i * wanted + j] * s[j]) <= 10 * tolerance * (1 + norm), name,
                     "y v is %g, u s %g", sum, u[i * wanted + j] * s[j]);
            }
          }
        }
      });
}

template <typename T>
void run_type() {
  const struct {
    int64_t n, d, b, width;
  } shapes[] = {{1, 1, 1, 1},    {2, 3, 2, 2},    {3, 5, 1, 1},   {7, 15, 4, 3},  {20, 17, 20, 16},
                {33, 31, 16, 17}, {40, 33, 100, 5}, {50, 8, 24, 8}, {17, 65, 9, 33}};
  int turn = 0;
  for (const auto& shape : shapes) {
    for (const bool sparse : {false, true}) {
      for (const int thinning : {1, 5, 40}) {
        products<T>(shape.n, shape.d, shape.b, shape.width, sparse, thinning, ++turn % 2 == 0);
      }
    }
  }
  products<T>(2100, 5, 1500, 3, false, 1, true);   // several slots of a reduction over rows
  products<T>(2100, 40, 2100, 18, true, 30, true);
  products<T>(30, 200, 30, 2, false, 1, false);    // more than one tile of the Gram matrix
  for (const int passes : {1, 2}) {
    basis<T>(1, 1, 1, 1, false, passes);
    basis<T>(2, 5, 3, 3, true, passes);
    basis<T>(9, 33, 17, 17, false, passes);
    basis<T>(1, 1100, 6, 6, false, passes);
  }
  basis<T>(1, 40, 8, 3, false, 2);
  basis<T>(3, 12, 12, 0, false, 2);
  for (const int64_t width : {1, 2, 7, 8, 9, 24}) {
    svd<T>(2, width, width, width, width);
    svd<T>(1, width + 30, width, width / 2, (width + 1) / 2);
  }
  svd<T>(9, 5, 5, 0, 3);
  at_every_setting(
      "normal",
      [] {
        Array<T> all(3 * 7 * 5), last(7 * 5);
        fastclust::lowrank::normal(3, 4, 7, 5, 9, all.data());
        fastclust::lowrank::normal(1, 6, 7, 5, 9, last.data());
        Values got;
        append(got, all);
        append(got, last);
        return got;
      },
      [](const Values& got) {
        for (int64_t k = 0; k < 35; ++k) {
          expect(got[105 + k] == got[70 + k] && std::abs(got[k]) < 2, "normal", "number %d is %g",
                 int(k), got[k]);
        }
      });
}

void run() {
  run_type<float>();
  run_type<double>();
}

const Register lowrank("lowrank", run);

}  // namespace
