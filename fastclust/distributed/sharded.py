"""Several processes that share the nodes of a graph by rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclust import ops
from fastclust.distributed.infonce import (
    WINDOW_ROWS,
    GatherLoss,
    RingLoss,
    gather_range,
    ring_range,
)
from fastclust.distributed.kmeans import kmeans
from fastclust.distributed.propagate import GraphRows, Propagate
from fastclust.distributed.ranks import LaunchError, RankLostError, Ranks, T
from fastclust.graph import Graph
from fastclust.ops import infonce

GATHER_UP_TO = 4  # ranks

# torch 2.13 has new names for these.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ShardedRanks(Ranks):
    """The processes of the default group, sharing N nodes by rows.

    Parameters
    ----------
    n_nodes : int
        N.
    ring : bool, optional
        Compute the loss on the half-ring; by default where there are more than four ranks.
    """

    def __init__(self, n_nodes: int, ring: bool | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.n_nodes = n_nodes
        self.bounds = [n_nodes * r // self.size for r in range(self.size + 1)]
        self.ring = self.size > GATHER_UP_TO if ring is None else ring
        self._of_all: BaseException | None = None  # the last exception that all ranks met

    def count(self, rank: int) -> int:
        """Nodes of a rank."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def rows(self, x: Tensor) -> Tensor:
        begin, end = self.bounds[self.rank : self.rank + 2]
        if x.layout != torch.sparse_csr:
            return x[begin:end].clone()
        indptr = x.crow_indices()
        entries = slice(int(indptr[begin]), int(indptr[end]))
        return torch.sparse_csr_tensor(
            indptr[begin : end + 1] - indptr[begin], x.col_indices()[entries].clone(),
            x.values()[entries].clone(), size=(end - begin, x.shape[1]), check_invariants=False,
        )  # fmt: skip

    def n_rows(self, own: int) -> int:
        return self.n_nodes

    def own_nodes(self, nodes: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        begin, end = self.bounds[self.rank : self.rank + 2]
        mine = (nodes >= begin) & (nodes < end)
        return nodes[mine] - begin, *(x[mine] for x in values)

    def gather(self, x: Tensor) -> Tensor:
        x = x.detach()
        most = max(map(self.count, range(self.size)))
        if most * self.size == self.n_nodes:
            return self.from_each(x).flatten(0, 1)
        padded = x.new_empty((most, *x.shape[1:]))
        padded[: len(x)] = x
        parts = enumerate(self.from_each(padded))
        return torch.cat([part[: self.count(r)] for r, part in parts])

    def from_each(self, x: Tensor) -> Tensor:
        """The x [n, ...] of every rank, of one shape on all, [R, n, ...]; outside autograd."""
        parts = x.new_empty((self.size * len(x), *x.shape[1:]))
        _all_gather(parts, x.contiguous())
        return parts.unflatten(0, (self.size, len(x)))

    def gather_views(self, x: Tensor) -> Tensor:
        """Of this rank's views [2n, d] those of all nodes, [2N, d]."""
        return torch.cat([self.gather(view) for view in x.chunk(2)])

    def scatter_views(self, x: Tensor) -> Tensor:
        """Sum of x [2N, d] over the ranks, the views [2n, d] of this rank's nodes."""
        most = max(map(self.count, range(self.size)))
        parts = x.new_zeros((self.size, 2, most, x.shape[1]))
        for r in range(self.size):
            for view, part in zip(x.chunk(2), parts[r], strict=True):
                part[: self.count(r)] = view[self.bounds[r] : self.bounds[r + 1]]
        own = torch.empty_like(parts[0])
        _reduce_scatter(own, parts.flatten(0, 1))
        return own[:, : self.count(self.rank)].reshape(-1, x.shape[1])

    def add_up(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; outside autograd."""
        dist.all_reduce(x)
        return x

    def total(self, x: Tensor) -> Tensor:
        return _Total.apply(x, self)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        # The backward pass reaches them in the same order on every rank: their graphs are alike.
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(lambda g: self.add_up(g.clone()))

    def graph(self, graph: Graph) -> GraphRows:
        return GraphRows(graph, self)

    def propagate(
        self, graph: Any, h: Tensor, *, residual: Tensor | None = None, activation: Any = "none"
    ) -> Tensor:
        return Propagate.apply(graph, h, residual, activation == "relu")

    def most(self, *values: int) -> tuple[int, ...]:
        numbers = torch.tensor(values)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return tuple(numbers.tolist())

    def from_first(self, make: Callable[[], T]) -> T:
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            self._of_all = outcome[1]
            raise outcome[1]
        return outcome[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.most(self.rank + 1)
            self._of_all = error
            raise
        (failed,) = self.most(0)
        if failed:
            self._of_all = RankLostError(
                f"rank {self.rank} of {self.size}: rank {failed - 1} failed after an epoch"
            )
            raise self._of_all

    def all_raised(self, error: BaseException) -> bool:
        return error is self._of_all

    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kinds = self.from_first(lambda: {k: (v.shape, v.dtype) for k, v in tensors.items()})
        for name, (shape, dtype) in kinds.items():
            value = tensors[name] if self.rank == 0 else torch.empty(shape, dtype=dtype)
            dist.broadcast(value.view(torch.uint8) if value.dim() else value, src=0)
            tensors[name] = value
        return tensors

    def check_same(self, facts: Mapping[str, Any]) -> None:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, dict(facts))
        for rank, theirs in enumerate(everyone):
            for key, value in everyone[0].items():
                if theirs.get(key) != value:
                    raise LaunchError(
                        f"every process must be started with the same data and settings, but "
                        f"{key} is {value!r:.80} on rank 0 and {theirs.get(key)!r:.80} on rank "
                        f"{rank}"
                    )

    # --- the loss -------------------------------------------------------------------------------

    def hard_infonce(self, z: Tensor, e: Tensor | None, alpha: Tensor, **keywords: Any) -> Tensor:
        weights, precision = keywords.get("weights"), keywords.get("precision")
        z, e, alpha = infonce._check_views(z, e, alpha)
        code = infonce._precision_code(precision, z.dtype)
        loss = RingLoss if self.ring else GatherLoss
        return loss.apply(self, z, e, alpha, weights, code)

    @torch.no_grad()
    def hardness(self, z: Tensor, e: Tensor | None, *args: Any, **keywords: Any) -> ops.Hardness:
        alpha = args[0]
        z, e, alpha = infonce._check_views(z, e, alpha)
        previous = keywords.pop("previous", None)
        if keywords.pop("storage", "snapshots") != "snapshots":
            raise ValueError("storage must be 'snapshots' on several ranks")
        if not self.ring:
            z, e = self.gather_views(z), self.gather_views(e)
        range_ = ring_range(self, z, e, alpha) if self.ring else gather_range(self, z, e, alpha)
        labels, confident, beta = args[1:]
        return infonce._refreshed(z, e, alpha, range_, labels, confident, beta, previous)

    def whole_weights(self, weights: ops.Hardness) -> ops.Hardness:
        return weights.with_views(self.gather_views) if self.ring else weights

    def own_weights(self, weights: ops.Hardness) -> ops.Hardness:
        def own(x: Tensor) -> Tensor:
            return torch.cat([self.rows(view) for view in x.chunk(2)])

        return weights.with_views(own) if self.ring else weights

    def window(self) -> list[int] | None:
        """This rank's band of the triangle: row_begin, row_end, column_begin; None: empty.

        Bands have equal areas, up to a row of tiles.
        """
        rows = 2 * self.n_nodes
        units = -(-rows // WINDOW_ROWS)

        def bound(r: int) -> int:
            # Rows above row u of a triangle of n hold the share 1 - (1 - u / n)^2 of it.
            return round(units * (1.0 - (1.0 - r / self.size) ** 0.5))

        begin = bound(self.rank) * WINDOW_ROWS
        end = min(bound(self.rank + 1) * WINDOW_ROWS, rows)
        return [begin, end, begin] if begin < end else None

    # --- k-means --------------------------------------------------------------------------------

    @torch.no_grad()
    def kmeans(self, x: Tensor, n_clusters: int, **keywords: Any) -> ops.KMeansResult:
        return kmeans(self, x, n_clusters, **keywords)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ShardedRanks) -> Tensor:
        return ranks.add_up(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
