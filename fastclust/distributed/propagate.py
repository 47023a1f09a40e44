"""Propagation over rows of several processes: each receives the rows that its edges touch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclust.graph import HUB_EDGES, Graph, _chunk_tables

if TYPE_CHECKING:
    from fastclust.distributed.sharded import ShardedRanks


class GraphRows:
    """The rows of a graph that belong to this rank, and which rows of others they touch.

    Columns are numbered anew: this rank's nodes first, then the nodes of others by rank, which
    :meth:`apply` receives from them (the halo).
    """

    def __init__(self, graph: Graph, ranks: ShardedRanks) -> None:
        begin, end = ranks.bounds[ranks.rank : ranks.rank + 2]
        indptr = graph.indptr.cpu()
        own = indptr[begin : end + 1] - indptr[begin]
        edges = slice(int(indptr[begin]), int(indptr[end]))
        nodes, neighbours = torch.arange(begin, end), graph.indices[edges].cpu().long()
        row = torch.repeat_interleave(nodes, own.diff())
        bounds = torch.tensor(ranks.bounds)
        owner = torch.bucketize(neighbours, bounds, right=True) - 1
        away = owner != ranks.rank
        # A is symmetric: who is touched by a row of this rank touches it.
        halo, owners = torch.unique(torch.stack([neighbours, owner])[:, away], dim=1)
        takers, touched = torch.unique(torch.stack([owner, row])[:, away], dim=1)
        self.receive = torch.bincount(owners, minlength=ranks.size).tolist()
        self.send = torch.bincount(takers, minlength=ranks.size).tolist()
        device = graph.device
        self.sent_rows = (touched - begin).to(device)

        position = torch.full((graph.n_nodes,), -1)
        position[nodes] = nodes - begin
        position[halo] = torch.arange(len(halo)) + (end - begin)
        nodes = torch.cat([nodes, halo])  # of the columns
        self.indptr = own.to(device)
        self.indices = position[neighbours].to(torch.int32).to(device)
        self.values = None if graph.values is None else graph.values[edges].clone()
        # The transpose, for gradients, has the scales swapped.
        self.row_scales = [_pick(s, nodes) for s in (graph.row_scale, graph._row_scale64)]
        self.col_scales = [_pick(s, nodes) for s in (graph.col_scale, graph._col_scale64)]
        self.self_loops = graph.self_loops
        tables = _chunk_tables(own.numpy(), HUB_EDGES.get(device.type, HUB_EDGES["cpu"]))
        self.tables = [
            t.to(device) if isinstance(t, Tensor) else t
            for t in (tables[k] for k in ("_task_rows", "_segments", "_hubs", "_hub_edges"))
        ]

    def apply(
        self, h: Tensor, residual: Tensor | None = None, relu: bool = False, *, swap: bool = False
    ) -> Tensor:
        """act(Abar h + residual) of this rank's rows [n, d]; ``swap``: Abar^T h."""
        n, width = h.shape
        extended = h.new_empty((n + sum(self.receive), width))
        extended[:n] = h
        dist.all_to_all_single(
            extended[n:], h.index_select(0, self.sent_rows), self.receive, self.send
        )
        which = int(h.dtype == torch.float64)
        rows, columns = self.row_scales[which], self.col_scales[which]
        if swap:
            rows, columns = columns, rows
        out, _mask = torch.ops.fastclust.propagate(
            self.indptr, self.indices, self.values, None if rows is None else rows[:n], columns,
            self.self_loops, *self.tables, extended, residual, False, relu, False,
        )  # fmt: skip
        return out


def _pick(scale: Tensor | None, nodes: Tensor) -> Tensor | None:
    return None if scale is None else scale[nodes.to(scale.device)]


class Propagate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graph: GraphRows, h: Tensor, residual: Tensor | None, relu: bool
    ) -> Tensor:
        out = graph.apply(h, residual, relu)
        ctx.graph = graph
        ctx.save_for_backward(out > 0 if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        (positive,) = ctx.saved_tensors
        g = gradients[0] if positive is None else gradients[0] * positive
        return None, ctx.graph.apply(g, swap=True), g if ctx.needs_input_grad[2] else None, None
