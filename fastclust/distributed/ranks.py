"""What a model asks of the processes that share it, and the answers of one process alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from fastclust import ops
from fastclust.graph import Graph
from fastclust.ops.propagate import propagate_any

T = TypeVar("T")


class LaunchError(ValueError):
    """The processes were not started in a way that can work."""


class RankLostError(RuntimeError):
    """Another process of the run failed, died or no longer answers."""


class Ranks:
    """What a model asks of the processes that share it. This one is the only process."""

    rank = 0
    size = 1

    def rows(self, x: Tensor) -> Tensor:
        """Of x [N, ...] the rows of this rank's nodes, [n, ...]."""
        return x

    def n_rows(self, own: int) -> int:
        """Rows of all ranks, where this one has ``own``."""
        return own

    def own_nodes(self, nodes: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Of nodes, numbered in the whole graph, those of this rank by row, and their values."""
        return nodes, *values

    def gather(self, x: Tensor) -> Tensor:
        """Of this rank's x [n, ...] the rows of all, [N, ...]; outside autograd."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over the ranks; its gradient is that of each rank's own term."""
        return x

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """From now on gradients of these parameters, held by all ranks, are sums over ranks."""

    def graph(self, graph: Graph) -> Any:
        """The rows of a graph that :meth:`propagate` needs here."""
        return graph

    def propagate(
        self, graph: Any, h: Tensor, *, residual: Tensor | None = None, activation: Any = "none"
    ) -> Tensor:
        """:func:`fastclust.ops.propagate`, of rows [n, d] to rows [n, d]."""
        return propagate_any(graph, h, residual=residual, activation=activation)

    def hard_infonce(self, z: Tensor, e: Tensor | None, alpha: Tensor, **keywords: Any) -> Tensor:
        """:func:`fastclust.ops.hard_infonce` of the two views [2n, d] of this rank's nodes."""
        return ops.hard_infonce(z, e, alpha, **keywords)

    def hardness(
        self, z: Tensor, e: Tensor | None, *args: Any, **keywords: Any
    ) -> ops.Hardness | ops.StoredHardness:
        """:func:`fastclust.ops.hardness` of this rank's views; labels and confident of all N.

        Several ranks hold snapshots only.
        """
        return ops.hardness(z, e, *args, **keywords)

    def kmeans(self, x: Tensor, n_clusters: int, **keywords: Any) -> ops.KMeansResult:
        """:func:`fastclust.ops.kmeans` of the rows x [n, d], with labels int64 [n]."""
        return ops.kmeans(x, n_clusters, **keywords)

    def whole_weights(self, weights: ops.Hardness) -> ops.Hardness:
        """Weights with the snapshots of all rows."""
        return weights

    def own_weights(self, weights: ops.Hardness) -> ops.Hardness:
        """The inverse of :meth:`whole_weights`."""
        return weights

    def most(self, *values: int) -> tuple[int, ...]:
        """The greatest of each value over the ranks."""
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank; its exception too."""
        return make()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An exception in the body on one rank is one on all, after the body."""
        yield

    def all_raised(self, error: BaseException) -> bool:
        """Whether all ranks met this exception at the same place, so that they can still talk."""
        return True

    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The CPU tensors of rank 0, on every rank."""
        return tensors

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Check that all ranks hold the same facts.

        Raises
        ------
        LaunchError
            They do not.
        """


ONE = Ranks()
