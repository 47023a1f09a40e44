// The InfoNCE loss, its gradients and the range of similarities: one node, sizes around the tile,
// odd widths, no structure view, zero rows, alpha outside [0, 1], none, one and three snapshots,
// stored weights of three refreshes;
// float32 also in bfloat16 products, which have a bound of their own.
#include "infonce/infonce.h"

#include "native/harness.h"

namespace {

using namespace native;
using namespace fastclust::infonce;

// Stacked views of n nodes with unit rows, the last node's rows zero; S as a plain matrix.
template <typename T>
struct Pair {
  int64_t m, dz, de;
  Array<T> z, e, alpha;

  Pair(int64_t n, int64_t dz, int64_t de, double mix, uint64_t seed)
      : m(2 * n), dz(dz), de(de), z(unit(m, dz, seed)), e(unit(m, de, seed + 1)),
        alpha(std::vector<double>{mix}) {}

  static Array<T> unit(int64_t m, int64_t d, uint64_t seed) {
    auto x = normal<T>(m * d, seed);
    for (int64_t i = 0; i < m; ++i) {
      double norm = 0;
      for (int64_t j = 0; j < d; ++j) norm += double(x[i * d + j]) * double(x[i * d + j]);
      const double scale = m > 2 && i % (m / 2) == m / 2 - 1 ? 0 : 1 / std::sqrt(norm);
      for (int64_t j = 0; j < d; ++j) x[i * d + j] = T(scale * double(x[i * d + j]));
    }
    return x;
  }
  static double product(const Array<T>& x, int64_t d, int64_t i, int64_t k) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += double(x[i * d + j]) * double(x[k * d + j]);
    return sum;
  }
  double zz(int64_t i, int64_t k) const { return product(z, dz, i, k); }
  double ee(int64_t i, int64_t k) const { return product(e, de, i, k); }
  double s(int64_t i, int64_t k) const {
    return double(alpha[0]) * zz(i, k) + (1 - double(alpha[0])) * ee(i, k);
  }
  Views<T> views() const { return {z.data(), e.data(), dz, de, alpha.data()}; }
  void range(double* least, double* greatest) const {
    *least = *greatest = s(0, 0);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t k = i; k < m; ++k) {
        *least = std::min(*least, s(i, k));
        *greatest = std::max(*greatest, s(i, k));
      }
    }
  }
};

// Snapshots of earlier embeddings with labels, members and the order of rows.
template <typename T>
struct Refreshes {
  std::vector<Pair<T>> pairs;
  std::vector<Views<T>> views;
  std::vector<double> ranges;
  std::vector<int32_t> label, order;
  std::vector<int64_t> member;
  double beta;
  Array<T> range{0};
  Array<int32_t> labels{0}, rows{0};
  Array<int64_t> membership{0};
  Array<Views<T>> view_table{0};

  // kind 0: none; 1: the current embeddings; 2: three earlier ones; 3: one, no confident node;
  // 4: three earlier ones, stored.
  Refreshes(int kind, int64_t n, const Pair<T>& now, double beta) : beta(beta) {
    const int count = kind == 0 ? 0 : kind == 2 || kind == 4 ? 3 : 1;
    for (int s = 0; s < count; ++s) {
      pairs.push_back(kind == 1 ? now : Pair<T>(n, now.dz + s, now.de, 0.4 + 0.3 * s, 50 + 2 * s));
    }
    for (const Pair<T>& pair : pairs) {
      views.push_back(pair.views());
      double least, greatest;
      pair.range(&least, &greatest);
      ranges.insert(ranges.end(), {least, greatest});
    }
    for (int64_t i = 0; i < count * n; ++i) label.push_back(int32_t(i * 7 % 3));
    for (int64_t i = 0; i < n; ++i) {
      member.push_back(kind == 3 ? 0 : i * 5 % (int64_t{1} << count));
      order.push_back(int32_t(i));
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return member[a] > member[b]; });
    range = Array<T>(ranges);
    labels = Array<int32_t>(label);
    rows = Array<int32_t>(order);
    membership = Array<int64_t>(member);
    view_table = Array<Views<T>>(views);
  }
  Weights<T> weights() const {
    if (pairs.empty()) return {};
    return {int(pairs.size()), view_table.data(),     range.data(), labels.data(),
            membership.data(), rows.data(), beta};
  }
  Array<T> stored(int64_t n) const {
    Array<T> tiles(Values(weight_tiles(n) * kWeightTile * kWeightTile, 1.0));
    for (size_t s = 0; s < pairs.size(); ++s) {
      Array<bool> confident(n);
      for (int64_t u = 0; u < n; ++u) confident[u] = member[u] >> s & 1;
      UpdateParams<T> p{};
      p.n_nodes = n;
      p.views = views[s];
      p.range = range.data() + 2 * s;
      p.labels = labels.data() + s * n;
      p.confident = confident.data();
      p.beta = beta;
      p.stored = tiles.data();
      update_stored_weights_cpu(p);
    }
    return tiles;
  }
  double weight(int64_t n, int64_t i, int64_t k) const {
    const int64_t u = i % n, v = k % n, common = member[u] & member[v];
    for (int s = int(pairs.size()) - 1; s >= 0; --s) {
      if ((common >> s & 1) == 0) continue;
      const double width = double(range[2 * s + 1]) - double(range[2 * s]);
      const double q = width > 0 ? (pairs[s].s(i, k) - double(range[2 * s])) / width : 0;
      return std::pow(std::abs((label[s * n + u] == label[s * n + v] ? 1 : 0) - q), beta);
    }
    return 1;
  }
};

template <typename T>
void loss(int64_t n, int64_t dz, int64_t de, double alpha, int kind, double beta, int wanted,
          Precision precision = Precision::kFp32) {
  char text[96];
  const bool bf16 = precision == Precision::kBf16;
  std::snprintf(text, sizeof(text), "infonce %s%s N %d, d %d + %d, alpha %g, weights %d, beta %g",
                kTypeName<T>, bf16 ? " in bf16" : "", int(n), int(dz), int(de), alpha, kind, beta);
  const std::string name = text;
  const Pair<T> pair(n, dz, de, alpha, 3);
  const Refreshes<T> refreshes(kind, n, pair, beta);
  const int64_t m = 2 * n;

  // The definitions of infonce.h, word for word.
  Values s(m * m), w(m * m), row_sums(m, 0.0);
  double expected_loss = 0, least, greatest;
  pair.range(&least, &greatest);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < m; ++k) {
      s[i * m + k] = pair.s(i, k);
      w[i * m + k] = refreshes.weight(n, i, k);
      if (i != k) row_sums[i] += std::exp(w[i * m + k] * s[i * m + k]);
    }
  }
  const double grad = 1.75;
  Values grad_z(m * dz, 0.0), grad_e(m * de, 0.0);
  long double slope = 0;  // equal terms drift in double
  for (int64_t i = 0; i < m; ++i) {
    const int64_t pair_of_i = (i + n) % m;
    expected_loss += std::log(row_sums[i]) - w[i * m + pair_of_i] * s[i * m + pair_of_i];
    for (int64_t k = 0; k < m; ++k) {
      const double weight = w[i * m + k];
      double t = i == k ? 0
                        : std::exp(weight * s[i * m + k]) * weight *
                              (1 / row_sums[i] + 1 / row_sums[k]);
      if (k == pair_of_i) t -= 2 * weight;
      for (int64_t j = 0; j < dz; ++j) {
        grad_z[i * dz + j] += grad / double(m) * double(pair.alpha[0]) * t * double(pair.z[k * dz + j]);
      }
      for (int64_t j = 0; j < de; ++j) {
        grad_e[i * de + j] += grad / double(m) * (1 - double(pair.alpha[0])) * t * double(pair.e[k * de + j]);
      }
      slope += grad / double(m) * t / 2 * (pair.zz(i, k) - pair.ee(i, k));
    }
  }
  const bool want_z = wanted & 1, want_e = wanted & 2, want_alpha = wanted & 4;
  Values expected = row_sums, bound;
  const double rounding = bf16 ? 0x1p-8 : 64 * kEpsilon<T>;
  const double eps = rounding * (1 + std::abs(alpha)) * (1 + beta);
  for (const double sum : row_sums) bound.push_back(eps * sum);
  const auto add = [&](const Values& values, double scale) {
    expected.insert(expected.end(), values.begin(), values.end());
    bound.insert(bound.end(), values.size(), eps * scale);
  };
  add({expected_loss / double(m)}, 1 + std::log(double(m)));
  const double share = 4 * grad / double(m) * (1 + std::abs(alpha));  // a row of |T| sums to 4
  if (want_z) add(grad_z, share);
  if (want_e) add(grad_e, share);
  if (want_alpha) add({double(slope)}, grad);
  add({least, greatest}, 1 + std::abs(alpha));

  at_every_setting(
      name,
      [&] {
        Array<T> value(1), d_z(m * dz), d_e(m * de), d_alpha(1), range(2);
        Array<double> sums(m);
        const Array<T> seed(std::vector<double>{grad});
        const Array<T> stored = kind == 4 ? refreshes.stored(n) : Array<T>(0);
        Weights<T> weights = refreshes.weights();
        if (kind == 4) {
          weights = {};
          weights.stored = stored.data();
        }
        ForwardParams<T> f{};
        f.n_nodes = n;
        f.views = pair.views();
        f.weights = weights;
        f.precision = precision;
        f.loss = value.data();
        f.row_sums = sums.data();
        forward_cpu(f);
        BackwardParams<T> b{};
        b.n_nodes = n;
        b.views = pair.views();
        b.weights = weights;
        b.precision = precision;
        b.row_sums = sums.data();
        b.grad_loss = seed.data();
        b.grad_z = want_z ? d_z.data() : nullptr;
        b.grad_e = want_e ? d_e.data() : nullptr;
        b.grad_alpha = want_alpha ? d_alpha.data() : nullptr;
        backward_cpu(b);
        RangeParams<T> r{};
        r.n_nodes = n;
        r.views = pair.views();
        r.precision = precision;
        r.range = range.data();
        range_cpu(r);
        Values got;
        append(got, sums);
        append(got, value);
        if (want_z) append(got, d_z);
        if (want_e) append(got, d_e);
        if (want_alpha) append(got, d_alpha);
        append(got, range);
        return got;
      },
      [&](const Values& got) { expect_close(name, got, expected, bound); });
}

template <typename T>
void run_type() {
  int turn = 0;
  const double alphas[] = {0.7, -0.3, 1.6}, betas[] = {1, 0, 2, 3.7};
  for (const int64_t n : {1, 2, 3, 7, 95, 96, 97}) {
    for (int kind = 0; kind < 5; ++kind) {
      loss<T>(n, 1 + turn % 5, turn % 4, alphas[turn % 3], kind, betas[turn % 4], 7 - turn % 8);
      ++turn;
    }
  }
  for (const int64_t d : {15, 16, 17, 47, 49, 97}) {
    loss<T>(5, d, d - 2, 0.5, turn % 4, betas[turn % 4], 7);
    ++turn;
  }
  loss<T>(3, 0, 5, 0.25, 2, 1, 7);    // no attribute view
  loss<T>(200, 3, 2, 0.6, 2, 1, 7);   // three tile rows
  loss<T>(410, 2, 0, 0.9, 2, 1, 7);   // more tile rows than a panel holds
  loss<T>(410, 2, 3, 0.9, 4, 3, 7);
}

void run() {
  run_type<float>();
  for (const int64_t n : {1, 2, 3, 95, 96, 97, 200}) {
    loss<float>(n, n % 7 + 1, n % 5, 0.7, n % 4, 1, 7, Precision::kBf16);
    loss<float>(n, n % 7 + 1, n % 5, 0.7, 4, 1, 7, Precision::kBf16);
  }
  for (const int64_t d : {15, 16, 17, 31, 32, 33, 65}) {
    loss<float>(9, d, d - 2, 0.4, d % 4, 2, 7, Precision::kBf16);
  }
  run_type<double>();
}

const Register infonce("infonce", run);

}  // namespace
