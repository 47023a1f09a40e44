"""Index maps and epilogue arithmetic of the CUDA propagation kernels, run on the host."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).parent.parent / "csrc"

SOURCE = """
#include "propagate/propagate_map.h"
using namespace fastclust;
extern "C" {
void shape(int64_t n_cols, int aligned, int size, int* out) {
  const WarpShape s = warp_shape(n_cols, aligned != 0, size);
  out[0] = s.vec;
  out[1] = s.slots;
}
// Adds one to every column that some lane of some slice owns, as the kernel walks them.
void cover(int64_t n_cols, int vec, int slots, int* count) {
  const WarpShape s{vec, slots};
  for (int64_t slice = 0; slice < warp_slices(n_cols, s); ++slice)
    for (int slot = 0; slot < slots; ++slot)
      for (int lane = 0; lane < 32; ++lane) {
        const int64_t col = lane_column(slice, slot, lane, s);
        if (col >= n_cols) continue;
        for (int v = 0; v < vec; ++v) ++count[col + v];
      }
}
int64_t column(int64_t slice, int slot, int lane, int vec, int slots) {
  return lane_column(slice, slot, lane, {vec, slots});
}
int64_t units(int64_t n, int64_t n_segments) {
  return n_warp_units(n, {0, n_segments, nullptr, 0, nullptr});
}
void work(int64_t unit, int64_t n, const int64_t* indptr, int64_t hub_edges, int64_t n_segments,
          const int64_t* segments, int64_t* out) {
  const WarpWork w = warp_work(unit, n, indptr, {hub_edges, n_segments, segments, 0, nullptr});
  out[0] = w.any; out[1] = w.row; out[2] = w.edge_begin; out[3] = w.edge_end; out[4] = w.segment;
}
uint32_t bits(uint32_t word, int64_t col, int vec) { return lane_bits(word, col, vec); }
int finish(float sum, float own, float self_coef, float scale, float residual, int relu,
           float* value) {
  const Finished<float> f = finish_element(sum, own, self_coef, scale, residual, relu != 0);
  *value = f.value;
  return f.passed;
}
int64_t words(int64_t n_cols) { return mask_words(n_cols); }
}
"""


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler: none was found on PATH")
    folder = tmp_path_factory.mktemp("propagate_map")
    (folder / "map.cpp").write_text(SOURCE)
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, "map.cpp", "-o", "map.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "map.so"))
    for name in ("column", "units", "words"):
        getattr(library, name).restype = ctypes.c_int64
    library.bits.restype = ctypes.c_uint32
    return library


def i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(int(value))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("element_size", [4, 8])
@pytest.mark.parametrize("aligned", [False, True])
def test_every_column_has_one_lane(maps, aligned, element_size):
    for n_cols in [*range(1, 140), 255, 256, 257, 500, 512, 516, 600, 1000, 1500, 4096]:
        out = np.zeros(2, dtype=np.int32)
        maps.shape(i64(n_cols), int(aligned), element_size, pointer(out))
        vec, slots = out.tolist()
        assert slots in (1, 2, 4) and vec in (1, 16 // element_size)
        # a vector load never crosses the end of a row, and happens only where rows are aligned
        assert vec == 1 or (aligned and n_cols % vec == 0)
        count = np.zeros(n_cols, dtype=np.int32)
        maps.cover(i64(n_cols), vec, slots, pointer(count))
        assert (count == 1).all(), (n_cols, vec, slots)


def test_lanes_of_a_mask_word_are_neighbours(maps):
    # store_bits joins 32 / vec neighbouring lanes: they must share a word, and only they
    for vec in (1, 2, 4):
        for slice_, slot in ((0, 0), (0, 3), (5, 1)):
            columns = [maps.column(i64(slice_), slot, lane, vec, 4) for lane in range(32)]
            words = [c // 32 for c in columns]
            group = 32 // vec
            assert words == [words[0] + lane // group for lane in range(32)]
            assert [c % 32 for c in columns] == [lane % group * vec for lane in range(32)]


def test_columns_beyond_32_bits(maps):
    assert maps.column(i64(2**25), 3, 31, 4, 4) == ((2**25 * 4 + 3) * 32 + 31) * 4 > 2**33
    assert maps.words(i64(2**40 + 1)) == 2**35 + 1


def test_every_edge_is_summed_once_and_every_row_finished_once(maps):
    from fastclust.graph import _chunk_tables

    rng = np.random.default_rng(0)
    degree = rng.integers(0, 30, 50)
    degree[[0, 20, 49]] = [100, 17, 16]
    indptr = np.concatenate([[0], np.cumsum(degree)])
    tables = _chunk_tables(indptr, 16)
    segments, hubs = tables["_segments"].numpy(), tables["_hubs"].numpy()
    n_units = maps.units(i64(50), i64(len(segments)))
    edges, rows, slots = np.zeros(indptr[-1], int), np.zeros(50, int), []
    for unit in range(n_units + 8):  # the last block of warps runs past the end
        out = np.zeros(5, dtype=np.int64)
        maps.work(
            i64(unit), i64(50), pointer(indptr), i64(16), i64(len(segments)), pointer(segments),
            pointer(out),
        )  # fmt: skip
        any_work, row, begin, end, slot = out.tolist()
        if not any_work:
            continue
        edges[begin:end] += 1
        if slot < 0:
            rows[row] += 1
        else:
            slots.append(slot)
    rows[hubs[:, 0]] += 1
    assert (edges == 1).all() and (rows == 1).all() and slots == list(range(len(segments)))


def test_rows_beyond_2_to_31_edges(maps):
    indptr = np.array([0, 2**33, 2**33 + 5], dtype=np.int64)
    segments = np.array([[0, 2**32, 2**33]], dtype=np.int64)
    for unit, expected in ((0, [1, 0, 2**32, 2**33, 0]), (2, [1, 1, 2**33, 2**33 + 5, -1])):
        out = np.zeros(5, dtype=np.int64)
        maps.work(
            i64(unit), i64(2), pointer(indptr), i64(512), i64(1), pointer(segments), pointer(out)
        )
        assert out.tolist() == expected


def test_bits_of_a_lane(maps):
    word = 0b1011_0000_0000_0000_0000_0000_0110_1001
    assert maps.bits(ctypes.c_uint32(word), i64(32 * 7), 4) == 0b1001
    assert maps.bits(ctypes.c_uint32(word), i64(28), 4) == 0b1011
    assert maps.bits(ctypes.c_uint32(word), i64(31), 1) == 1
    assert maps.bits(ctypes.c_uint32(word), i64(30), 2) == 0b10


@pytest.mark.parametrize("relu", [0, 1])
def test_epilogue(maps, relu):
    f = ctypes.c_float
    for total, own, coef, scale, residual in (
        (3.0, 2.0, 1.0, 0.25, -1.0),
        (-3.0, 2.0, 0.5, 0.5, 0.0),
        (0.0, 0.0, 1.0, 1.0, 0.0),
        (float("nan"), 0.0, 1.0, 1.0, 0.0),
    ):
        value = f()
        passed = maps.finish(
            f(total), f(own), f(coef), f(scale), f(residual), relu, ctypes.byref(value)
        )
        x = (total + coef * own) * scale + residual
        assert passed == (not x <= 0)
        np.testing.assert_equal(value.value, 0.0 if relu and x <= 0 else x)
