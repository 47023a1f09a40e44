"""The operators: one module per kernel, on CPU and CUDA tensors, differentiable."""

from fastclust.ops.infonce import (
    Hardness,
    StoredHardness,
    dense_weights,
    hard_infonce,
    hardness,
)
from fastclust.ops.kmeans import KMeansResult, kmeans
from fastclust.ops.lowrank import LowRank, LowRankMatrix, batched_svd, low_rank
from fastclust.ops.matmul import matmul
from fastclust.ops.propagate import propagate

__all__ = [
    "Hardness",
    "KMeansResult",
    "LowRank",
    "LowRankMatrix",
    "StoredHardness",
    "batched_svd",
    "dense_weights",
    "hard_infonce",
    "hardness",
    "kmeans",
    "low_rank",
    "matmul",
    "propagate",
]
