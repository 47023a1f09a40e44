// k-means: one point, as many clusters as points, equal points (empty clusters), sizes around the
// tile of rows and the groups of centres, odd widths.
#include "kmeans/kmeans.h"

#include <set>

#include "native/harness.h"

namespace {

using namespace native;
namespace km = fastclust::kmeans;

// x [n, d] with its padding; points repeat after `distinct` of them.
template <typename T>
struct Points {
  int64_t n, d, dp;
  Array<T> x, xc;
  Values mean;

  Points(int64_t n, int64_t d, int64_t distinct)
      : n(n), d(d), dp((d + km::kPad - 1) / km::kPad * km::kPad), x(normal<T>(n * d, 1)),
        xc(n * dp), mean(d, 0.0) {
    for (int64_t i = distinct; i < n; ++i) {
      std::copy_n(x.data() + (i - distinct) * d, d, x.data() + i * d);
    }
    for (int64_t k = 0; k < n * d; ++k) mean[k % d] += double(x[k]) / double(n);
    for (int64_t k = 0; k < n * dp; ++k) {
      xc[k] = k % dp < d ? T(double(x[k / dp * d + k % dp]) - mean[k % dp]) : T(0);
    }
  }
  double distance(int64_t i, const double* c) const {
    double sum = 0;
    for (int64_t j = 0; j < dp; ++j) {
      const double diff = double(xc[i * dp + j]) - c[j];
      sum += diff * diff;
    }
    return sum;
  }
};

template <typename T>
void center(const Points<T>& points, const std::string& name) {
  double variance = 0;
  for (int64_t k = 0; k < points.n * points.d; ++k) {
    const double diff = double(points.x[k]) - points.mean[k % points.d];
    variance += diff * diff / double(points.n * points.d);
  }
  at_every_setting(
      name + ", center",
      [&] {
        Array<T> xc(points.n * points.dp);
        Array<double> mean(points.d), spread(1);
        km::center(points.x.data(), points.n, points.d, xc.data(), points.dp, mean.data(),
                   spread.data());
        Values got;
        append(got, xc);
        append(got, mean);
        append(got, spread);
        return got;
      },
      [&](const Values& got) {
        Values expected;
        append(expected, points.xc);
        expected.insert(expected.end(), points.mean.begin(), points.mean.end());
        expected.push_back(variance);
        Values bound(expected.size(), 16 * kEpsilon<T>);
        expect_close(name + ", center", got, expected, bound);
      });
}

template <typename T>
void cluster(int64_t n, int64_t d, int64_t k, int64_t restarts, int64_t distinct, km::Init init,
             bool norm_rule, int64_t max_iter) {
  char text[96];
  std::snprintf(text, sizeof(text), "kmeans %s [%d, %d], K %d, R %d, init %d", kTypeName<T>,
                int(n), int(d), int(k), int(restarts), int(init));
  const std::string name = text;
  const Points<T> points(n, d, distinct);
  center(points, name);
  const km::Problem<T> problem{points.xc.data(), n, points.dp, k, restarts};
  const int64_t size = k * points.dp;

  at_every_setting(
      name,
      [&] {
        Array<T> centers(restarts * size);
        km::initialize(problem, init, 7, centers.data());
        Values got;
        append(got, centers);
        Array<int64_t> n_iter(restarts);
        Array<bool> converged(restarts);
        km::lloyd(problem, 1e-12, norm_rule, max_iter, centers.data(), n_iter.data(),
                  converged.data());
        append(got, centers);
        append(got, n_iter);
        append(got, converged);
        Array<int32_t> labels(restarts * n);
        Array<double> inertia(restarts);
        km::assign(problem, centers.data(), labels.data(), inertia.data());
        append(got, labels);
        append(got, inertia);
        return got;
      },
      [&](const Values& got) {
        const double* first = got.data();
        const double* centers = first + restarts * size;
        const double* n_iter = centers + restarts * size;
        const double *converged = n_iter + restarts, *labels = converged + restarts;
        const double* inertia = labels + restarts * n;
        std::set<Values> rows;
        for (int64_t i = 0; i < n; ++i) {
          rows.insert(Values(points.xc.data() + i * points.dp, points.xc.data() + (i + 1) * points.dp));
        }
        for (int64_t r = 0; r < restarts; ++r) {
          std::set<Values> seeds;
          for (int64_t c = 0; c < k; ++c) {
            seeds.insert(Values(first + r * size + c * points.dp, first + r * size + (c + 1) * points.dp));
          }
          expect(std::includes(rows.begin(), rows.end(), seeds.begin(), seeds.end()), name,
                 "a first centre is no point");
          if (distinct >= n) {
            expect(int64_t(seeds.size()) == k, name, "first centres repeat: %d of %d",
                   int(seeds.size()), int(k));
          }
          expect(n_iter[r] >= 0 && n_iter[r] <= double(max_iter), name, "%g iterations", n_iter[r]);

          const double* c = centers + r * size;
          double total = 0;
          Values sums(size, 0.0), counts(k, 0.0);
          for (int64_t i = 0; i < n; ++i) {
            const auto label = int64_t(labels[r * n + i]);
            expect(label >= 0 && label < k, name, "label %d", int(label));
            if (label < 0 || label >= k) return;
            double least = std::numeric_limits<double>::infinity(), norm = 0;
            for (int64_t j = 0; j < k; ++j) {
              least = std::min(least, points.distance(i, c + j * points.dp));
            }
            for (int64_t j = 0; j < points.dp; ++j) norm += std::pow(points.xc[i * points.dp + j], 2);
            const double own = points.distance(i, c + label * points.dp);
            expect(own <= least + 32 * kEpsilon<T> * (norm + least), name,
                   "point %d is at %g from its centre, %g from another", int(i), own, least);
            total += own;
            counts[label] += 1;
            for (int64_t j = 0; j < points.dp; ++j) sums[label * points.dp + j] += points.xc[i * points.dp + j];
          }
          expect(std::abs(inertia[r] - total) <= 1e-9 * (1 + total), name, "inertia %g, not %g",
                 inertia[r], total);
          for (int64_t j = 0; converged[r] == 1 && j < size; ++j) {
            const double count = counts[j / points.dp];
            expect(count == 0 || std::abs(sums[j] / count - c[j]) <= 1e-5, name,
                   "centre %d is not the mean of its points", int(j / points.dp));
          }
        }
      });
}

template <typename T>
void run_type() {
  using km::Init;
  for (const Init init : {Init::kPlusPlus, Init::kRandom, Init::kCentral}) {
    cluster<T>(1, 1, 1, 1, 1, init, false, 10);
    cluster<T>(2, 3, 2, 2, 2, init, true, 10);
    cluster<T>(3, 5, 3, 3, 3, init, false, 10);    // K = N
    cluster<T>(9, 2, 4, 2, 1, init, false, 10);    // all points equal
    cluster<T>(70, 17, 5, 2, 3, init, true, 50);   // fewer distinct points than clusters
    cluster<T>(65, 33, 7, 3, 65, init, false, 100);
  }
  for (const int64_t n : {63, 64, 65, 129}) {
    for (const int64_t k : {1, 6, 13}) cluster<T>(n, 16, k, 2, n, Init::kPlusPlus, false, 100);
  }
  cluster<T>(20, 15, 4, 1, 20, Init::kRandom, false, 0);  // no iteration at all
  cluster<T>(1500, 3, 8, 2, 1500, Init::kPlusPlus, true, 100);  // several chunks of rows
}

void run() {
  run_type<float>();
  run_type<double>();
}

const Register kmeans("kmeans", run);

}  // namespace
