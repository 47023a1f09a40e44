"""The loss of all pairs over rows of several processes, gathered or on the half-ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclust import ops
from fastclust.ops import infonce

if TYPE_CHECKING:
    from fastclust.distributed.sharded import ShardedRanks

WINDOW_ROWS = 384  # kWindowRows of csrc/infonce/infonce.h

# --- the loss, gathered -------------------------------------------------------------------------


class GatherLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: ShardedRanks, z: Tensor, e: Tensor, alpha: Tensor,
        weights: ops.Hardness | None, code: int,
    ) -> Tensor:  # fmt: skip
        z, e = ranks.gather_views(z), ranks.gather_views(e)
        window, snapshot = ranks.window(), infonce._snapshot_arguments(weights)
        # row sums, then minus the mean of the positive pairs
        sums = z.new_zeros(len(z) + 1, dtype=torch.float64)
        if window is not None:
            share, row_sums = torch.ops.fastclust.hard_infonce(z, e, alpha, *snapshot, code, window)
            sums[:-1], sums[-1] = row_sums, share
        ranks.add_up(sums)
        ctx.save_for_backward(z, e, alpha, sums)
        ctx.ranks, ctx.window, ctx.snapshot, ctx.code = ranks, window, snapshot, code
        return (sums[:-1].log().mean() + sums[-1]).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, e, alpha, sums = ctx.saved_tensors
        need = list(ctx.needs_input_grad[1:4])
        if ctx.window is None:
            grads = [torch.zeros_like(x) for x in (z, e, alpha)]
        else:
            grads = torch.ops.fastclust.hard_infonce_backward(
                gradients[0].contiguous(), z, e, alpha, sums[:-1], *ctx.snapshot, ctx.code, *need,
                ctx.window,
            )  # fmt: skip
        own = [
            ctx.ranks.scatter_views(g) if used else None
            for g, used in zip(grads[:2], need[:2], strict=True)
        ]
        return None, *own, grads[2] if need[2] else None, None, None


def gather_range(ranks: ShardedRanks, z: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
    """[2] least and greatest similarity of all pairs of the gathered rows."""
    extremes = z.new_tensor([torch.inf, -torch.inf])
    window = ranks.window()
    if window is not None:
        extremes = torch.ops.fastclust.similarity_range(
            z, e, alpha, infonce.PRECISIONS["fp32"], window
        )
    return _widest(extremes)


def _widest(extremes: Tensor) -> Tensor:
    signed = extremes * extremes.new_tensor([-1.0, 1.0])
    dist.all_reduce(signed, dist.ReduceOp.MAX)
    return signed * extremes.new_tensor([-1.0, 1.0])


# --- the loss, on the half-ring -----------------------------------------------------------------


class _Exchange:
    """Tensors on their way to one rank and from another, until :meth:`wait`."""

    def __init__(
        self, to: int, source: int, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self.sent = [t.contiguous() for t in tensors]
        self.received = [t.new_empty(s) for t, s in zip(tensors, shapes, strict=True)]
        calls = [dist.P2POp(dist.isend, t, to) for t in self.sent if t.numel()]
        calls += [dist.P2POp(dist.irecv, t, source) for t in self.received if t.numel()]
        self.works = dist.batch_isend_irecv(calls)

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


class _Ring:
    """The blocks of rows that meet this rank's, and the pairs of blocks as small problems."""

    def __init__(self, ranks: ShardedRanks, weights: ops.Hardness | None) -> None:
        self.ranks, self.weights = ranks, weights
        self.n = ranks.count(ranks.rank)
        self.pad = -self.n % (WINDOW_ROWS // 2)  # zero nodes behind this rank's

    def block(self, *tensors: Tensor) -> list[Tensor]:
        """What a visitor brings: the given tensors [2n, ...] and its part of the snapshots."""
        old = () if self.weights is None else (*self.weights.z, *self.weights.e)
        return [*tensors, *old]

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """(step, rank, its block) of every visitor; the next is under way meanwhile."""
        me, size = self.ranks.rank, self.ranks.size
        if size < 2:
            return

        def post(step: int) -> _Exchange:
            source = (me + step) % size
            rows = 2 * self.ranks.count(source)
            shapes = [(rows, *t.shape[1:]) for t in block]
            return _Exchange((me - step) % size, source, block, shapes)

        under_way = post(1)
        for step in range(1, size // 2 + 1):
            visitor = under_way.wait()
            if step < size // 2:
                under_way = post(step + 1)
            yield step, (me + step) % size, visitor

    def send_home(self, step: int, tensors: list[Tensor]) -> list[Tensor]:
        """Give the visitor of a step what is its own, and get what is this rank's: [2n, ...]."""
        me, size = self.ranks.rank, self.ranks.size
        shapes = [(2 * self.n, *t.shape[1:]) for t in tensors]
        return _Exchange((me + step) % size, (me - step) % size, tensors, shapes).wait()

    def stack(self, own: Tensor, visitor: Tensor, fill: str = "zeros") -> Tensor:
        """Views [2n, d] and [2b, d] as those of one problem of n + pad + b nodes."""
        parts = []
        for first, second in zip(own.chunk(2), visitor.chunk(2), strict=True):
            pad = first.new_zeros(self.pad, *first.shape[1:])
            if fill == "repeat":  # widens no range
                pad += first[-1]
            elif fill == "ones":
                pad += 1.0
            parts += [first, pad, second]
        return torch.cat(parts)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`stack`."""
        own, visitor = zip(
            *((v[: self.n], v[self.n + self.pad :]) for v in x.chunk(2)), strict=True
        )
        return torch.cat(own), torch.cat(visitor)

    def _order(self, rank: int) -> Tensor:
        """int32 [n]: a rank's nodes as its rows are taken, by descending membership."""
        assert self.weights is not None
        bounds = self.ranks.bounds
        return infonce._descending(self.weights.membership[bounds[rank] : bounds[rank + 1]])

    def snapshot(self, own: list[Tensor], visitor: tuple[int, list[Tensor]] | None = None) -> Any:
        """The weight arguments of the operators, for this block alone or stacked with another."""
        w = self.weights
        if w is None:
            return infonce._snapshot_arguments(None)
        ranks, count = self.ranks, len(w.z)
        nodes = [slice(ranks.bounds[ranks.rank], ranks.bounds[ranks.rank + 1])]
        orders, old, pad = [self._order(ranks.rank)], own[-2 * count :], 0
        if visitor is not None:
            peer, tensors = visitor
            pad = self.pad
            nodes.append(slice(ranks.bounds[peer], ranks.bounds[peer + 1]))
            absent = torch.arange(self.n, self.n + pad, dtype=torch.int32, device=w.order.device)
            orders += [absent, self._order(peer) + self.n + pad]
            pairs = zip(old, tensors[-2 * count :], strict=True)
            old = [self.stack(a, b) for a, b in pairs]

        def of_pair(x: Tensor) -> Tensor:  # [..., N] -> [..., n + pad + b]
            parts = [x[..., part] for part in nodes]
            parts.insert(1, x.new_zeros(*x.shape[:-1], pad))
            return torch.cat(parts, dim=-1)

        return (
            old[:count], old[count:], w.alpha, w.range, of_pair(w.labels), of_pair(w.membership),
            torch.cat(orders), w.beta,
        )  # fmt: skip

    def whole_window(self) -> list[int]:
        """The triangle of this rank's own block."""
        return [0, 2 * self.n, 0]

    def window(self, step: int, peer: int) -> list[int] | None:
        """Of a pair, the tiles that this rank computes; None where the other one does all."""
        first = 2 * (self.n + self.pad)
        if 2 * step < self.ranks.size:
            return [0, first, first]
        # The two meet twice: one takes some rows of the lower rank's block, the other the rest.
        low = min(self.ranks.rank, peer)
        rows = self.ranks.count(low) // WINDOW_ROWS * WINDOW_ROWS  # half of twice the count
        if self.ranks.rank == low:
            return [0, rows, first] if rows else None
        column = first + rows
        return [0, first, column] if column < first + 2 * self.ranks.count(peer) else None

    def without_pad(self, window: list[int], peer: int, sums: Tensor) -> Tensor:
        """Row sums [2b] of the visitor, less the exp(0) of every zero row."""
        first = 2 * (self.n + self.pad)
        if self.pad == 0 or window[1] < first:
            return sums
        skipped = (window[2] - first) // 2  # nodes of the visitor that the window leaves out
        views = sums.view(2, -1)
        if skipped == 0:
            views -= 2 * self.pad
        elif self.weights is None:
            views[:, skipped:] -= 2 * self.pad
        else:
            views[:, self._order(peer)[skipped:].long()] -= 2 * self.pad
        return sums


class RingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: ShardedRanks, z: Tensor, e: Tensor, alpha: Tensor,
        weights: ops.Hardness | None, code: int,
    ) -> Tensor:  # fmt: skip
        ring = _Ring(ranks, weights)
        block = ring.block(z, e)
        infonce_op = torch.ops.fastclust.hard_infonce
        share, sums = infonce_op(z, e, alpha, *ring.snapshot(block), code, ring.whole_window())
        for step, peer, visitor in ring.visits(block):
            window = ring.window(step, peer)
            theirs = sums.new_zeros(2 * ranks.count(peer))
            if window is not None:
                _, both = infonce_op(
                    ring.stack(z, visitor[0]), ring.stack(e, visitor[1]), alpha,
                    *ring.snapshot(block, (peer, visitor)), code, window,
                )  # fmt: skip
                mine, theirs = ring.split(both)
                sums += mine
                theirs = ring.without_pad(window, peer, theirs)
            sums += ring.send_home(step, [theirs])[0]
        ctx.save_for_backward(z, e, alpha, sums)
        ctx.ranks, ctx.weights, ctx.code = ranks, weights, code
        # share is the mean over this rank's rows
        total = (sums.log().sum() + share.double() * len(z)) / (2 * ranks.n_nodes)
        return ranks.add_up(total).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, e, alpha, sums = ctx.saved_tensors
        ranks: ShardedRanks = ctx.ranks
        need = list(ctx.needs_input_grad[1:4])
        ring = _Ring(ranks, ctx.weights)
        block = ring.block(z, e, sums)

        def run(snapshot: Any, window: list[int], *tensors: Tensor) -> list[Tensor]:
            # An operator takes its own rows for all of them.
            scale = len(tensors[0]) / (2 * ranks.n_nodes)
            z, e, sums = tensors
            return list(
                torch.ops.fastclust.hard_infonce_backward(
                    gradients[0] * scale, z, e, alpha, sums, *snapshot, ctx.code, *need, window
                )
            )

        total = run(ring.snapshot(block), ring.whole_window(), z, e, sums)
        for step, peer, visitor in ring.visits(block):
            window = ring.window(step, peer)
            theirs = [
                torch.zeros_like(v) if used else v.new_empty(0)
                for v, used in zip(visitor[:2], need, strict=False)
            ]
            if window is not None:
                both = run(
                    ring.snapshot(block, (peer, visitor)), window, ring.stack(z, visitor[0]),
                    ring.stack(e, visitor[1]), ring.stack(sums, visitor[2], "ones"),
                )  # fmt: skip
                for i in range(2):
                    if need[i]:
                        mine, theirs[i] = ring.split(both[i])
                        total[i] += mine
                if need[2]:
                    total[2] += both[2]
            kept = [i for i in range(2) if need[i]]
            home = ring.send_home(step, [theirs[i] for i in kept]) if kept else []
            for i, returned in zip(kept, home, strict=True):
                total[i] += returned
        wanted = (t if used else None for t, used in zip(total, need, strict=True))
        return None, *wanted, None, None


def ring_range(ranks: ShardedRanks, z: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
    """[2] least and greatest similarity of all pairs of rows."""
    ring = _Ring(ranks, None)
    code = infonce.PRECISIONS["fp32"]
    similarity_range = torch.ops.fastclust.similarity_range
    extremes = [similarity_range(z, e, alpha, code, ring.whole_window())]
    for step, peer, visitor in ring.visits([z, e]):
        window = ring.window(step, peer)
        if window is not None:
            stacked = (ring.stack(a, b, "repeat") for a, b in zip((z, e), visitor, strict=True))
            extremes.append(similarity_range(*stacked, alpha, code, window))
    low, high = torch.stack(extremes).unbind(1)
    return _widest(torch.stack([low.min(), high.max()]))
