"""Leading singular vectors: of a matrix, and of one that comes in blocks of rows."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

from fastclust import ops
from fastclust.models.inputs import SAMPLE_ROWS, sample_rows

__all__ = ["gram_matrix", "leading_bases", "leading_directions"]


def leading_directions(z: torch.Tensor, count: int, *, seed: int = 0) -> torch.Tensor:
    """The ``count`` leading right singular vectors of z [N, d], as columns [d, count].

    Fewer where z has fewer rows or columns; of more than 65536 rows those of a sample.
    """
    rows = z
    if z.shape[0] > SAMPLE_ROWS:
        rows = z[sample_rows(z.shape[0], SAMPLE_ROWS, seed).to(z.device)]
    svd = ops.batched_svd(rows, min(count, *rows.shape), center=False, seed=seed)
    return svd.vh[0].t().contiguous()


def gram_matrix(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """M^T M [c, c] in float64, on the CPU, from blocks of rows of M [N, c]."""
    wide = (block.to(torch.float64) for block in blocks)
    return functools.reduce(torch.Tensor.add_, (m.T @ m for m in wide)).cpu()


def leading_bases(gram: torch.Tensor, scales: list[torch.Tensor], width: int) -> torch.Tensor:
    """For each scaling: B [c, width] with M B = U s, the leading triplets of M diag(scale).

    By eigenvectors of the one small Gram matrix M^T M [c, c] in float64. Returns
    [len(scales), c, width]. LAPACK gets one thread: its last bits depend on their number, and where
    two clusterings are as good (digits) the consensus takes one or the other by them.
    """
    products = gram.numpy()
    n_columns = len(products)
    first = max(0, n_columns - width)
    bases = []
    for scale in scales:
        c = scale.cpu().numpy()
        with threadpool_limits(limits=1, user_api="blas"):
            _, vectors = eigh(c[:, None] * products * c, subset_by_index=(first, n_columns - 1))
        basis = c[:, None] * vectors[:, ::-1]  # [c, width]
        largest = np.abs(basis).argmax(axis=0)
        bases.append(basis * np.sign(basis[largest, np.arange(basis.shape[1])]))
    return torch.from_numpy(np.stack(bases))
