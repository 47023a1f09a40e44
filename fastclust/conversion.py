"""Graphs and features of any kind as NumPy arrays and scipy matrices on the host.

Indices are checked before anything trusts them; what the numbers mean is checked by
:mod:`fastclust.validation`.
"""

from __future__ import annotations

import contextlib
import numbers
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from fastclust.interop import from_foreign
from fastclust.memory import require_memory

__all__ = [
    "DataWarning",
    "as_array",
    "as_csr",
    "checked_csr",
    "edge_index_pair",
    "is_networkx",
    "networkx_to_csr",
    "require_real",
    "require_valid_csr",
    "to_host",
]

STACKLEVEL = 4  # helper, check_*, the caller of check_*, its user


class DataWarning(UserWarning):
    """The data were changed, or look unusual, but can be used."""


def as_csr(adjacency: Any, n_nodes: int | None, name: str) -> sp.csr_array:
    """Any supported adjacency as CSR with checked indices; entries summed where they repeat."""
    adjacency = to_host(adjacency)
    if sp.issparse(adjacency):
        if adjacency.ndim != 2:
            raise ValueError(f"{name} must be 2-dimensional, got shape {adjacency.shape}")
        require_real(adjacency.dtype, name)
        return checked_csr(adjacency, name)
    if is_networkx(adjacency):
        return networkx_to_csr(adjacency)

    array = as_array(adjacency, name)
    if array.ndim != 2:
        raise ValueError(
            f"{name} must be 2-dimensional: [N, N], or an edge index [2, E]; "
            f"got shape {array.shape}"
        )
    # [2, 2] is read as a dense adjacency unless the number of nodes says otherwise.
    is_edge_index = (
        array.shape[0] == 2
        and array.dtype.kind in "iu"
        and (array.shape[1] != 2 or n_nodes not in (None, 2))
    )
    if is_edge_index:
        rows, cols = edge_index_pair(array, n_nodes, name)
        n = int(max(rows.max(), cols.max())) + 1 if n_nodes is None and rows.size else n_nodes
        if n is None:
            raise ValueError(f"{name} must hold at least one edge when the number of nodes is open")
        require_memory(16 * n, f"{name} with node number {n - 1}", "number the nodes from 0 on")
        matrix = sp.csr_array((np.ones(rows.size, np.float32), (rows, cols)), shape=(n, n))
        matrix.data[:] = 1.0  # a repeated column of an edge index is the same edge
        return matrix
    # Small integers would overflow in sums; SciPy has no half precision.
    narrow = array.dtype.kind in "biu" or array.dtype == np.float16
    return sp.csr_array(array.astype(np.float32) if narrow else array)


def edge_index_pair(array: Any, n_nodes: int | None, name: str) -> tuple[Any, Any]:
    """Both ends int64 [E] of an edge index [2, E], checked."""
    if array.ndim != 2 or array.shape[0] != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be an integer edge index of shape [2, E], "
            f"got shape {array.shape} of {array.dtype}"
        )
    require_index_range(array.reshape(-1), n_nodes, name)
    return array[0].astype(np.int64), array[1].astype(np.int64)


def is_networkx(graph: Any) -> bool:
    """Whether it is a graph of networkx, which need not be installed."""
    return hasattr(graph, "number_of_nodes") and hasattr(graph, "adj")


def networkx_to_csr(graph: Any, nodes: list[Any] | None = None) -> sp.csr_array:
    """A networkx graph as CSR, its nodes as they are listed."""
    import networkx as nx

    if nodes is None:
        nodes = list(graph.nodes)
        if set(nodes) == set(range(len(nodes))):
            nodes.sort()
        elif all(isinstance(node, numbers.Integral) for node in nodes) and nodes != sorted(nodes):
            shown = ", ".join(map(str, nodes[:3])) + (", ..." if len(nodes) > 3 else "")
            warnings.warn(
                f"nodes of the networkx graph are numbered, but not 0 to {len(nodes) - 1}: rows "
                f"are taken in the order in which they are listed: {shown}; sort them, or give X "
                f"as a pandas table whose index holds these numbers",
                DataWarning,
                stacklevel=STACKLEVEL + 1,
            )
    if not nodes:
        return sp.csr_array((0, 0), dtype=np.float32)
    return sp.csr_array(nx.to_scipy_sparse_array(graph, nodelist=nodes, format="csr"))


def to_host(value: Any) -> Any:
    """Tensors, arrays that speak DLPack, and pandas tables as NumPy arrays or scipy matrices.

    Data on the host stay where they are, data on a GPU are copied. Everything else passes.
    """
    if type(value).__module__.partition(".")[0] == "cupyx" and hasattr(value, "get"):
        return value.get()  # a sparse matrix
    if hasattr(value, "iloc"):
        with contextlib.suppress(AttributeError, ValueError):  # dense, or sparse but not of zeros
            return value.sparse.to_coo()
        return np.asarray(value)
    if not isinstance(value, (np.ndarray, torch.Tensor)):
        # Arrow's arrays of words, or with nulls, speak DLPack in name only.
        with contextlib.suppress(TypeError):
            value = from_foreign(value)
    return _torch_to_host(value) if isinstance(value, torch.Tensor) else value


def _torch_to_host(tensor: torch.Tensor) -> Any:
    """A torch tensor as a NumPy array (dense) or scipy matrix (sparse layouts)."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.to(torch.float32)
    if tensor.layout == torch.strided:
        return tensor.numpy()
    if tensor.layout == torch.sparse_csr:
        arrays = (tensor.values(), tensor.col_indices(), tensor.crow_indices())
        return sp.csr_array(tuple(a.numpy() for a in arrays), shape=tuple(tensor.shape))
    if tensor.layout == torch.sparse_csc:
        arrays = (tensor.values(), tensor.row_indices(), tensor.ccol_indices())
        return sp.csc_array(tuple(a.numpy() for a in arrays), shape=tuple(tensor.shape))
    if tensor.layout != torch.sparse_coo:
        tensor = tensor.to_sparse_coo()
    tensor = tensor.coalesce()
    rows, cols = tensor.indices().numpy()
    return sp.coo_array((tensor.values().numpy(), (rows, cols)), shape=tuple(tensor.shape))


def as_array(value: Any, name: str) -> Any:
    """Anything array-like as a NumPy array of real numbers or booleans."""
    value = to_host(value)
    if np.ma.is_masked(value):
        raise ValueError(
            f"{name} must have no masked entries, got {np.ma.count_masked(value)}; fill them or "
            f"drop their rows"
        )
    if value is None or isinstance(value, (str, bytes, dict)):
        raise TypeError(f"{name} must be an array, sparse matrix or tensor, got {value!r:.60}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array, sparse matrix or tensor, got {type(value).__name__}: {error}"
        ) from None
    if array.dtype.kind in "OUS":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name} must be numeric, got dtype {array.dtype}: {error}") from None
    require_real(array.dtype, name)
    # SciPy knows no matrix of another byte order.
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def checked_csr(matrix: Any, name: str) -> sp.csr_array:
    """A scipy sparse matrix as CSR, after its index arrays were checked.

    scipy trusts its index arrays and would read out of bounds on a damaged one.
    """
    what = f"{name} of shape {tuple(matrix.shape)}"
    require_memory(16 * matrix.shape[0], what, "number rows from 0 on")
    if matrix.format in ("csr", "csc", "bsr"):
        n_major, n_minor = matrix.shape if matrix.format != "csc" else matrix.shape[::-1]
        if matrix.format == "bsr":
            n_major, n_minor = (n // b for n, b in zip(matrix.shape, matrix.blocksize, strict=True))
        require_valid_csr(matrix.data, matrix.indices, matrix.indptr, n_major, n_minor, name)
    elif matrix.format == "coo":
        for axis, index in enumerate(matrix.coords):
            require_index_range(index, matrix.shape[axis], name)
    csr = sp.csr_array(matrix)  # shares the arrays of a CSR argument
    if csr.dtype.kind in "iu":
        csr = csr.astype(np.float32)  # small integers would overflow in sums and differences
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr.astype(np.float32) if csr.dtype == bool else csr


def require_valid_csr(
    data: Any, indices: Any, indptr: Any, n_rows: int, n_columns: int, name: str
) -> None:
    """Raise ``ValueError`` unless the arrays make a CSR matrix of the given size."""
    if (
        indptr.shape != (n_rows + 1,)
        or indptr[0] != 0
        or indptr[-1] > indices.shape[0]
        or (indptr[1:] < indptr[:-1]).any()
        or indices.shape[0] != data.shape[0]
    ):
        raise ValueError(
            f"{name} must be a valid compressed sparse matrix: one value per index, and a row "
            f"pointer of {n_rows + 1} values rising from 0 to their number; got {data.shape[0]} "
            f"values, {indices.shape[0]} indices and a row pointer of {indptr.shape[0]}"
        )
    require_index_range(indices, n_columns, name)


def require_index_range(indices: Any, n: int | None, name: str) -> None:
    if not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0:
        raise ValueError(f"{name} must hold node indices of 0 or more, got {low}")
    if n is not None and high >= n:
        raise ValueError(
            f"{name} must hold indices below {n}, got {high}; check the number of nodes, and that "
            f"indices count from 0"
        )


def require_real(dtype: Any, name: str) -> None:
    """Raise unless a dtype is of real numbers or booleans."""
    kind = np.dtype(dtype).kind
    if kind == "c":
        raise ValueError(f"Complex data not supported: {name} must be real, got dtype {dtype}")
    if kind not in "biuf":
        raise TypeError(f"{name} must be numeric, got dtype {dtype}")
