"""The constant inputs of ECN-MF's two views, and how they are multiplied.

Abar X of a dense constant X is taken once; a sparse X is multiplied first and propagated after; the
low-rank view is (Abar L)(R W) with X_r = L R, which never forms X_r. Without an activation a view
is linear in its constant input, so all layers of it become one product with the powers of Abar
times that input, where this takes fewer operations (:class:`LinearView`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclust import ops
from fastclust.distributed import ONE, Ranks
from fastclust.graph import Graph
from fastclust.interop import without_autocast

__all__ = [
    "DenseInput",
    "LinearView",
    "SparseInput",
    "SparseProduct",
    "empty_like",
    "second_view",
]


def empty_like(x: Tensor, *shape: int) -> Tensor:
    """Memory of the dtype and on the device of x; on the CPU on large pages where there are any.

    numpy asks the kernel for them, torch does not: matrix products wait less for page tables.
    """
    if x.device.type != "cpu":
        return x.new_empty(shape)
    return torch.from_numpy(np.empty(shape, x.numpy().dtype))


class SparseProduct(torch.autograd.Function):
    """x w for a constant sparse CSR x [N, D]; its transpose is kept for the gradient."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, x_transposed: Tensor, w: Tensor) -> Tensor:
        ctx.x_transposed = x_transposed
        return x @ w

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.x_transposed @ gradients[0]


class DenseInput:
    """Abar X_v W with the constant Abar L taken once, X_v = L R (no R: X_v = L)."""

    def __init__(self, graph: Graph, left: Tensor, right: Tensor | None = None) -> None:
        self.left = ops.propagate(graph, left)  # [N, R]
        self.right = right  # [R, D]
        self.n_features = (left if right is None else right).shape[1]

    def share(self, ranks: Ranks) -> None:
        """Keep the rows of one rank."""
        self.left = ranks.rows(self.left)

    def __call__(self, w: Tensor, precision: str) -> Tensor:
        if self.right is not None:
            w = ops.matmul(self.right, w)
        return ops.matmul(self.left, w, precision=precision)


class SparseInput:
    """Abar (X W) for a sparse CSR X [N, D]: Abar X would have many more entries than X."""

    def __init__(self, graph: Graph, x: Tensor) -> None:
        self.n_features = x.shape[1]
        self.graph, self.x = graph, x
        self.share(ONE)

    def share(self, ranks: Ranks) -> None:
        """Keep the rows of one rank."""
        self.propagate, self.graph, self.x = (
            ranks.propagate,
            ranks.graph(self.graph),
            ranks.rows(self.x),
        )
        self.x_transposed = self.x.t().to_sparse_csr()  # [D, N]

    def __call__(self, w: Tensor, precision: str) -> Tensor:
        return self.propagate(self.graph, SparseProduct.apply(self.x, self.x_transposed, w))


def second_view(graph: Graph, x: ops.LowRankMatrix) -> DenseInput:
    """X_r in factors, or dense where these are no smaller or every batch has its own mean."""
    n, n_features = x.shape
    rank = x.right.shape[0]
    batch_means = x.add_mean and x.mean is not None and x.mean.dim() == 2
    if batch_means or rank * (n + n_features) >= n * n_features:
        return DenseInput(graph, x.to_dense())
    return DenseInput(graph, *x.factors())


class LinearView:
    """All layers of a view without activation, as one product with a constant.

    With Y = [Abar L | 1] the first layer is Z = Y C, C = [R W; b], and Abar (Z W + b) + Z of a
    later one keeps the form Z = sum_k Abar^k Y C_k: C_k becomes C_{k-1} W + C_k, and b is added to
    the last row of C_1. So Z is [Abar^{L-1} Y | ... | Y] times the stacked C_k.
    """

    def __init__(self, graph: Graph, first: DenseInput, n_layers: int) -> None:
        self.right, self.n_features, self.n_layers = first.right, first.n_features, n_layers
        n, rank = first.left.shape
        self.basis = empty_like(first.left, n, n_layers * (rank + 1))
        blocks = self.basis.split(rank + 1, dim=1)
        blocks[-1][:, :-1], blocks[-1][:, -1] = first.left, 1.0
        for k in range(n_layers - 2, -1, -1):
            blocks[k].copy_(ops.propagate(graph, blocks[k + 1]))

    def share(self, ranks: Ranks) -> None:
        """Keep the rows of one rank."""
        self.basis = ranks.rows(self.basis)

    @staticmethod
    def pays(graph: Graph, first: DenseInput, n_layers: int, width: int) -> bool:
        """Whether an epoch has fewer operations than with a propagation in every later layer."""
        n, rank = first.left.shape
        later = n_layers - 1
        one_product = 4 * n * later * rank + 3 * later * n_layers * rank * width
        # Forward, both gradients; an edge costs a propagation as much as 12 multiply-adds.
        layer_by_layer = later * (6 * n * width + 2 * 2 * 12 * graph.n_edges)
        return later > 0 and one_product < layer_by_layer

    def __call__(
        self, weights: list[Tensor], biases: list[Tensor], out: Tensor | None, precision: str
    ) -> Tensor:
        return _BasisProduct.apply(self.basis, self._coefficients(weights, biases), out, precision)

    def rows(
        self, nodes: Tensor, weights: list[Tensor], biases: list[Tensor], precision: str
    ) -> Tensor:
        """Some rows of the view [B, d]."""
        coefficients = self._coefficients(weights, biases)
        return _BasisProduct.apply(self.basis[nodes], coefficients, None, precision)

    def _coefficients(self, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """The stacked C_k [L (R + 1), d]."""
        first = weights[0] if self.right is None else ops.matmul(self.right, weights[0])
        coefficients = [torch.cat([first, biases[0][None]])]  # C_0, C_1, ...: [R + 1, d]
        for w, b in zip(weights[1:], biases[1:], strict=True):
            moved = [ops.matmul(c, w) for c in coefficients]
            moved[0] = torch.cat([moved[0][:-1], moved[0][-1:] + b])
            kept = [*coefficients[1:], None]
            higher = [m if c is None else m + c for m, c in zip(moved, kept, strict=True)]
            coefficients = [coefficients[0], *higher]
        return torch.cat(coefficients[::-1])


class _BasisProduct(torch.autograd.Function):
    """basis [N, R] c [R, d] for a constant basis, written to ``out`` [N, d] if there is one."""

    @staticmethod
    def forward(ctx: Any, basis: Tensor, c: Tensor, out: Tensor | None, precision: str) -> Tensor:
        ctx.basis, ctx.precision = basis, precision
        product = ops.matmul(basis, c, out=out, precision=precision)
        return product if out is None else out.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        gradient = ops.matmul(ctx.basis.t(), gradients[0], precision=ctx.precision)
        return None, gradient, None, None
