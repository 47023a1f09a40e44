"""The graphs that are measured: real where they are at hand, made up in their shapes elsewhere."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1]

# Graphs by name: nodes, stored entries, features, share of ones, clusters, and rank of the low-rank
# view; made up in these shapes where FASTCLUST_DATA does not name the real ones.
SHAPES = {
    "cora": (2708, 10556, 1433, 0.013, 7, 40),
    "amap": (7650, 238162, 745, 0.35, 8, 20),
    "amac": (13752, 491722, 767, 0.35, 10, 70),
    "100k": (100_000, 1_000_000, 500, 0.05, 10, 40),
    "tiny": (120, 600, 90, 0.2, 3, 5),
}


def dataset_path(name: str, folder: Path) -> str:
    """What ``--dataset`` takes: the name where the real graph is at hand, else a made-up file."""
    root = os.environ.get("FASTCLUST_DATA")
    if root and (Path(root) / f"{name}.npz").is_file():
        return name
    path = scratch(folder).resolve() / f"{name}-like.npz"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}.npz")  # another process may want it, too
        made_up(name, part)
        part.replace(path)
    return str(path)


def scratch(out: Path) -> Path:
    """Where what is not a result goes: not to OUT, from which few files come back."""
    return Path(os.environ.get("FASTCLUST_BENCH_SCRATCH") or out)


def graph_name(name: str, folder: Path) -> str:
    """The name of a graph in a row: ``cora``, or ``cora-like`` where it is made up."""
    return Path(dataset_path(name, folder)).stem


def made_up(name: str, path: Path) -> None:
    """A graph in the shape of a named one: communities, power law of degrees, binary features."""
    n, entries, width, density, k, _ = SHAPES[name]
    adjacency = sibling("test_propagate").community_graph.__wrapped__(n, entries, k)
    rng = np.random.default_rng(1)
    labels = np.random.default_rng(0).integers(0, k, n)  # as community_graph draws them
    topics = rng.random((k, width)) ** 2
    topics *= density / topics.mean()
    features = rng.random((n, width)) < (0.5 * density + 0.5 * topics[labels])
    rows = np.concatenate([[0], np.cumsum(features.sum(1))])
    np.savez_compressed(
        path,
        adj_indptr=adjacency.indptr.astype(np.int64),
        adj_indices=adjacency.indices.astype(np.int32),
        x_indptr=rows.astype(np.int64),
        x_indices=np.nonzero(features)[1].astype(np.int32),
        x_data=np.ones(int(rows[-1]), np.float32),
        shape_x=np.array([n, width]),
        labels=labels.astype(np.int64),
    )


def sibling(name: str) -> ModuleType:
    """Another benchmark file as a module, for its peers and generators."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str, folder: Path) -> Any:
    """The graph as a :class:`fastclust.datasets.Dataset`."""
    from fastclust import load_dataset

    where = dataset_path(name, folder)
    return load_dataset(Path(where) if where.endswith(".npz") else where)


def randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    """Normal numbers, drawn on the device."""
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(seed))
