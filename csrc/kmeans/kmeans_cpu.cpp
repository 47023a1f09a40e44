// k-means on the CPU: greedy k-means++ and Lloyd's iterations of all restarts at once.
//
// What: argmin_k |x_i - c_k|^2 = argmin_k |c_k|^2 - 2 x_i.c_k, then c_k = mean of its points.
// Work split: tiles of 64 rows; a tile meets the centres of every unfinished restart while it is in
// cache, and its products are reduced to labels at once, so no N x K array exists. Centres are
// updated by what changed: points that moved are subtracted from one float64 sum and added to
// another, by tasks (restart, block of columns) that walk the changes in row order. Nothing depends
// on the number of threads.
// Few columns: tiles are transposed once (Columns), so that a lane holds a row and nothing is padded.
// Exactness: products in the data's precision decide only where the second best is further off
// than their rounding error; otherwise the candidates are compared by |x - c|^2 in float64.
// Bound by the products: 2 N R K d flops an iteration.
#include "kmeans/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "kmeans/kmeans_kernels.h"
#include "kmeans/kmeans_shared.h"

namespace fastclust::kmeans {
namespace {

constexpr int64_t kColumns = 64;      // columns of a task that updates centres
constexpr int64_t kNarrow = 16;       // most columns of points whose products go by columns
constexpr int64_t kReuse = 16;        // products that pay for columns
constexpr int64_t kInitColumns = 32;  // candidates whose distances k-means++ keeps at once

int64_t n_tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// A tile of points by columns where there are at most kNarrow of them, without their padding.
template <typename T>
class Columns {
 public:
  // `products`: of each point, over all passes. A few are not worth the transposition.
  Columns(const Problem<T>& p, int64_t products) {
    if (p.width > kNarrow || products < kReuse) return;
    const int64_t tiles = n_tiles(p.n_points);
    count_ = used(p);
    columns_.reset(new Column[static_cast<size_t>(tiles * count_)]);
    parallel_for(tiles, 4, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        Column* out = columns_.get() + tile * count_;
        for (int64_t i = 0; i < kTile; ++i) {  // the last row again past the end
          const T* row = p.x + std::min(tile * kTile + i, p.n_points - 1) * p.width;
          for (int64_t j = 0; j < count_; ++j) out[j].x[i] = row[j];
        }
      }
    });
  }

  // As Kernels::dots, for the rows of a tile.
  void dots(const Problem<T>& p, int64_t tile, const int32_t* rows, int64_t n, const T* centers,
            int64_t n_centers, T* out) const {
    if (columns_ == nullptr) {
      kernels<T>().dots(p.x, rows, n, centers, n_centers, p.width, out);
    } else {
      kernels<T>().column_dots(columns_[tile * count_].x, count_, centers, n_centers, p.width, out);
    }
  }

  // Rounding error to expect of squared distances by way of those products.
  T rounding(const Problem<T>& p) const {
    const double terms = columns_ == nullptr ? static_cast<double>(p.width) / kernels<T>().lanes
                                             : static_cast<double>(count_);
    return static_cast<T>(rounding_error(std::numeric_limits<T>::epsilon(), terms));
  }

 private:
  struct alignas(64) Column {
    T x[kTile];
  };

  // Columns up to the last that is not all zero; at least one.
  static int64_t used(const Problem<T>& p) {
    int64_t count = 1;
    for (int64_t i = 0; i < p.n_points && count < p.width; ++i) {
      for (int64_t j = p.width - 1; j >= count; --j) {
        if (p.x[i * p.width + j] != T(0)) count = j + 1;
      }
    }
    return count;
  }

  int64_t count_ = 0;
  std::unique_ptr<Column[]> columns_;  // [tiles, count_]
};

template <typename T>
double square_norm(const T* x, int64_t width) {
  static constexpr T kZeros[kPad] = {};
  double sum = 0.0;
  for (int64_t j = 0; j < width; j += kPad) {
    sum += kernels<T>().square_distance(x + j, kZeros, kPad);
  }
  return sum;
}

template <typename T>
std::vector<T> square_norms(const T* x, int64_t n, int64_t width) {
  std::vector<T> norms(static_cast<size_t>(n));
  parallel_for(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      norms[i] = static_cast<T>(square_norm(x + i * width, width));
    }
  });
  return norms;
}

// What one thread needs to handle a tile.
template <typename T>
struct TileScratch {
  alignas(64) int32_t rows[kTile];
  T best[kTile];
  T second[kTile];
  int32_t label[kTile];
  std::vector<T> dots;  // [columns, kTile]
};

// Rows of a tile; columns past its end repeat the last row so that no column of `dots` is unset.
template <typename T>
int64_t tile_rows(const Problem<T>& p, int64_t tile, TileScratch<T>& s) {
  const int64_t begin = tile * kTile;
  const int64_t n = std::min(kTile, p.n_points - begin);
  for (int64_t i = 0; i < kTile; ++i) {
    s.rows[i] = static_cast<int32_t>(begin + std::min(i, n - 1));
  }
  return n;
}

// s.label[i] = nearest of K centres for the kTile rows in s.rows.
template <typename T>
void nearest(const Problem<T>& p, const Columns<T>& columns, const T* x_norms, int64_t tile,
             const T* centers, const T* norms, T largest, T error, TileScratch<T>& s) {
  const int64_t n_centers = p.n_clusters;
  const Kernels<T>& kernel = kernels<T>();
  columns.dots(p, tile, s.rows, kTile, centers, n_centers, s.dots.data());
  kernel.least(s.dots.data(), norms, n_centers, s.best, s.second, s.label);
  for (int64_t i = 0; i < kTile; ++i) {
    const T slack = 2 * error * (x_norms[s.rows[i]] + largest);
    if (s.second[i] - s.best[i] > slack) continue;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < n_centers; ++k) {
      if (norms[k] - 2 * s.dots[k * kTile + i] > s.best[i] + slack) continue;
      const double d = kernel.square_distance(p.x + s.rows[i] * p.width, centers + k * p.width,
                                              p.width);
      if (d < least) {
        least = d;
        s.label[i] = static_cast<int32_t>(k);
      }
    }
  }
}

template <typename T>
void gather(const Problem<T>& p, const int64_t* rows, int64_t n, T* out) {
  for (int64_t j = 0; j < n; ++j) {
    std::copy_n(p.x + rows[j] * p.width, p.width, out + j * p.width);
  }
}

template <typename T>
void initialize_random(const Problem<T>& p, int64_t seed, T* centers) {
  std::vector<uint8_t> taken(static_cast<size_t>(p.n_points), 0);
  std::vector<int64_t> rows(static_cast<size_t>(p.n_clusters));
  for (int64_t r = 0; r < p.n_restarts; ++r) {
    sample_distinct(p.n_points, p.n_clusters, seed, r, 0, taken.data(), rows.data());
    gather(p, rows.data(), p.n_clusters, centers + r * p.n_clusters * p.width);
  }
}

// For centred x the sum over all i, k of |x_i - c_k|^2 is K sum_i |x_i|^2 + N sum_k |c_k|^2: the
// draw with the least sum is the one whose points lie closest to the mean.
template <typename T>
void initialize_central(const Problem<T>& p, int64_t seed, T* centers) {
  std::vector<uint8_t> taken(static_cast<size_t>(p.n_points), 0);
  std::vector<int64_t> rows(static_cast<size_t>(p.n_clusters)), best(rows.size());
  for (int64_t r = 0; r < p.n_restarts; ++r) {
    double least = std::numeric_limits<double>::infinity();
    for (int draw = 0; draw < kCentralDraws; ++draw) {
      sample_distinct(p.n_points, p.n_clusters, seed, r, draw * p.n_clusters, taken.data(),
                      rows.data());
      double sum = 0.0;
      for (const int64_t row : rows) sum += square_norm(p.x + row * p.width, p.width);
      if (sum < least) {
        least = sum;
        best = rows;
      }
    }
    gather(p, best.data(), p.n_clusters, centers + r * p.n_clusters * p.width);
  }
}

// k-means++ for a group of restarts: their candidates share the passes over x.
template <typename T>
class PlusPlus {
 public:
  PlusPlus(const Problem<T>& p, const std::vector<T>& x_norms, int64_t seed)
      : p_(p),
        columns_(p, p.n_restarts * (1 + (p.n_clusters - 1) * n_trials(p.n_clusters))),
        x_norms_(x_norms),
        seed_(seed),
        tiles_(n_tiles(p.n_points)),
        trials_(n_trials(p.n_clusters)),
        scratch_(static_cast<size_t>(num_threads())) {}

  void run(T* centers) {
    const int64_t group = std::max<int64_t>(1, kInitColumns / trials_);
    for (int64_t r = 0; r < p_.n_restarts; r += group) {
      run_group(r, std::min(group, p_.n_restarts - r), centers);
    }
  }

 private:
  // distance[c][i] = min(|x_i - x_candidate[c]|^2, current[c / trials][i]) and its sums by tile.
  void measure(const std::vector<int64_t>& candidates, int64_t trials, bool first) {
    const auto n_columns = static_cast<int64_t>(candidates.size());
    points_.resize(static_cast<size_t>(n_columns * p_.width));
    gather(p_, candidates.data(), n_columns, points_.data());
    distance_.resize(static_cast<size_t>(n_columns * p_.n_points));
    tile_sums_.resize(static_cast<size_t>(n_columns * tiles_));
    const Kernels<T>& kernel = kernels<T>();
    const T doubtful = static_cast<T>(doubtful_share(columns_.rounding(p_)));
    parallel_tasks(tiles_, [&](int64_t tile, int worker) {
      TileScratch<T>& s = scratch_[worker];
      s.dots.resize(static_cast<size_t>(n_columns * kTile));
      const int64_t n = tile_rows(p_, tile, s);
      columns_.dots(p_, tile, s.rows, n, points_.data(), n_columns, s.dots.data());
      for (int64_t c = 0; c < n_columns; ++c) {
        const T c_norm = x_norms_[candidates[c]];
        const T* current = current_.data() + c / trials * p_.n_points + tile * kTile;
        const T* x_norm = x_norms_.data() + tile * kTile;
        T* out = distance_.data() + c * p_.n_points + tile * kTile;
        double sum = 0.0;
        for (int64_t i = 0; i < n; ++i) {
          const T scale = x_norm[i] + c_norm;
          T d = scale - 2 * s.dots[c * kTile + i];
          if (d <= doubtful * scale) {
            d = static_cast<T>(kernel.square_distance(p_.x + s.rows[i] * p_.width,
                                                      points_.data() + c * p_.width, p_.width));
          }
          if (!first) d = std::min(d, current[i]);
          out[i] = d;
          sum += static_cast<double>(d);
        }
        tile_sums_[c * tiles_ + tile] = sum;
      }
    });
  }

  double total(const double* sums) const {
    double sum = 0.0;
    for (int64_t tile = 0; tile < tiles_; ++tile) sum += sums[tile];
    return sum;
  }

  // The point at which the running sum of squared distances passes u times their total.
  int64_t draw(int64_t g, double u) const {
    const double* sums = current_sums_.data() + g * tiles_;
    const T* distance = current_.data() + g * p_.n_points;
    const double all = total(sums);
    if (!(all > 0.0)) return pick_below(p_.n_points, u);  // every point is a centre already
    const double target = u * all;
    double before = 0.0;
    int64_t last = 0;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      if (sums[tile] <= 0.0) continue;
      last = tile;
      if (before + sums[tile] > target) break;
      before += sums[tile];
    }
    const int64_t end = std::min(p_.n_points, (last + 1) * kTile);
    int64_t pick = last * kTile;
    for (int64_t i = last * kTile; i < end; ++i) {
      if (distance[i] <= T(0)) continue;
      pick = i;
      before += static_cast<double>(distance[i]);
      if (before > target) break;
    }
    return pick;
  }

  // Makes column c the current distances of restart g of the group.
  void keep(int64_t g, int64_t c) {
    std::copy_n(distance_.data() + c * p_.n_points, p_.n_points,
                current_.data() + g * p_.n_points);
    std::copy_n(tile_sums_.data() + c * tiles_, tiles_, current_sums_.data() + g * tiles_);
  }

  void run_group(int64_t first_restart, int64_t n_group, T* centers) {
    current_.resize(static_cast<size_t>(n_group * p_.n_points));
    current_sums_.resize(static_cast<size_t>(n_group * tiles_));
    std::vector<int64_t> candidates(static_cast<size_t>(n_group));
    for (int64_t step = 0; step < p_.n_clusters; ++step) {
      const int64_t trials = step == 0 ? 1 : trials_;
      candidates.resize(static_cast<size_t>(n_group * trials));
      for (int64_t g = 0; g < n_group; ++g) {
        for (int64_t t = 0; t < trials; ++t) {
          const double u = draw_uniform(seed_, first_restart + g, step * trials_ + t);
          candidates[g * trials + t] = step == 0 ? pick_below(p_.n_points, u) : draw(g, u);
        }
      }
      measure(candidates, trials, step == 0);
      for (int64_t g = 0; g < n_group; ++g) {
        int64_t best = g * trials;
        double least = std::numeric_limits<double>::infinity();
        for (int64_t c = g * trials; c < (g + 1) * trials; ++c) {
          const double sum = total(tile_sums_.data() + c * tiles_);
          if (sum < least) {
            least = sum;
            best = c;
          }
        }
        keep(g, best);
        std::copy_n(points_.data() + best * p_.width, p_.width,
                    centers + ((first_restart + g) * p_.n_clusters + step) * p_.width);
      }
    }
  }

  const Problem<T>& p_;
  const Columns<T> columns_;
  const std::vector<T>& x_norms_;
  const int64_t seed_, tiles_, trials_;
  std::vector<TileScratch<T>> scratch_;
  std::vector<T> points_;             // [columns, dp] the candidates
  std::vector<T> distance_;           // [columns, N]
  std::vector<double> tile_sums_;     // [columns, tiles]
  std::vector<T> current_;            // [group, N] squared distance to the nearest centre so far
  std::vector<double> current_sums_;  // [group, tiles]
};

// One restart in flight.
template <typename T>
struct Run {
  T* centers;                    // [K, dp]
  std::vector<T> norms;          // [K] |c|^2
  T largest = 0;                 // of norms
  std::vector<double> sums;      // [K, dp] over the points of each cluster
  std::vector<int64_t> counts;   // [K]
  std::vector<int32_t> labels;   // [N]; -1 before the first iteration
  // Points whose label changed in this iteration: tile t owns the places from t * kTile on.
  std::vector<int32_t> changed;      // [N] rows
  std::vector<int32_t> before;       // [N] their labels before
  std::vector<int32_t> n_changed;    // [tiles]
  std::vector<double> shift;         // [K, column blocks] squared movement of the centres

  void start(const Problem<T>& p, T* initial) {
    const auto n = static_cast<size_t>(p.n_points), k = static_cast<size_t>(p.n_clusters);
    centers = initial;
    norms.resize(k);
    sums.assign(k * p.width, 0.0);
    counts.assign(k, 0);
    labels.assign(n, -1);
    changed.resize(n);
    before.resize(n);
    n_changed.resize(static_cast<size_t>(n_tiles(p.n_points)));
    shift.resize(k * ((p.width + kColumns - 1) / kColumns));
    measure_centers(p);
  }

  void measure_centers(const Problem<T>& p) {
    for (int64_t k = 0; k < p.n_clusters; ++k) {
      norms[k] = static_cast<T>(square_norm(centers + k * p.width, p.width));
    }
    largest = *std::max_element(norms.begin(), norms.end());
  }

  // Labels of one tile, with a note of what changed.
  void label_tile(const Problem<T>& p, const Columns<T>& columns, const T* x_norms, int64_t tile,
                  int64_t n, T error, TileScratch<T>& s) {
    nearest(p, columns, x_norms, tile, centers, norms.data(), largest, error, s);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      int32_t& label = labels[s.rows[i]];
      if (label == s.label[i]) continue;
      changed[tile * kTile + count] = s.rows[i];
      before[tile * kTile + count] = label;
      ++count;
      label = s.label[i];
    }
    n_changed[tile] = count;
  }

  template <typename F>
  void for_each_change(const F& f) const {
    for (size_t tile = 0; tile < n_changed.size(); ++tile) {
      for (int64_t j = 0; j < n_changed[tile]; ++j) {
        f(changed[tile * kTile + j], before[tile * kTile + j]);
      }
    }
  }

  // Gives `row` to cluster k although another centre is nearer.
  void move(int64_t row, int32_t k) {
    const int64_t tile = row / kTile;
    const int32_t* first = changed.data() + tile * kTile;
    const int32_t* last = first + n_changed[tile];
    if (std::find(first, last, static_cast<int32_t>(row)) == last) {
      changed[tile * kTile + n_changed[tile]] = static_cast<int32_t>(row);
      before[tile * kTile + n_changed[tile]] = labels[row];
      ++n_changed[tile];
    }
    --counts[labels[row]];
    ++counts[k];
    labels[row] = k;
  }

  void count_changes() {
    for_each_change([&](int32_t row, int32_t old) {
      if (old >= 0) --counts[old];
      ++counts[labels[row]];
    });
  }

  // Moves the point farthest from its centre into each empty cluster (ties to the lowest row),
  // unless every point lies on a centre: then there are fewer distinct points than clusters, and
  // the centre stays where it is. Returns whether a point was moved.
  bool repair(const Problem<T>& p) {
    if (std::find(counts.begin(), counts.end(), 0) == counts.end()) return false;
    const Kernels<T>& kernel = kernels<T>();
    std::vector<double> distance(static_cast<size_t>(p.n_points));
    const auto measure = [&](const T* center, bool own) {
      parallel_for(p.n_points, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T* c = own ? centers + labels[i] * p.width : center;
          const double d = kernel.square_distance(p.x + i * p.width, c, p.width);
          distance[i] = own ? d : std::min(distance[i], d);
        }
      });
    };
    measure(nullptr, true);
    bool moved = false;
    for (int64_t k = 0; k < p.n_clusters; ++k) {
      if (counts[k] > 0) continue;
      int64_t farthest = -1;
      for (int64_t i = 0; i < p.n_points; ++i) {
        if (distance[i] > 0.0 && counts[labels[i]] > 1 &&
            (farthest < 0 || distance[i] > distance[farthest])) {
          farthest = i;
        }
      }
      if (farthest < 0) break;
      move(farthest, static_cast<int32_t>(k));
      moved = true;
      measure(p.x + farthest * p.width, false);
    }
    return moved;
  }

  // New sums and centres of columns [begin, end); squared movements into column `block` of shift.
  void update_columns(const Problem<T>& p, int64_t block) {
    const Kernels<T>& kernel = kernels<T>();
    const int64_t begin = block * kColumns, width = std::min(kColumns, p.width - begin);
    const int64_t n_blocks = (p.width + kColumns - 1) / kColumns;
    for_each_change([&](int32_t row, int32_t old) {
      const T* x = p.x + row * p.width + begin;
      double* to = sums.data() + labels[row] * p.width + begin;
      if (old < 0) {
        kernel.add(to, x, width);
      } else {
        kernel.move(sums.data() + old * p.width + begin, to, x, width);
      }
    });
    for (int64_t k = 0; k < p.n_clusters; ++k) {
      double moved = 0.0;
      if (counts[k] > 0) {
        const double scale = 1.0 / static_cast<double>(counts[k]);
        for (int64_t j = begin; j < begin + width; ++j) {
          const T value = static_cast<T>(sums[k * p.width + j] * scale);
          const double diff = static_cast<double>(value) - centers[k * p.width + j];
          moved += diff * diff;
          centers[k * p.width + j] = value;
        }
      }
      shift[k * n_blocks + block] = moved;
    }
  }

  bool has_converged(const Problem<T>& p, double tolerance, bool norm_rule) const {
    const int64_t n_blocks = (p.width + kColumns - 1) / kColumns;
    double sum = 0.0;
    for (int64_t k = 0; k < p.n_clusters; ++k) {
      double moved = 0.0;
      for (int64_t b = 0; b < n_blocks; ++b) moved += shift[k * n_blocks + b];
      sum += norm_rule ? std::sqrt(moved) : moved;
    }
    return is_converged(sum, norm_rule, tolerance);
  }
};

}  // namespace

template <typename T>
void center(const T* x, int64_t n, int64_t d, T* xc, int64_t dp, double* mean, double* variance) {
  constexpr int64_t kChunk = 1024;
  const int64_t n_chunks = (n + kChunk - 1) / kChunk;
  const auto by_chunk = [&](const auto& f) {
    std::vector<double> partial(static_cast<size_t>(n_chunks * d), 0.0);
    parallel_tasks(n_chunks, [&](int64_t chunk, int) {
      double* sum = partial.data() + chunk * d;
      for (int64_t i = chunk * kChunk; i < std::min(n, (chunk + 1) * kChunk); ++i) f(i, sum);
    });
    for (int64_t chunk = 1; chunk < n_chunks; ++chunk) {
      for (int64_t j = 0; j < d; ++j) partial[j] += partial[chunk * d + j];
    }
    partial.resize(static_cast<size_t>(d));
    return partial;
  };
  const auto sums = by_chunk([&](int64_t i, double* sum) {
    kernels<T>().add(sum, x + i * d, d);
  });
  for (int64_t j = 0; j < d; ++j) mean[j] = sums[j] / static_cast<double>(n);
  const auto squares = by_chunk([&](int64_t i, double* sum) {
    T* out = xc + i * dp;
    for (int64_t j = 0; j < d; ++j) {
      const double value = static_cast<double>(x[i * d + j]) - mean[j];
      sum[j] += value * value;
      out[j] = static_cast<T>(value);
    }
    std::fill(out + d, out + dp, T(0));
  });
  double sum = 0.0;
  for (const double value : squares) sum += value / static_cast<double>(n);
  *variance = sum / static_cast<double>(d);
}

template <typename T>
void initialize(const Problem<T>& p, Init init, int64_t seed, T* centers) {
  switch (init) {
    case Init::kRandom: return initialize_random(p, seed, centers);
    case Init::kCentral: return initialize_central(p, seed, centers);
    case Init::kPlusPlus: break;
  }
  const std::vector<T> x_norms = square_norms(p.x, p.n_points, p.width);
  PlusPlus<T>(p, x_norms, seed).run(centers);
}

template <typename T>
void lloyd(const Problem<T>& p, double tolerance, bool norm_rule, int64_t max_iter, T* centers,
           int64_t* n_iter, bool* converged) {
  const std::vector<T> x_norms = square_norms(p.x, p.n_points, p.width);
  const Columns<T> columns(p, p.n_restarts * p.n_clusters * std::min(max_iter, kReuse));
  const T error = columns.rounding(p);
  const int64_t tiles = n_tiles(p.n_points), n_blocks = (p.width + kColumns - 1) / kColumns;
  std::vector<TileScratch<T>> scratch(static_cast<size_t>(num_threads()));
  std::vector<Run<T>> runs(static_cast<size_t>(p.n_restarts));
  std::vector<int64_t> active;
  for (int64_t r = 0; r < p.n_restarts; ++r) {
    runs[r].start(p, centers + r * p.n_clusters * p.width);
    n_iter[r] = 0;
    converged[r] = false;
    active.push_back(r);
  }
  std::vector<uint8_t> repaired(static_cast<size_t>(p.n_restarts));
  for (int64_t iteration = 0; iteration < max_iter && !active.empty(); ++iteration) {
    parallel_tasks(tiles, [&](int64_t tile, int worker) {
      TileScratch<T>& s = scratch[worker];
      s.dots.resize(static_cast<size_t>(p.n_clusters * kTile));
      const int64_t n = tile_rows(p, tile, s);
      for (const int64_t r : active) {
        runs[r].label_tile(p, columns, x_norms.data(), tile, n, error, s);
      }
    });
    for (const int64_t r : active) {
      runs[r].count_changes();
      repaired[r] = runs[r].repair(p);
    }
    const auto n_active = static_cast<int64_t>(active.size());
    parallel_tasks(n_active * n_blocks, [&](int64_t task, int) {
      runs[active[task / n_blocks]].update_columns(p, task % n_blocks);
    });
    parallel_tasks(n_active, [&](int64_t a, int) { runs[active[a]].measure_centers(p); });
    std::vector<int64_t> still;
    for (const int64_t r : active) {
      ++n_iter[r];
      converged[r] = !repaired[r] && runs[r].has_converged(p, tolerance, norm_rule);
      if (!converged[r]) still.push_back(r);
    }
    active.swap(still);
  }
}

template <typename T>
void assign(const Problem<T>& p, const T* centers, int32_t* labels, double* inertia) {
  const std::vector<T> x_norms = square_norms(p.x, p.n_points, p.width);
  const std::vector<T> norms = square_norms(centers, p.n_restarts * p.n_clusters, p.width);
  const Columns<T> columns(p, p.n_restarts * p.n_clusters);
  const T error = columns.rounding(p);
  const int64_t tiles = n_tiles(p.n_points);
  std::vector<TileScratch<T>> scratch(static_cast<size_t>(num_threads()));
  std::vector<double> sums(static_cast<size_t>(tiles * p.n_restarts));
  parallel_tasks(tiles, [&](int64_t tile, int worker) {
    TileScratch<T>& s = scratch[worker];
    s.dots.resize(static_cast<size_t>(p.n_clusters * kTile));
    const int64_t n = tile_rows(p, tile, s);
    for (int64_t r = 0; r < p.n_restarts; ++r) {
      const T* c = centers + r * p.n_clusters * p.width;
      const T* c_norms = norms.data() + r * p.n_clusters;
      nearest(p, columns, x_norms.data(), tile, c, c_norms,
              *std::max_element(c_norms, c_norms + p.n_clusters), error, s);
      double sum = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        labels[r * p.n_points + s.rows[i]] = s.label[i];
        sum += kernels<T>().square_distance(p.x + s.rows[i] * p.width, c + s.label[i] * p.width,
                                            p.width);
      }
      sums[r * tiles + tile] = sum;
    }
  });
  for (int64_t r = 0; r < p.n_restarts; ++r) {
    inertia[r] = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) inertia[r] += sums[r * tiles + tile];
  }
}

#define FASTCLUST_INSTANTIATE(T)                                                                \
  template void center<T>(const T*, int64_t, int64_t, T*, int64_t, double*, double*);           \
  template void initialize<T>(const Problem<T>&, Init, int64_t, T*);                            \
  template void lloyd<T>(const Problem<T>&, double, bool, int64_t, T*, int64_t*, bool*);        \
  template void assign<T>(const Problem<T>&, const T*, int32_t*, double*);
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust::kmeans
