// Propagation: widths around every vector and mask word, isolated nodes, hubs cut into segments,
// an empty graph, strided rows, every combination of values, scales, mask, residual and ReLU.
#include "propagate/propagate.h"

#include "native/harness.h"

namespace {

using namespace native;
using fastclust::mask_words;
using fastclust::PropagateParams;

// A symmetric graph: node 0 is a hub where there are nodes enough, the last node is isolated.
struct Graph {
  int64_t n;
  std::vector<int64_t> indptr, task_rows, segments, hubs;
  std::vector<int32_t> indices;
  int64_t hub_edges = 8;

  explicit Graph(int64_t n_nodes) : n(n_nodes) {
    const auto joined = [&](int64_t i, int64_t j) {
      if (i == j || i == n - 1 || j == n - 1) return false;
      return i == 0 || j == 0 ? (i + j) % 3 != 0 : (i * j + i + j) % 11 == 0 && n < 1000;
    };
    indptr.push_back(0);
    task_rows.push_back(0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        if (joined(i, j)) indices.push_back(static_cast<int32_t>(j));
        if (n >= 1000 && i != 0) break;  // large graph: a star
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
      const int64_t begin = indptr[i], end = indptr[i + 1];
      if (end - begin > hub_edges) {
        const auto first = static_cast<int64_t>(segments.size()) / 3;
        for (int64_t e = begin; e < end; e += hub_edges) {
          segments.insert(segments.end(), {i, e, std::min(e + hub_edges, end)});
        }
        hubs.insert(hubs.end(), {i, first, static_cast<int64_t>(segments.size()) / 3});
      }
      if (i % 5 == 4 || i == n - 1) task_rows.push_back(i + 1);
    }
  }
};

bool bit(const Array<uint32_t>& mask, int64_t words, int64_t i, int64_t c) {
  return mask[i * words + c / 32] >> (c % 32) & 1u;
}

template <typename T>
void propagate(const Graph& graph, int64_t d, unsigned options) {
  const bool with_values = options & 1, scales = options & 2, self = options & 4;
  const bool masked = options & 8, relu = options & 16;
  const bool residual = options & 32, add_input = !residual && (options & 64);
  const int64_t n = graph.n, words = mask_words(d), stride = d + (options & 4 ? 5 : 0);
  const Array<int64_t> indptr(graph.indptr), tasks(graph.task_rows), segments(graph.segments);
  const Array<int64_t> hubs(graph.hubs);
  const Array<int32_t> indices(graph.indices);
  const auto values = normal<float>(indices.size(), 1);
  const auto rows = normal<T>(n, 2), columns = normal<T>(n, 3);
  const int64_t extent = n == 0 ? 0 : (n - 1) * stride + d;
  const auto h = normal<T>(extent, 4), r = normal<T>(extent, 5);
  Array<uint32_t> mask(n * words);
  for (int64_t i = 0; i < n * words; ++i) {
    mask[i] = static_cast<uint32_t>(0x9E3779B97F4A7C15ull * (i + 1) >> 32);
    const int64_t left = d - i % words * 32;
    if (left < 32) mask[i] &= (1u << left) - 1u;
  }

  const auto input = [&](int64_t i, int64_t c) {
    return masked && !bit(mask, words, i, c) ? 0.0 : double(h[i * stride + c]);
  };
  Values expected, bound, before;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < d; ++c) {
      double sum = 0, size = 0;
      const auto add = [&](double coefficient, int64_t j) {
        const double term = coefficient * (scales ? double(columns[j]) : 1.0) * input(j, c);
        sum += term;
        size += std::abs(term);
      };
      for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e) {
        add(with_values ? double(values[e]) : 1.0, indices[e]);
      }
      if (self) add(1.0, i);
      const double scale = scales ? double(rows[i]) : 1.0;
      const double extra = residual ? double(r[i * stride + c]) : add_input ? input(i, c) : 0.0;
      const double x = sum * scale + extra;
      before.push_back(x);
      expected.push_back(relu && x <= 0 ? 0.0 : x);
      const double terms = double(indptr[i + 1] - indptr[i]) + 4;
      bound.push_back(kEpsilon<T> * terms * (size * std::abs(scale) + std::abs(extra)) + 1e-300);
    }
  }

  char name[96];
  std::snprintf(name, sizeof(name), "propagate %s [%d, %d], options %u", kTypeName<T>, int(n),
                int(d), options);
  at_every_setting(
      name,
      [&] {
        Array<T> out(n * d), masked_h(n * d);
        Array<uint32_t> out_mask(n * words);
        PropagateParams<T> p{};
        p.n_nodes = n;
        p.n_cols = d;
        p.n_edges = indices.size();
        p.indptr = indptr.data();
        p.indices = indices.data();
        p.values = with_values ? values.data() : nullptr;
        p.row_scale = scales ? rows.data() : nullptr;
        p.col_scale = scales ? columns.data() : nullptr;
        p.self_loops = self;
        p.n_tasks = tasks.size() - 1;
        p.task_rows = tasks.data();
        p.hub = {graph.hub_edges, segments.size() / 3, segments.data(), hubs.size() / 3,
                 hubs.data()};
        p.h = h.data();
        p.h_stride = stride;
        p.h_mask = masked ? mask.data() : nullptr;
        p.residual = residual ? r.data() : nullptr;
        p.residual_stride = stride;
        p.add_input = add_input;
        p.relu = relu;
        p.out = out.data();
        p.out_mask = relu ? out_mask.data() : nullptr;
        p.masked_h = masked ? masked_h.data() : nullptr;
        fastclust::propagate_cpu(p);
        Values got;
        append(got, out);
        if (relu) append(got, out_mask);
        if (masked) append(got, masked_h);
        return got;
      },
      [&](const Values& got) {
        auto at = got.begin() + n * d;
        expect_close(name, Values(got.begin(), at), expected, bound);
        for (int64_t i = 0; relu && i < n; ++i) {
          for (int64_t c = 0; c < words * 32; ++c) {
            const bool passed = uint32_t(at[i * words + c / 32]) >> (c % 32) & 1u;
            const int64_t k = i * d + c;
            if (c < d && before[k] != 0 && std::abs(before[k]) <= bound[k]) continue;
            expect(passed == (c < d && before[k] > 0), name, "mask bit [%d, %d]", int(i), int(c));
          }
        }
        if (relu) at += n * words;
        for (int64_t k = 0; masked && k < n * d; ++k) {
          expect(at[k] == input(k / d, k % d), name, "masked input at %d", int(k));
        }
      });

  at_every_setting(
      "mask_rows",
      [&] {
        Array<T> out(n * d);
        fastclust::mask_rows_cpu<T>(n, d, h.data(), stride, mask.data(), out.data());
        Values got;
        append(got, out);
        return got;
      },
      [&](const Values& got) {
        for (int64_t k = 0; k < n * d; ++k) {
          const bool on = bit(mask, words, k / d, k % d);
          expect(got[k] == (on ? double(h[k / d * stride + k % d]) : 0.0), "mask_rows", "at %d",
                 int(k));
        }
      });
}

template <typename T>
void run_type() {
  const Graph graph(41);
  for (unsigned options = 0; options < 128; ++options) {
    propagate<T>(graph, 3, options);
    propagate<T>(graph, 65, options);  // scaled and masked in place
  }
  unsigned options = 77;
  for (const int64_t d : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257}) {
    for (int i = 0; i < 4; ++i) propagate<T>(graph, d, options += 37);
  }
  for (const int64_t n : {0, 1, 2, 3}) {
    for (const unsigned small : {0u, 31u, 95u}) propagate<T>(Graph(n), 5, small);
  }
  propagate<T>(graph, 0, 0);
  propagate<T>(Graph(9000), 130, 4 + 16);  // columns in narrower blocks, to fit a cache
}

void run() {
  run_type<float>();
  run_type<double>();
}

const Register propagation("propagate", run);

}  // namespace
