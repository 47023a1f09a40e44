"""The pickled files of Planetoid, read without running anything that they ask for."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.datasets.dataset import DatasetFormatError, csr


class _PickledMatrix:
    """Stands in for scipy's sparse matrix classes while a pickle is read.

    A pickle gets to fill this object's state, never a class that the process goes on using.
    """

    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state)


class _PickledDtype:
    """Stands in for numpy.dtype, whose own ``__setstate__`` can be made to break NumPy."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise DatasetFormatError(f"it asks for arrays of {name!r}")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands in for numpy.ndarray."""

    array: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data  # written by Python 2
        flat = np.frombuffer(raw, dtype.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads NumPy arrays, scipy sparse matrices and plain containers; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("scipy.sparse") and name in ("csr_matrix", "csr_array"):
            return _PickledMatrix
        if module in ("copy_reg", "copyreg") and name == "_reconstructor":
            return _reconstruct_matrix
        if (module, name) in _UNPICKLED:
            return _UNPICKLED[module, name]
        raise DatasetFormatError(f"it asks for {module}.{name}")


def _reconstruct_matrix(cls: Any, base: Any, state: Any) -> _PickledMatrix:
    if cls is not _PickledMatrix or base is not object or state is not None:
        raise DatasetFormatError("it asks for an object that is not an array")
    return _PickledMatrix()


def _encode_latin1(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for pickle protocols below 3."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DatasetFormatError("it asks for a text encoding")
    return text.encode("latin1")


def _reconstruct_array(cls: Any, shape: Any, code: Any) -> _PickledArray:
    return _PickledArray()


_UNPICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct_array,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct_array,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("collections", "defaultdict"): collections.defaultdict,
    ("__builtin__", "list"): list,
    ("builtins", "list"): list,
    ("__builtin__", "object"): object,
    ("builtins", "object"): object,
    ("_codecs", "encode"): _encode_latin1,
}


def unpickle(content: bytes, source: str) -> Any:
    """What a pickle holds, with stand-ins for arrays and matrices; all else is refused."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # The unpickler makes room for as many memory slots as a single number asks for.
            if opcode.name.endswith("PUT") and (argument or 0) > len(content):
                raise DatasetFormatError("it asks for memory without end")
        return _RestrictedUnpickler(io.BytesIO(content), encoding="latin1").load()
    except DatasetFormatError as error:
        raise DatasetFormatError(
            f"{source} must hold arrays and plain containers only and is not loaded: {error}"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DatasetFormatError(
            f"{source} is truncated or corrupt ({type(error).__name__})"
        ) from None


def unpickle_matrix(content: bytes, source: str) -> sp.csr_array:
    """A scipy CSR matrix."""
    matrix = unpickle(content, source)
    state = getattr(matrix, "state", {}) if isinstance(matrix, _PickledMatrix) else {}
    data, indices, indptr = (
        getattr(state.get(key), "array", None) for key in ("data", "indices", "indptr")
    )
    shape = state.get("_shape", state.get("shape"))
    if (
        any(array is None for array in (data, indices, indptr))
        or not isinstance(shape, tuple)
        or not all(isinstance(size, int) and size < 2**62 for size in shape)
    ):
        raise DatasetFormatError(f"{source} must hold a scipy CSR matrix")
    return csr(data, indices, indptr, np.array(shape), source, "matrix")


def unpickle_array(content: bytes, source: str) -> npt.NDArray[Any]:
    """An array [n, classes]."""
    array = getattr(unpickle(content, source), "array", None)
    if array is None or array.ndim != 2:
        raise DatasetFormatError(f"{source} must hold a numeric array [n, classes]")
    return array
