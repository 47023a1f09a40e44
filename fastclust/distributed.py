"""Training by several processes of ``torchrun``, nodes shared out by rows: torch.distributed only.

Rank r of R holds the rows of nodes floor(r N / R) to floor((r + 1) N / R), both views of them, in
every array with a row per node: attributes, embeddings, structure encoders, their gradients and
moments. Other parameters are copies, and their gradients are summed as they come up. Models
call a :class:`Ranks` for whatever looks across rows; on one process it hands on to
:mod:`fastclust.ops`, to the bit what it was, under ``torchrun`` it is a :class:`ShardedRanks`.

The loss, all pairs of M = 2N rows of width D = dz + de, is the one step that is not linear in N.
Its operators take a window of tiles of the symmetric M x M matrix (``csrc/infonce/infonce.h``), and
both variants cover the triangle once, so each rank does 4 M^2 D / R flop (D / R more per
pass where weights come from a snapshot), and forward and backward agree on who does what:

- *gather* (R <= 4): every rank gathers all rows and takes a band of the triangle's rows of equal
  area; row sums are all-reduced, gradients reduce-scattered. A rank receives M D (R - 1) / R
  elements forward and as many backward (over gloo twice as many), and holds 5 M D of them (rows,
  packed twice, gradients twice), with a snapshot 7 M D.
- *half-ring* (R > 4): at step s <= R / 2, rank r has the block of rank r + s and computes the pair
  of blocks, for both; the row sums and gradients of the visitor travel back. With R even the last
  step meets every pair twice and each side does one half. A rank receives M D / 2 elements forward,
  M D backward (blocks again, and gradients), half as much more per pass for a snapshot, but holds
  about 13 M D / R, with a snapshot 19. The next block travels while a pair is computed.

Blocks of a pair are stacked as one small problem, the first padded with zero nodes to whole tiles:
such a row adds exp(0) = 1 to every row sum, which is taken off again, and nothing to a gradient. A
mask inside the kernels would have cost every call a comparison per entry.

Sums over ranks go the same way at every call, so a run repeats to the bit on the same number of
ranks; on another number the order of sums differs, and results agree to rounding.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastclust import ops
from fastclust.graph import HUB_EDGES, Graph, _chunk_tables
from fastclust.ops import infonce
from fastclust.ops.kmeans import (
    _MAX_FINAL_REPAIRS,
    _METHODS,
    _PAPER_CODE_ITERATIONS,
    _PAPER_CODE_TOLERANCE,
)

__all__ = [
    "ONE",
    "LaunchError",
    "RankLostError",
    "Ranks",
    "ShardedRanks",
    "current",
    "join",
    "session",
]

T = TypeVar("T")

WINDOW_ROWS = 384  # kWindowRows of csrc/infonce/infonce.h
GATHER_UP_TO = 4  # ranks
# k-means is started on at most this many rows, spread evenly; below it, as on one process.
START_ROWS = 1 << 16

# torch 2.13 has new names for these.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

TIMEOUT_VARIABLE = "FASTCLUST_TIMEOUT"
DEFAULT_TIMEOUT = 600.0  # seconds


class LaunchError(ValueError):
    """The processes were not started in a way that can work."""


class RankLostError(RuntimeError):
    """Another process of the run died or no longer answers."""


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
        return ops.propagate(graph, h, residual=residual, activation=activation)

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


# --- starting and ending ------------------------------------------------------------------------

_active = False


def launched() -> bool:
    """Whether a launcher such as ``torchrun`` has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def session() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; one process alone joins nothing.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. CPU tensors go by gloo, CUDA
    tensors by NCCL, each process on the GPU of its LOCAL_RANK. A collective that waits longer than
    ``$FASTCLUST_TIMEOUT`` seconds (default 600) fails.

    Raises
    ------
    LaunchError
        Variables are missing or wrong, there are fewer GPUs than processes on this machine, or the
        others do not appear.
    RankLostError
        Out of the body: another process has gone.
    """
    global _active
    if not launched():
        yield ONE
        return
    size, rank, local = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LaunchError(
                f"WORLD_SIZE is {size}, but {name} is not set: start with torchrun "
                f"--nproc-per-node={size} -m fastclust.train ..., or unset WORLD_SIZE"
            )
    if not 0 <= rank < size:
        raise LaunchError(f"RANK must be from 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}")
    backend = "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise LaunchError(
                f"each process needs a GPU of its own: LOCAL_RANK is {local}, but this machine has "
                f"{torch.cuda.device_count()}; lower --nproc-per-node, or hide the GPUs with "
                f"CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=_timeout())
    try:
        join(backend, timeout)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank} of {size} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({_first_line(error)})"
        ) from None
    _active = True
    try:
        yield ShardedRanks(size)
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        raise RankLostError(
            f"rank {rank} of {size}: another process of this run has died or not answered for "
            f"{timeout.total_seconds():g} s ({_first_line(error)})"
        ) from None
    finally:
        _active = False
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def join(backend: str, timeout: timedelta) -> None:
    """Join the other processes, such that ``destroy_process_group`` ends the threads of the group.

    Modules that torch's optimizers import have the group of that moment as default arguments. One
    that exists by then lives as long as they do: its threads, still freeing what they have sent,
    meet the end of the interpreter, which aborts the process after all its work. So these modules
    come first.
    """
    importlib.import_module("torch._dynamo")
    with _stdout_for_results():
        dist.init_process_group(backend, timeout=timeout)


@contextlib.contextmanager
def _stdout_for_results() -> Iterator[None]:
    """Send what native code prints to stderr: gloo of torch 2.10 tells of its connections."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def current(n_nodes: int) -> Ranks:
    """The ranks that share a graph of N nodes: those of the :func:`session`, if there is one.

    Raises
    ------
    LaunchError
        There are more ranks than nodes.
    """
    if not _active:
        return ONE
    size = dist.get_world_size()
    if n_nodes < size:
        raise LaunchError(f"there must be at most one rank per node: {size} ranks, {n_nodes} nodes")
    return ShardedRanks(n_nodes)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{name} must be a whole number, as torchrun sets it, got {text!r}: start with "
            f"torchrun --nproc-per-node=R -m fastclust.train ..."
        ) from None


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise LaunchError(f"{TIMEOUT_VARIABLE} must be a number of seconds, got {text!r}")
    return seconds


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _is_of_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection" in text


# --- several ranks ------------------------------------------------------------------------------


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
        whole = x.new_empty((self.n_nodes, *x.shape[1:]))
        most = max(map(self.count, range(self.size)))
        if most * self.size == self.n_nodes:
            _all_gather(whole, x.contiguous())
            return whole
        padded = x.new_empty((most, *x.shape[1:]))
        padded[: len(x)] = x
        parts = x.new_empty((self.size * most, *x.shape[1:]))
        _all_gather(parts, padded)
        for r, part in enumerate(parts.split(most)):
            whole[self.bounds[r] : self.bounds[r + 1]] = part[: self.count(r)]
        return whole

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

    def graph(self, graph: Graph) -> _GraphRows:
        return _GraphRows(graph, self)

    def propagate(
        self, graph: Any, h: Tensor, *, residual: Tensor | None = None, activation: Any = "none"
    ) -> Tensor:
        return _Propagate.apply(graph, h, residual, activation == "relu")

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
            raise outcome[1]
        return outcome[0]

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
        loss = _RingLoss if self.ring else _GatherLoss
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
        range_ = _ring_range(self, z, e, alpha) if self.ring else _gather_range(self, z, e, alpha)
        labels, confident, beta = args[1:]
        return infonce._refreshed(z, e, alpha, range_, labels, confident, beta, previous)

    def whole_weights(self, weights: ops.Hardness) -> ops.Hardness:
        if not self.ring:
            return weights
        return replace(
            weights,
            z=tuple(map(self.gather_views, weights.z)),
            e=tuple(map(self.gather_views, weights.e)),
        )

    def own_weights(self, weights: ops.Hardness) -> ops.Hardness:
        if not self.ring:
            return weights

        def own(x: Tensor) -> Tensor:
            return torch.cat([self.rows(view) for view in x.chunk(2)])

        return replace(weights, z=tuple(map(own, weights.z)), e=tuple(map(own, weights.e)))

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
        return _kmeans(self, x, n_clusters, **keywords)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ShardedRanks) -> Tensor:
        return ranks.add_up(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


# --- propagation --------------------------------------------------------------------------------


class _GraphRows:
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


class _Propagate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graph: _GraphRows, h: Tensor, residual: Tensor | None, relu: bool
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


# --- the loss, gathered -------------------------------------------------------------------------


class _GatherLoss(torch.autograd.Function):
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


def _gather_range(ranks: ShardedRanks, z: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
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


class _RingLoss(torch.autograd.Function):
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


def _ring_range(ranks: ShardedRanks, z: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
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


# --- k-means ------------------------------------------------------------------------------------


def _kmeans(
    ranks: ShardedRanks, x: Tensor, n_clusters: int, *, n_init: int = 10, max_iter: int = 300,
    tol: float = 1e-4, init: str | None = None, seed: int = 0,
) -> ops.KMeansResult:  # fmt: skip
    """Lloyd's iterations with rows x [n, d] of every rank, as :func:`fastclust.ops.kmeans`.

    Points are assigned by the kernel, each rank its own; the sums of the clusters are float64 and
    added over the ranks, so that every rank has the same centres. The start is drawn from all rows,
    or from evenly spaced rows where there are more than 65,536, on each rank alike.
    """
    native = torch.ops.fastclust
    n, width = ranks.n_nodes, x.shape[1]
    mean = ranks.add_up(x.double().sum(0)) / n  # [d]
    xc = torch.nn.functional.pad(x.double() - mean, (0, -width % 16)).to(x.dtype)  # [n, dp]
    variance = ranks.add_up(xc.double().square().sum()) / (n * width)
    _check_spread(variance.item() * width * n, x.dtype)
    released = init == "paper-code"
    if released:
        max_iter, n_init = _PAPER_CODE_ITERATIONS, 1
        tolerance = _PAPER_CODE_TOLERANCE
    else:
        tolerance = tol * variance.item()
    method = _METHODS[init or "k-means++"]
    centers = native.kmeans_init(_start(ranks, xc), n_clusters, n_init, method, seed % 2**63)

    moving = torch.arange(len(centers), device=x.device)
    n_iter = torch.zeros(len(centers), dtype=torch.int64, device=x.device)
    for _ in range(max_iter):
        moved, repaired = _lloyd_step(ranks, xc, centers[moving])
        lengths = (moved.double() - centers[moving].double()).square().sum(2)  # [R, K]
        centers[moving] = moved
        n_iter[moving] += 1
        done = (
            lengths.sqrt().sum(1).square() < tolerance if released else lengths.sum(1) <= tolerance
        )
        moving = moving[~(done & ~repaired)]
        if len(moving) == 0:
            break
    labels, inertia = native.kmeans_assign(xc, centers)
    best = int(ranks.add_up(inertia).argmin())
    labels, inertia, centers = labels[best], inertia[best], centers[best]
    # Between the last update and the last assignment a cluster can lose its last point.
    for _ in range(_MAX_FINAL_REPAIRS):
        counts = ranks.add_up(torch.bincount(labels, minlength=n_clusters))
        if bool((counts > 0).all()) or inertia.item() == 0.0:
            break
        centers = _lloyd_step(ranks, xc, centers[None])[0][0]
        n_iter[best] += 1
        one, inertia = native.kmeans_assign(xc, centers[None])
        labels, inertia = one[0], ranks.add_up(inertia)[0]
    return ops.KMeansResult(
        labels=labels.long(),
        centers=(centers[:, :width].double() + mean).to(x.dtype),
        inertia=inertia.item(),
        n_iter=int(n_iter[best]),
    )


def _check_spread(spread: float, dtype: torch.dtype) -> None:
    """Check the sum of squared distances to the mean."""
    if not math.isfinite(spread):
        raise ValueError("x must hold finite values, found NaN or infinity")
    if spread > torch.finfo(dtype).max / 16:
        raise ValueError(f"x is too widely spread for squared distances in {dtype}: scale it down")


def _start(ranks: ShardedRanks, xc: Tensor) -> Tensor:
    """Rows to draw the first centres from, the same on every rank."""
    stride = -(-ranks.n_nodes // START_ROWS)
    if stride == 1:
        return ranks.gather(xc)
    nodes = torch.arange(0, ranks.n_nodes, stride, device=xc.device)
    own, places = ranks.own_nodes(nodes, torch.arange(len(nodes), device=xc.device))
    chosen = xc.new_zeros(len(nodes), xc.shape[1])
    chosen[places] = xc[own]
    return ranks.add_up(chosen)


def _lloyd_step(ranks: ShardedRanks, xc: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration of every restart: centres [R, K, dp], and bool [R] whether it mended one."""
    restarts, k, width = centers.shape
    labels = torch.ops.fastclust.kmeans_assign(xc, centers)[0].long()  # [R, n]
    sums = xc.new_zeros(restarts * k, width + 1, dtype=torch.float64)  # and counts
    for rows, part in zip(xc.split(8192), labels.split(8192, dim=1), strict=True):
        members = torch.nn.functional.one_hot(part, k).transpose(1, 2).reshape(restarts * k, -1)
        members = members.double()
        sums[:, :width] += members @ rows.double()
        sums[:, width] += members.sum(1)
    sums = ranks.add_up(sums).view(restarts, k, width + 1)
    repaired = (sums[..., width] == 0).any(1)
    for r in repaired.nonzero()[:, 0].tolist():
        repaired[r] = _mend(ranks, xc, labels[r], centers[r], sums[r])
    counts = sums[..., width:]
    means = sums[..., :width] / counts.clamp_min(1.0)
    return torch.where(counts > 0, means, centers.double()).to(centers.dtype), repaired


def _mend(ranks: ShardedRanks, xc: Tensor, labels: Tensor, centers: Tensor, sums: Tensor) -> bool:
    """Move the point farthest from its centre into each empty cluster, in sums [K, dp + 1].

    Returns whether one was moved; where all lie on a centre, none is.
    """
    moved = False
    distance = (xc.double() - centers[labels].double()).square().sum(1)  # [n]
    for cluster in (sums[:, -1] == 0).nonzero()[:, 0].tolist():
        # This rank's candidate: distance, cluster, point.
        mine = sums.new_zeros(1, 2 + xc.shape[1])
        i = int(torch.where(sums[labels, -1] > 1, distance, 0.0).argmax())
        if sums[labels[i], -1] > 1:
            mine[0, 0], mine[0, 1], mine[0, 2:] = distance[i], labels[i], xc[i]
        found = mine.new_empty((ranks.size, mine.shape[1]))
        _all_gather(found, mine)
        winner = int(found[:, 0].argmax())
        length, home, point = float(found[winner, 0]), int(found[winner, 1]), found[winner, 2:]
        if length <= 0:
            break
        moved = True
        sums[home, :-1] -= point
        sums[home, -1] -= 1
        sums[cluster, :-1], sums[cluster, -1] = point, 1.0
        if winner == ranks.rank:
            labels[i] = cluster
        distance = torch.minimum(distance, (xc.double() - point).square().sum(1))
    return moved
