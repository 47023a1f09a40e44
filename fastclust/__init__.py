"""fastclust: clustering of attributed graphs with fused CPU and CUDA kernels."""

from fastclust import _command, interop, metrics, nn, ops, plot  # noqa: F401
from fastclust._version import __version__
from fastclust.datasets import load_dataset, load_npz
from fastclust.estimators import ECNMF, HSAN, SSGC
from fastclust.graph import Graph
from fastclust.synthetic import make_attributed_sbm

__all__ = [
    "ECNMF",
    "HSAN",
    "SSGC",
    "Graph",
    "__version__",
    "interop",
    "load_dataset",
    "load_npz",
    "make_attributed_sbm",
    "metrics",
    "nn",
    "ops",
    "plot",
]
