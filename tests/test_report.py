"""The table of the terminal and the report page."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse as sp

from fastclust import plot, report
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
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "xlink:href")]
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
    assert all(address.startswith(("#", "data:image/png;")) for address in checker.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)|<script", text)
    assert "could not be drawn" not in text
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
    assert "could not be drawn" not in text


def test_a_figure_that_fails_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no <ink>")

    monkeypatch.setattr(plot, "similarity", fail)
    result, dataset = make_run(tmp_path)
    text = report.write_page(tmp_path, result, dataset).read_text()
    assert text.count("could not be drawn") == 1 and "no &lt;ink&gt;" in text
    assert text.count("<svg") >= 8


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    report.write_page(tmp_path, *make_run(tmp_path))
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == figures, "a page must not leave figures in pyplot"


def test_page_of_named_nodes_and_an_estimated_number_of_clusters(tmp_path: Path) -> None:
    result, dataset = make_run(tmp_path)
    names = np.array([f'n "{i}", <b>' for i in range(80)])
    clusters = np.loadtxt(tmp_path / "assignments.csv", delimiter=",", skiprows=1, dtype=int)[:, 1]
    with (tmp_path / "assignments.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("node", "cluster"), *zip(names, clusters, strict=True)])
    result["runs"][0]["n_clusters_evidence"] = {
        "rule": "the <most> agreement", "n_clusters": [2, 3, 4], "agreement": [0.2, 0.5, 0.7],
    }  # fmt: skip
    dataset = dataclasses.replace(dataset, node_names=names)
    text = report.write_page(tmp_path, result, dataset).read_text()
    assert "agreement of disjoint halves" in text and "the &lt;most&gt; agreement" in text
    assert "could not be drawn" not in text
    assert "<b>" not in text.split("<h2>Nodes")[1] and "&lt;b&gt;" in text.split("<h2>Nodes")[1]


def test_nodes_are_ordered_by_margin(tmp_path: Path) -> None:
    _, dataset = make_run(tmp_path)
    clusters = np.loadtxt(tmp_path / "assignments.csv", delimiter=",", skiprows=1, dtype=int)[:, 1]
    (_, clear), (_, hard) = report._nodes(clusters, dataset.features, dataset)
    assert [row["margin"] for row in clear] == sorted((r["margin"] for r in clear), reverse=True)
    assert hard[0]["margin"] <= hard[1]["margin"] < 0 < clear[-1]["margin"]
    # make_run puts some nodes of other classes into cluster 0: those are the hardest.
    assert hard[0]["cluster"] == 0 != hard[0]["label"]


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, or a clear skip."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install .[test]")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The page of a labelled run of two seeds, and that of one without labels."""
    found = {}
    for labelled, seeds in ((True, (0, 1)), (False, (0,))):
        root = tmp_path_factory.mktemp("run")
        result, dataset = make_run(root, n=300, k=7, labelled=labelled, seeds=seeds)
        found[labelled] = report.write_page(root, result, dataset)
    return found


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")]
)
def test_page_in_a_browser(
    browser: Any, pages: dict[bool, Path], width: int, scheme: str, labelled: bool
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[labelled].as_uri())
    picture = plt.imread(io.BytesIO(page.screenshot(full_page=True)))[..., :3]  # [h, w, 3]
    text = page.inner_text("body")
    wide = page.evaluate("document.documentElement.scrollWidth")
    # Every drawing has a size, lies within its section, and its text is at least 7.5 pixels high.
    boxes = page.evaluate(
        "[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().right,"
        " s.closest('section').getBoundingClientRect().right, s.getBoundingClientRect().height,"
        " ...[...s.querySelectorAll('text')].slice(0, 1).map("
        "  t => parseFloat(getComputedStyle(t).fontSize) * s.getScreenCTM().a)])"
    )
    context.close()

    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert wide <= width, "the page scrolls sideways"
    words = ["HSAN on <toy>", "Embedding", "Learning curves", "Clusters", "Nodes", "hardest"]
    words += ["ACC", "by label"] if labelled else ["silhouette"]
    assert [word for word in words if word not in text] == []
    assert len(boxes) >= 7
    for right, limit, height, *letters in boxes:
        assert right <= limit and height > 60
        assert all(size >= 7.5 for size in letters)
    # Not blank, and in the scheme asked for: all palette colours show on the right background.
    page_is_dark = float(np.median(picture)) < 0.5
    assert page_is_dark == (scheme == "dark")
    pixels = picture.reshape(-1, 3)
    for color in plot.PALETTE[:7]:
        near = np.abs(pixels - matplotlib.colors.to_rgb(color)).max(axis=1) < 0.02
        assert near.sum() > 50, color
