"""Clusterings that need no training: what a method must beat."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust import metrics, ops
from fastclust.datasets import Dataset
from fastclust.estimators import HSAN
from fastclust.estimators.trained import data_digest
from fastclust.files import write_atomically
from fastclust.models.hsan import filtered_attributes
from fastclust.models.inputs import as_tensor


def _degree_bins(dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    degree = np.asarray(dataset.adjacency.sum(axis=1)).reshape(-1)
    rank = np.empty(degree.size, dtype=np.int64)
    rank[np.argsort(degree, kind="stable")] = np.arange(degree.size)
    return rank * int(dataset.n_clusters or 1) // degree.size


def _kmeans_attributes(dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    x = dataset.features
    return _kmeans(x.toarray() if isinstance(x, sp.csr_array) else x, dataset, seed)


def _kmeans_filtered(dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    steps = HSAN.for_dataset(dataset.name).filter_steps
    x = filtered_attributes(dataset.features, dataset.adjacency, filter_steps=steps, n_input=None)
    return _kmeans(np.asarray(x), dataset, seed)


def _kmeans(x: npt.NDArray[np.float32], dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    result = ops.kmeans(as_tensor(x, "cpu"), int(dataset.n_clusters or 1), seed=seed)
    return np.asarray(result.labels)


FLOORS: dict[str, Callable[[Dataset, int], npt.NDArray[np.int64]]] = {
    "nodes ranked by degree, K equal bins": _degree_bins,
    "k-means on X": _kmeans_attributes,
    "k-means on S^t X": _kmeans_filtered,
}


def floor_rows(dataset: Dataset, path: Path, seeds: Sequence[int] | None) -> list[dict[str, Any]]:
    """Rows of the clusterings that need no training; kept in ``path`` once they are known.

    Rows of other data under the same name are forgotten. Without ``seeds``: those that are known.
    """
    digest = data_digest(dataset.features, dataset.adjacency, dataset.labels)
    known = _known_rows(path, digest)
    if seeds is None:
        return known
    rows = {(row["model"], row["seed"]): row for row in known}
    for name, cluster in FLOORS.items():
        for seed in seeds if cluster is not _degree_bins else seeds[:1]:
            if (name, seed) in rows:
                continue
            began = time.perf_counter()
            scores = metrics.clustering_scores(dataset.labels, cluster(dataset, seed))
            rows[name, seed] = {
                "dataset": dataset.name,
                "model": name,
                "protocol": "floor",
                "selection": "last",
                "seed": seed,
                **scores,
                "epochs": 0,
                "seconds": time.perf_counter() - began,
                "peak_memory_bytes": None,
                "variant": "",
                "selected_epoch": 0,
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"data": digest, "rows": list(rows.values())}))
    return [row for (_, seed), row in rows.items() if seed in seeds]


def _known_rows(path: Path, digest: str) -> list[dict[str, Any]]:
    """The rows that ``path`` holds of these data; none where it cannot be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if isinstance(known, list):  # from before the data were noted down
        known = {"rows": known}
    same = isinstance(known, dict) and known.get("data", digest) == digest
    return list(known.get("rows", [])) if same else []
