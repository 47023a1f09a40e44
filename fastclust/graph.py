"""An immutable graph, prepared once for every kernel that walks its edges."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fastclust.validation import check_adjacency

__all__ = ["Graph"]

Norm = Literal["rw", "sym", "none"]
NORMS = ("rw", "sym", "none")

# Nodes keep the caller's order. One thread, medians in ms of three interleaved runs of the CPU
# kernel on the real AMAC graph (13,752 nodes, 492k entries), d = 64 and d = 600: as published 1.8
# to 2.6 and 50 to 52, shuffled 1.9 to 2.4 and 54 to 69, by class and degree (the best that a
# search for communities could find) 1.5 to 2.4 and 48 to 61, by degree 2.1 to 2.7 and 59 to 63,
# reverse Cuthill-McKee 1.6 to 1.7 and 43 to 50. That last one gains up to a quarter of a narrow
# call and a tenth of a wide one, and putting the rows of h and of the result in another order
# costs more than the first of these. A synthetic graph (200k nodes, 10M entries, d = 128): 595 and
# 351 as it is, 392 and 360 by community and degree, 443 and 492 by degree.

# Edges per CPU task: small enough that threads finish together, large enough that handing out a
# task costs nothing.
TASK_EDGES = 4096
# A row costs about as much as this many edges besides its edges: scale, residual, store.
ROW_COST = 4
# Rows of more edges than this are hubs, summed in segments of this many edges. On the CPU only a
# row that could hold up a whole call matters; a GPU warp is slower and its neighbours many.
HUB_EDGES = {"cpu": 8192, "cuda": 512}


class Graph:
    r"""Undirected graph in CSR form with its normalisation, shared by all propagation operators.

    The graph stands for

    .. math:: \bar A = \mathrm{diag}(r)\,(A + I)\,\mathrm{diag}(c)

    with :math:`r` and :math:`c` after ``norm``, and without :math:`I` if ``self_loops`` is false.
    Degrees count the self loop where there is one and sum the weights of a weighted graph; a node
    of degree zero gets scale zero, so its row of :math:`\bar A` is zero.

    Parameters
    ----------
    adjacency : scipy sparse, array [N, N], torch tensor, edge index [2, E] or networkx graph
        See :func:`fastclust.validation.check_adjacency`. Self loops in it are dropped and an
        asymmetric one is symmetrised, with a warning. It may be weighted; where all weights are
        one, no values are stored.
    norm : {"rw", "sym", "none"}, default "rw"
        ``"rw"``: row-stochastic, :math:`D^{-1}(A+I)`. ``"sym"``: symmetric,
        :math:`D^{-1/2}(A+I)D^{-1/2}`. ``"none"``: no scaling.
    self_loops : bool, default True
        Add the identity to the adjacency.

    Attributes
    ----------
    indptr : torch.Tensor
        int64 [N + 1], where the edges of each node begin.
    indices : torch.Tensor
        int32 [E], neighbours of each node in ascending order; E counts both directions.
    values : torch.Tensor or None
        float32 [E], weights of the edges; None where all are one.
    row_scale, col_scale : torch.Tensor or None
        float32 [N], the vectors r and c; None where all ones.
    norm, self_loops
        As given.

    Raises
    ------
    TypeError, ValueError
        The adjacency is not usable, ``norm`` is unknown or ``self_loops`` is not a bool.

    Notes
    -----
    A graph never changes after it was made; it can be pickled, and passed through
    ``torch.compile``.

    Examples
    --------
    >>> import numpy as np
    >>> g = Graph(np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]]))
    >>> g
    Graph(n_nodes=3, n_edges=4, norm='rw', self_loops=True, device='cpu')
    >>> g.row_scale
    tensor([0.3333, 0.5000, 0.5000])
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor | None
    row_scale: torch.Tensor | None
    col_scale: torch.Tensor | None
    norm: Norm
    self_loops: bool
    # float64 twins of the scales, so that float64 input is propagated in float64 throughout
    _row_scale64: torch.Tensor | None
    _col_scale64: torch.Tensor | None
    # how the kernels cut their work, see _chunk_tables
    _task_rows: torch.Tensor
    _segments: torch.Tensor
    _hubs: torch.Tensor
    _hub_edges: int

    def __init__(self, adjacency: Any, norm: Norm = "rw", self_loops: bool = True) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        if not isinstance(self_loops, bool | np.bool_):
            raise TypeError(f"self_loops must be True or False, got {self_loops!r}")
        matrix = check_adjacency(adjacency)
        indptr = np.asarray(matrix.indptr, dtype=np.int64)
        indices = np.array(matrix.indices, dtype=np.int32)  # a copy: the caller's may change
        weighted = bool(np.any(matrix.data != 1))
        values = np.array(matrix.data, dtype=np.float32) if weighted else None

        degree = np.diff(indptr).astype(np.float64)
        if values is not None:
            degree = np.asarray(matrix.astype(np.float64).sum(axis=1)).reshape(-1)
        if self_loops:
            degree = degree + 1.0
        inverse = np.divide(1.0, degree, out=np.zeros_like(degree), where=degree > 0)
        if norm == "rw" and inverse.max() > np.finfo(np.float32).max:
            raise ValueError(
                f"adjacency must have node degrees of 1e-38 or more, got "
                f"{degree[degree > 0].min():.0e}; scale the weights"
            )
        row = col = None
        if norm == "rw":
            row = inverse
        elif norm == "sym":
            row = col = np.sqrt(inverse)

        state: dict[str, Any] = {
            "indptr": torch.from_numpy(indptr),
            "indices": torch.from_numpy(indices),
            "values": None if values is None else torch.from_numpy(values),
            "row_scale": None if row is None else torch.from_numpy(row.astype(np.float32)),
            "col_scale": None if col is None else torch.from_numpy(col.astype(np.float32)),
            "_row_scale64": None if row is None else torch.from_numpy(row),
            "_col_scale64": None if col is None else torch.from_numpy(col),
            "norm": norm,
            "self_loops": bool(self_loops),
            **_chunk_tables(indptr, HUB_EDGES["cpu"]),
        }
        self.__dict__.update(state)

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return self.indptr.shape[0] - 1

    @property
    def n_edges(self) -> int:
        """Number of stored entries E: both directions of every edge, without self loops."""
        return self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors of the graph live."""
        return self.indptr.device

    def to(self, device: torch.device | str) -> Graph:
        """Return the graph on ``device``: itself if it is there already, else a copy.

        Parameters
        ----------
        device : torch.device or str
            For example ``"cuda"``.

        Returns
        -------
        Graph
        """
        device = torch.device(device)
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        tables: dict[str, Any] = {}
        if device.type != self.device.type:
            hub_edges = HUB_EDGES.get(device.type, HUB_EDGES["cpu"])
            tables = _chunk_tables(self.indptr.cpu().numpy(), hub_edges)
        state = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in {**self.__dict__, **tables}.items()
        }
        graph = object.__new__(Graph)
        graph.__dict__.update(state)
        return graph

    def scales(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Row and column scale for ``dtype``: float64 or else float32, each [N] or None."""
        if dtype == torch.float64:
            return self._row_scale64, self._col_scale64
        return self.row_scale, self.col_scale

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Graph never changes: cannot set {name!r}; make a new one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Graph never changes: cannot delete {name!r}")

    def __repr__(self) -> str:
        return (
            f"Graph(n_nodes={self.n_nodes}, n_edges={self.n_edges}, norm={self.norm!r}, "
            f"self_loops={self.self_loops}, device={str(self.device)!r})"
        )


def _chunk_tables(indptr: npt.NDArray[np.int64], hub_edges: int) -> dict[str, Any]:
    """Cut the edges of a graph into pieces of bounded size, the same for any number of threads.

    Returns ``_task_rows`` int64 [T + 1], the first row of each CPU task; ``_segments`` int64
    [S, 3], the pieces of the hub rows as (row, first edge, last edge + 1); ``_hubs`` int64 [H, 3]
    as (row, first segment, last segment + 1); and ``_hub_edges``.
    """
    n_nodes = len(indptr) - 1
    degree = np.diff(indptr)
    is_hub = degree > hub_edges

    rows = np.flatnonzero(is_hub)
    n_pieces = -(-degree[rows] // hub_edges)
    first_piece = np.concatenate([[0], np.cumsum(n_pieces)]).astype(np.int64)
    owner = np.repeat(rows, n_pieces)
    piece = np.arange(first_piece[-1]) - np.repeat(first_piece[:-1], n_pieces)
    begin = indptr[owner] + piece * hub_edges
    end = np.minimum(begin + hub_edges, indptr[owner + 1])

    cost = np.cumsum(np.where(is_hub, 0, degree) + ROW_COST)
    cuts = np.searchsorted(cost, np.arange(TASK_EDGES, cost[-1], TASK_EDGES))
    task_rows = np.unique(np.concatenate([[0], cuts, [n_nodes]])).astype(np.int64)

    return {
        "_task_rows": torch.from_numpy(task_rows),
        "_segments": torch.from_numpy(np.stack([owner, begin, end], axis=1).astype(np.int64)),
        "_hubs": torch.from_numpy(
            np.stack([rows, first_piece[:-1], first_piece[1:]], axis=1).astype(np.int64)
        ),
        "_hub_edges": hub_edges,
    }
