"""Checks on user-supplied graphs, features, labels and cluster counts, and operators' arguments.

Every function here either returns its argument in the one form that the rest of the package
works with (an operator's argument passes as it is), or raises ``TypeError`` / ``ValueError`` with a
message that names the argument, says what it must be, what it was and how to mend it. What can be
mended without guessing (self loops, an asymmetric adjacency) is mended, with a
:class:`DataWarning`.

Isolated nodes, disconnected graphs and all-zero feature rows are ordinary data and pass.
"""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastclust._library import cuda_loaded, cuda_status
from fastclust.conversion import (
    STACKLEVEL,
    DataWarning,
    as_array,
    as_csr,
    checked_csr,
    edge_index_pair,
    is_networkx,
    networkx_to_csr,
    require_real,
    to_host,
)

__all__ = [
    "DataWarning",
    "align_adjacency",
    "check_adjacency",
    "check_bool",
    "check_choice",
    "check_dense",
    "check_device",
    "check_features",
    "check_finite",
    "check_integer",
    "check_labels",
    "check_like",
    "check_n_clusters",
    "is_graph_data",
    "unpack_graph_data",
    "why_not_cuda",
]

#: Of a GPU that can run the kernels: their instructions begin with Ampere.
LEAST_CAPABILITY = (8, 0)

# Two entries A_ij and A_ji count as equal up to this fraction of the largest weight: weights that
# were normalised in float32 differ by rounding and deserve no warning.
_SYMMETRY_TOLERANCE = 1e-6

# Attributes are expected between this and its inverse.
_SMALLEST_SCALE = 1e-9


def check_adjacency(
    adjacency: Any, n_nodes: int | None = None, *, name: str = "adjacency"
) -> sp.csr_array:
    """Return an adjacency of any supported kind in canonical CSR form.

    Canonical: square, symmetric, no self loops, no duplicate and no explicitly stored zero
    entries, columns sorted within each row; ``indptr`` int32 [N+1], ``indices`` int32 [E] (both
    int64 from 2^31 entries on), ``data`` float32 [E]. E counts both directions of an edge.

    Parameters
    ----------
    adjacency : scipy sparse, array [N, N], torch tensor, edge index [2, E] or networkx graph
        A torch tensor may be dense, COO, CSR, CSC or an edge index. An *edge index* is an integer
        array or tensor of shape [2, E] whose columns are edges; repeated columns count once. The
        nodes of a networkx graph keep their order, except that nodes named 0..N-1 are sorted; its
        edge attribute ``weight`` is used where present. The columns of a square pandas table are
        put in the order of its index where both bear the same names. Any array that speaks DLPack
        or the CUDA array interface (CuPy, JAX) and cupyx matrices will do; what lies on a GPU is
        copied to the host, where graphs are checked and prepared.
    n_nodes : int, optional
        The number of nodes N that the adjacency must have. Without it an edge index is taken to
        end at its largest node.
    name : str
        How messages call the argument.

    Returns
    -------
    scipy.sparse.csr_array
        [N, N], float32. It may share memory with the argument, which is never modified.

    Raises
    ------
    TypeError
        The kind or dtype of the argument is not supported.
    ValueError
        Not square, not N by N, negative or out-of-range indices, negative, NaN or infinite weights.

    Warns
    -----
    DataWarning
        Self loops were dropped, or an asymmetric adjacency was replaced by the elementwise
        maximum of itself and its transpose.

    Examples
    --------
    >>> import numpy as np
    >>> check_adjacency(np.array([[0, 1, 1, 2], [1, 0, 2, 1]])).toarray()
    array([[0., 1., 0.],
           [1., 0., 1.],
           [0., 1., 0.]], dtype=float32)
    """
    matrix = as_csr(align_adjacency(adjacency), n_nodes, name)
    n = matrix.shape[0]
    if matrix.shape[0] != matrix.shape[1]:
        hint = ""
        if matrix.shape[1] == 2:
            hint = "; an edge list must be transposed to an edge index of shape [2, E]"
        elif matrix.shape[0] == 2:
            hint = "; an edge index of shape [2, E] must hold integers"
        raise ValueError(f"{name} must be square, got shape {matrix.shape}{hint}")
    if n == 0:
        raise ValueError(f"{name} must have at least one node, got shape (0, 0)")
    if n_nodes is not None and n != n_nodes:
        raise ValueError(
            f"{name} must have one row and one column per row of the features "
            f"({n_nodes}), got shape {matrix.shape}"
        )
    if n > np.iinfo(np.int32).max:
        raise ValueError(f"{name} must have fewer than 2**31 nodes, got {n}")
    _require_finite(matrix, name)
    matrix.data = _to_float32(matrix.data, name)
    if matrix.nnz and matrix.data.min() < 0:
        raise ValueError(
            f"{name} must have no negative weights, got {matrix.data.min():g} as the smallest; "
            f"shift or drop negative edges first"
        )
    matrix = _drop_self_loops(matrix, name)
    matrix = _symmetrised(matrix, name)
    return _canonical(matrix)


def align_adjacency(adjacency: Any, features: Any = None) -> Any:
    """Put a pandas table or a networkx graph into the order of the nodes; others pass.

    The columns of a square table are brought into the order of its index where both bear the same
    names, and both, or the nodes of a graph, into the order of the index of ``features`` where that
    is a table of the same names. Other names say nothing about order: rows are then taken as they
    stand.
    """
    if is_networkx(adjacency) and hasattr(features, "iloc"):
        order = features.index
        if order.is_unique and set(order) == set(adjacency.nodes):
            return networkx_to_csr(adjacency, list(order))
    if not hasattr(adjacency, "iloc") or getattr(adjacency, "ndim", 0) != 2:
        return adjacency
    order = adjacency.index
    if order.is_unique and set(order) == set(adjacency.columns):
        named = getattr(features, "index", None) if hasattr(features, "iloc") else None
        if named is not None and named.is_unique and set(named) == set(order):
            order = named
        return adjacency.loc[order, order]
    return adjacency


def check_features(
    features: Any, n_nodes: int | None = None, *, name: str = "features"
) -> npt.NDArray[np.float32] | sp.csr_array:
    """Return node features as float32, dense features dense and sparse features in CSR.

    Parameters
    ----------
    features : array, scipy or cupyx sparse, pandas table or torch tensor, shape [N, D]
        Also any array that speaks DLPack or the CUDA array interface; what lies on a GPU is copied
        to the host, where it is checked. The index of a table is not looked at here.
    n_nodes : int, optional
        The number of rows that the features must have.
    name : str
        How messages call the argument.

    Returns
    -------
    numpy.ndarray or scipy.sparse.csr_array
        [N, D], float32; a dense result is C-contiguous, a sparse one has sorted columns without
        duplicates or stored zeros. It may share memory with the argument, which is never modified.

    Raises
    ------
    TypeError
        Not numeric.
    ValueError
        Not two-dimensional, no rows, no columns, a wrong number of rows, NaN or infinite values,
        complex numbers, rows so long that float32 does not hold their squared length.
    """
    features = to_host(features)
    if sp.issparse(features):
        require_real(features.dtype, name)
        matrix: Any = checked_csr(features, name)
        _require_feature_shape(matrix.shape, n_nodes, name)
        _require_finite(matrix, name)
        matrix.data = _to_float32(matrix.data, name)
        _check_scale(matrix.data, matrix.shape[1], name)
        return _canonical(matrix)

    array = as_array(features, name)
    if array.ndim != 2:
        raise ValueError(
            f"{name} must be 2-dimensional [n_nodes, n_features], got shape {array.shape}; "
            f"Reshape your data with array.reshape(-1, 1) if it has a single feature"
        )
    _require_feature_shape(array.shape, n_nodes, name)
    _require_finite(array, name)
    narrow = np.ascontiguousarray(_to_float32(array, name))
    _check_scale(narrow, narrow.shape[1], name)
    return narrow


def _check_scale(values: npt.NDArray[np.float32], n_features: int, name: str) -> None:
    """Lengths of rows must be numbers of float32; far from 1 they meet learning rates in vain."""
    largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
    if largest**2 * n_features > float(np.finfo(np.float32).max):
        raise ValueError(
            f"{name} must have rows whose squared length fits float32, got entries up to "
            f"{largest:.1e}; divide it by that"
        )
    if 0 < largest < _SMALLEST_SCALE or largest > 1 / _SMALLEST_SCALE:
        warnings.warn(
            f"{name} has {largest:.1e} as its largest magnitude, the methods expect about 1; "
            f"scale it",
            DataWarning,
            stacklevel=3,
        )


def check_labels(labels: Any, n_nodes: int | None = None, *, name: str = "labels") -> Any:
    """Return class or cluster labels as a one-dimensional array of 0..C-1.

    Any values that NumPy can sort are accepted (non-contiguous or negative integers, strings);
    they are numbered in sorted order.

    Parameters
    ----------
    labels : array of shape [N]
        One label per node.
    n_nodes : int, optional
        The length that the labels must have.
    name : str
        How messages call the argument.

    Returns
    -------
    numpy.ndarray
        int64 [N], values 0..C-1, each of them used.

    Raises
    ------
    TypeError
        The labels cannot be sorted.
    ValueError
        Not one-dimensional, empty, of the wrong length, NaN or otherwise missing.
    """
    values = to_host(labels)
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-dimensional [n_nodes], got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must hold at least one label, got none")
    if n_nodes is not None and array.shape[0] != n_nodes:
        raise ValueError(
            f"{name} must hold one label per node ({n_nodes}), got {array.shape[0]} labels"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} must not hold NaN or infinite values; drop unlabelled nodes")
    n_missing = _count_missing(values, array)
    if n_missing:
        raise ValueError(
            f"{name} must not hold missing values, got {n_missing}; drop unlabelled nodes"
        )
    try:
        _, inverse = np.unique(array, return_inverse=True)
    except TypeError as error:
        raise TypeError(f"{name} must hold labels of one sortable type: {error}") from None
    return inverse.reshape(-1).astype(np.int64)


def _count_missing(values: Any, array: npt.NDArray[Any]) -> int:
    """How many of ``values``, which are ``array`` to NumPy, stand for no value.

    NumPy sorts NaN among other objects, makes text of it among words, and forgets masks.
    """
    if np.ma.isMaskedArray(values):
        return int(np.ma.count_masked(values))
    if array.dtype.kind in "mM":
        return int(np.isnat(array).sum())
    if array.dtype.kind == "O":
        values = array.tolist()
    elif array.dtype.kind not in "US" or not isinstance(values, (list, tuple)):
        return 0
    return sum(
        value is None or type(value).__name__ == "NAType" or bool(value != value)
        for value in values
    )


def check_n_clusters(n_clusters: Any, n_nodes: int | None = None, *, minimum: int = 2) -> int:
    """Return the number of clusters as an int.

    Parameters
    ----------
    n_clusters : int
        The number of clusters K.
    n_nodes : int, optional
        The number of nodes N; K may not exceed it.
    minimum : int, default 2
        The least K allowed. A clustering needs two clusters; plain k-means can do with one.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        Below ``minimum`` or above ``n_nodes``.
    """
    if isinstance(n_clusters, (bool, np.bool_)) or not isinstance(n_clusters, numbers.Integral):
        raise TypeError(
            f"n_clusters must be an integer, got {n_clusters!r} of type {type(n_clusters).__name__}"
        )
    k = int(n_clusters)
    if k < minimum:
        raise ValueError(f"n_clusters must be at least {minimum}, got {k}")
    if n_nodes is not None and k > n_nodes:
        raise ValueError(
            f"n_clusters must be at most the number of nodes, got n_clusters={k} with "
            f"n_samples={n_nodes}; ask for fewer clusters or give more nodes"
        )
    return k


def why_not_cuda(index: int | None = None) -> str | None:
    """Why a CUDA device cannot be used, the current one if ``index`` is None; None if it can be."""
    if not cuda_loaded:
        return f"CUDA library {cuda_status}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        return f"torch sees {count} CUDA device{'' if count == 1 else 's'}, counted from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {found}, the kernels need {least} or later"
    return None


@functools.cache  # once per reason
def _tell_why_cpu(reason: str) -> None:
    warnings.warn(
        f"device='auto' takes the CPU although there is a GPU: {reason}; 'cpu' silences this",
        stacklevel=3,
    )


def check_device(device: str | torch.device) -> torch.device:
    """Return the device to run on.

    ``"auto"`` takes CUDA where torch, fastclust and the GPU allow it, else the CPU; it warns where
    there is a GPU that it does not take.

    Raises
    ------
    ValueError
        Not "auto", a CPU or a CUDA device, or a CUDA device that cannot be used.
    """
    if device == "auto":
        reason = why_not_cuda()
        if reason is not None and torch.cuda.is_available():
            _tell_why_cpu(reason)
        return torch.device("cuda" if reason is None else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}") from None
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    reason = why_not_cuda(resolved.index) if resolved.type == "cuda" else None
    if reason is not None:
        raise ValueError(
            f"device must be one that can be used, got {str(device)!r}: {reason}; use 'cpu'"
        )
    return resolved


def is_graph_data(data: Any) -> bool:
    """Whether ``data`` looks like a ``torch_geometric.data.Data`` object (features and edges)."""
    return hasattr(data, "x") and (
        getattr(data, "edge_index", None) is not None or getattr(data, "adj_t", None) is not None
    )


def unpack_graph_data(data: Any) -> tuple[npt.NDArray[np.float32] | sp.csr_array, sp.csr_array]:
    """Take features and adjacency out of a ``torch_geometric.data.Data`` object.

    The object is only looked at (``x``, ``edge_index``, ``edge_weight``, ``adj_t``), so that
    torch_geometric need not be installed. Labels (``y``) are not read.

    Returns
    -------
    features : numpy.ndarray or scipy.sparse.csr_array
        [N, D], float32, see :func:`check_features`.
    adjacency : scipy.sparse.csr_array
        [N, N], canonical, see :func:`check_adjacency`.

    Raises
    ------
    ValueError
        The object has no features or no edges, or they are not valid.
    """
    x = getattr(data, "x", None)
    if x is None:
        raise ValueError("data.x must hold the node features [n_nodes, n_features], got None")
    features = check_features(x, name="data.x")
    n_nodes = int(features.shape[0])
    edge_index = getattr(data, "edge_index", None)
    if edge_index is None:
        adj_t = getattr(data, "adj_t", None)
        if adj_t is None:
            raise ValueError("data must hold edges in edge_index or adj_t, got neither")
        if hasattr(adj_t, "to_scipy"):
            adj_t = adj_t.to_scipy(layout="csr")
        return features, check_adjacency(adj_t, n_nodes, name="data.adj_t")
    weight = getattr(data, "edge_weight", None)
    if weight is None:
        return features, check_adjacency(edge_index, n_nodes, name="data.edge_index")
    rows, cols = edge_index_pair(as_array(edge_index, "data.edge_index"), n_nodes, "edge_index")
    weight = as_array(weight, "data.edge_weight").reshape(-1)
    if weight.shape[0] != rows.shape[0]:
        raise ValueError(
            f"data.edge_weight must hold one weight per edge ({rows.shape[0]}), "
            f"got {weight.shape[0]}"
        )
    weighted = sp.coo_array((weight, (rows, cols)), shape=(n_nodes, n_nodes))
    return features, check_adjacency(weighted, n_nodes, name="data.edge_index")


# --- arguments of operators ----------------------------------------------------------------------


def check_integer(name: str, value: Any, minimum: int | None = None) -> None:
    """Raise unless ``value`` is an integer, of at least ``minimum``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        words = [repr(choice) for choice in choices]
        raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}")


def check_dense(name: str, x: Any, *, bfloat16_on_cuda: bool = False) -> None:
    """Raise unless x is a dense tensor of float32 or float64, or of bfloat16 where that will do."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    narrow = bfloat16_on_cuda and x.is_cuda and x.dtype == torch.bfloat16
    if x.dtype not in (torch.float32, torch.float64) and not narrow:
        also = " (on CUDA also bfloat16)" if bfloat16_on_cuda else ""
        raise TypeError(f"{name} must be float32 or float64{also}, got {x.dtype}; convert it first")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {x.layout}; call .to_dense()")


def check_like(name: str, y: torch.Tensor, other: str, x: torch.Tensor) -> None:
    """Raise unless y has the dtype and device of x, which messages call ``other``."""
    if y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"{name} must have the dtype and device of {other} ({x.dtype} on {x.device}), "
            f"got {y.dtype} on {y.device}"
        )


def check_finite(name: str, x: torch.Tensor) -> None:
    """Raise for NaN and infinite values, where values can be looked at without stopping a graph.

    That is on the CPU, outside of ``torch.compile`` and of modes that trace or fake the call.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return
    # A sum is a tenth of the pass over all elements, which tells an overflow of it apart.
    if not math.isfinite(x.detach().sum()) and not x.isfinite().all():
        raise ValueError(f"{name} must be finite, but holds NaN or infinite values")


# --- checks and mends ----------------------------------------------------------------------------


def _require_finite(array: Any, name: str) -> None:
    """Raise ``ValueError`` for NaN or infinite values in an array or CSR matrix."""
    values = array.data if sp.issparse(array) else array
    if values.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass without a mask; only a suspicious sum is looked at element by element.
        if np.isfinite(np.sum(values, dtype=np.float64)):
            return
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return
    first = tuple(bad[0])
    kind = "NaN" if np.isnan(values[first]) else "inf (infinity)"
    if sp.issparse(array):
        coo = array.tocoo()
        first = (coo.row[first], coo.col[first])
    raise ValueError(
        f"{name} must hold finite values only, got {len(bad)} that are not, the first {kind} at "
        f"row {first[0]}, column {first[1]}; replace or drop them"
    )


def _to_float32(values: Any, name: str) -> Any:
    with np.errstate(over="ignore"):
        converted = values.astype(np.float32, copy=False)
    if values.dtype.kind == "f" and values.dtype.itemsize > 4 and values.size:
        largest = max(abs(float(values.max())), abs(float(values.min())))
        if largest > float(np.finfo(np.float32).max):
            raise ValueError(
                f"{name} must fit float32 (up to 3.4e38), got a value of size {largest:.3g}; "
                f"rescale the data"
            )
    return converted


def _require_feature_shape(shape: tuple[int, ...], n_nodes: int | None, name: str) -> None:
    if shape[0] == 0:
        raise ValueError(
            f"{name} must have at least one row: found array with 0 sample(s) (shape={shape}) "
            f"while a minimum of 1 is required."
        )
    if shape[1] == 0:
        raise ValueError(
            f"{name} must have at least one column: found array with 0 feature(s) (shape={shape}) "
            f"while a minimum of 1 is required."
        )
    if n_nodes is not None and shape[0] != n_nodes:
        raise ValueError(f"{name} must have one row per node ({n_nodes}), got shape {shape}")


def _drop_self_loops(matrix: sp.csr_array, name: str) -> sp.csr_array:
    loops = int(np.count_nonzero(matrix.diagonal()))
    if not loops:
        return matrix
    warnings.warn(
        f"{name} has {loops} self loops; they were dropped", DataWarning, stacklevel=STACKLEVEL
    )
    return without_diagonal(matrix)


def without_diagonal(matrix: sp.csr_array) -> sp.csr_array:
    """The matrix without self loops."""
    coo = matrix.tocoo()
    keep = coo.row != coo.col
    return sp.csr_array((coo.data[keep], (coo.row[keep], coo.col[keep])), shape=matrix.shape)


def _symmetrised(matrix: sp.csr_array, name: str) -> sp.csr_array:
    transposed = sp.csr_array(matrix.T)
    # Without the difference matrix, which takes more memory than the graph.
    if all(
        np.array_equal(getattr(matrix, part), getattr(transposed, part))
        for part in ("indptr", "indices", "data")
    ):
        return matrix
    gap = abs(matrix - transposed)
    if gap.nnz == 0 or gap.max() == 0:
        return matrix
    tolerance = _SYMMETRY_TOLERANCE * float(matrix.max())
    if gap.max() > tolerance:
        n_bad = int(np.count_nonzero(gap.data > tolerance)) // 2
        warnings.warn(
            f"{name} is not symmetric ({n_bad} pairs of nodes differ between the two directions); "
            f"using the elementwise maximum of it and its transpose",
            DataWarning,
            stacklevel=STACKLEVEL,
        )
    return matrix.maximum(transposed)


def _canonical(matrix: sp.csr_array) -> sp.csr_array:
    """Sorted CSR without stored zeros: float32 data, int32 indptr and indices."""
    matrix = sp.csr_array(matrix)
    if matrix.nnz and not matrix.data.all():
        matrix = matrix.copy()
        matrix.eliminate_zeros()
    matrix.sort_indices()
    nnz = int(matrix.indptr[-1])
    # scipy wants one dtype for both index arrays: a wider indptr breaks tocoo and others.
    index = np.int32 if max(nnz, *matrix.shape) <= np.iinfo(np.int32).max else np.int64
    return sp.csr_array(
        (
            matrix.data[:nnz].astype(np.float32, copy=False),
            matrix.indices[:nnz].astype(index, copy=False),
            matrix.indptr.astype(index, copy=False),
        ),
        shape=matrix.shape,
    )
