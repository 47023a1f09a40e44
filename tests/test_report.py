"""The table of the terminal and the report page."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from fastclust import report
from fastclust.datasets import Dataset


def make_run(
    root: Path, n: int = 80, k: int = 4, *, labelled: bool = True, seeds: tuple[int, ...] = (0,)
) -> tuple[dict[str, Any], Dataset]:
    """A run directory with made-up content, its result and its data."""
    rng = np.random.default_rng(0)
    truth = np.arange(n) % k
    clusters = truth.copy()
    clusters[: n // 10] = 0
    upper = np.triu(rng.random((n, n)) < np.where(truth[:, None] == truth, 0.3, 0.02), 1)
    adjacency = sp.csr_array((upper | upper.T).astype(np.float32))
    embedding = (np.eye(k)[truth] + 0.1 * rng.normal(size=(n, k))).astype(np.float32)
    names = ["acc", "nmi", "ari", "f1"] if labelled else ["modularity", "silhouette"]
    runs = []
    for seed in seeds:
        folder = root if seed == seeds[0] else root / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        np.save(folder / "embedding.npy", embedding)
        lines = [f"{i},{c}\n" for i, c in enumerate(clusters)]
        (folder / "assignments.csv").write_text("node,cluster\n" + "".join(lines))
        rows = [{"epoch": e, "loss": 1 / e, "seconds": 0.1, "acc": 0.5} for e in range(1, 5)]
        (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        runs.append(
            {
                "seed": seed,
                "metrics": dict.fromkeys(names, 0.875),
                "epochs": 4,
                "seconds": 1.5,
                "peak_memory_bytes": 3 * 10**8,
            }
        )
    result = {
        "dataset": "<toy>",
        "model": "hsan",
        "protocol": "standard",
        "selection": "last",
        "device": "cpu",
        "precision": "fp32",
        "n_clusters": k,
        "labelled": labelled,
        "runs": runs,
        "mean": dict.fromkeys(names, 0.875),
        "std": dict.fromkeys(names, 0.01 if len(seeds) > 1 else None),
        "config": {"lr": 1e-3, "n_input": None, "selection": "last"},
        "versions": {"fastclust": "0"},
    }
    labels = truth.astype(np.int64) if labelled else None
    return result, Dataset("<toy>", adjacency, embedding, labels, k if labelled else None)


class Checker(html.parser.HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = ("meta", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_table_of_several_seeds(tmp_path: Path) -> None:
    result, _ = make_run(tmp_path, seeds=(0, 7))
    lines = report.table(result).splitlines()
    assert lines[0].split() == ["ACC", "NMI", "ARI", "F1", "epochs", "time", "memory"]
    assert [line.split()[0] for line in lines[1:]] == ["seed", "seed", "mean", "std"]
    assert "87.50" in lines[1] and "300 MB" in lines[1] and "1.00" in lines[4]


def test_table_of_one_seed_has_no_spread(tmp_path: Path) -> None:
    result, _ = make_run(tmp_path)
    assert len(report.table(result).splitlines()) == 2


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("seeds", [(0,), (3, 1)])
def test_page_is_whole_and_needs_no_network(
    tmp_path: Path, labelled: bool, seeds: tuple[int, ...]
) -> None:
    result, dataset = make_run(tmp_path, labelled=labelled, seeds=seeds)
    text = report.write_page(tmp_path, result, dataset).read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.addresses == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    assert "&lt;toy&gt;" in text and "<toy>" not in text
    assert ("by label" in text) == labelled
    assert ("±" in text) == (len(seeds) > 1)
    for heading in ("Embedding", "Learning curves", "Clusters", "Runs", "Settings"):
        assert heading in text
    assert "NaN" not in text and "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", text)


def test_page_is_the_same_every_time(tmp_path: Path) -> None:
    result, dataset = make_run(tmp_path)
    first = report.write_page(tmp_path, result, dataset).read_bytes()
    assert report.write_page(tmp_path, result, dataset).read_bytes() == first


@pytest.mark.parametrize("n", [2, 3, 10])
def test_page_of_few_nodes(tmp_path: Path, n: int) -> None:
    result, dataset = make_run(tmp_path, n=n, k=2)
    assert "PCA" in report.write_page(tmp_path, result, dataset).read_text()


def test_page_without_history_and_with_many_clusters(tmp_path: Path) -> None:
    result, dataset = make_run(tmp_path, n=200, k=40)
    (tmp_path / "history.jsonl").unlink()
    text = report.write_page(tmp_path, result, dataset).read_text()
    assert "Learning curves" not in text
    assert "--c39:" in text


@pytest.mark.parametrize("shape", [(40, 1), (40, 3), (3000, 8)])
def test_projection_shapes(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    nodes, points, method = report.project(x, max_nodes=500)
    assert len(nodes) == len(points) == min(shape[0], 500)
    assert points.shape[1] == 2 and np.isfinite(points).all()
    assert (np.diff(nodes) > 0).all() and method == "t-SNE"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_projection_of_a_collapsed_embedding(value: float) -> None:
    _, points, _ = report.project(np.full((50, 4), value, dtype=np.float32))
    assert np.isfinite(points).all()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.5, 0.5), (-3, 12345), (1e-9, 2e-9), (0, 0), (7.1, 7.2), (-1, -1)]
)
def test_ticks_span_the_range(low: float, high: float) -> None:
    ticks = report._ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-6, "1e-6"), (2.5e7, "2.5e7"), (0.25, "0.25"), (12000.0, "12000")],
)
def test_numbers_on_axes(value: float, text: str) -> None:
    assert report._number(value) == text
