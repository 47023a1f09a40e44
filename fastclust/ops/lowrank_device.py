"""Matrix products of the low-rank operators on CUDA tensors: cuBLAS's, through torch.

Same schemas and meanings as csrc/lowrank/lowrank.h. The centred rows are made dense, 256 MiB of
them at a time; products of sparse rows would add in no fixed order on a GPU. Everything that is not
a product has kernels of its own in csrc/lowrank/lowrank_cuda.cu. Nothing here waits for the device.
With ``torch.backends.cuda.matmul.allow_tf32`` the products, and with them the factors, have the
precision of TF32; ``torch.autocast`` does not reach them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastclust.interop import without_autocast

__all__ = ["csr_mean", "n_batches"]

_Optional = Tensor | None

# Of the dense rows that are made at a time.
_DENSE_BYTES = 256 * 2**20


def _n_rows(values: Tensor, indptr: _Optional) -> int:
    return values.shape[0] if indptr is None else indptr.shape[0] - 1


def n_batches(values: Tensor, indptr: _Optional, batch_size: int) -> int:
    """Number M of batches of dense or CSR rows."""
    return -(-_n_rows(values, indptr) // batch_size)


def _pieces(n_rows: int, row_bytes: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Rows, first and last + 1, that are made dense together: whole batches, or a part of one."""
    most = max(1, _DENSE_BYTES // row_bytes)
    if most >= batch_size:
        step = most // batch_size * batch_size
        for begin in range(0, n_rows, step):
            yield begin, min(n_rows, begin + step)
        return
    for first in range(0, n_rows, batch_size):
        last = min(n_rows, first + batch_size)
        for begin in range(first, last, most):
            yield begin, min(last, begin + most)


def _batches_of(
    values: Tensor, indptr: _Optional, n_cols: int, batch_size: int
) -> Iterator[tuple[int, int, int, slice]]:
    """The pieces with the rows that each has of a batch, and with their batches."""
    for begin, end in _pieces(_n_rows(values, indptr), n_cols * values.element_size(), batch_size):
        size, first = min(batch_size, end - begin), begin // batch_size
        yield begin, end, size, slice(first, first + -(-(end - begin) // size))


def _centred(
    values: Tensor,
    indptr: _Optional,
    indices: _Optional,
    mean: _Optional,
    n_cols: int,
    batch_size: int,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Pieces of X_c [m, b, D], with their batches and their rows inside of these."""
    for begin, end, size, batches in _batches_of(values, indptr, n_cols, batch_size):
        x = torch.ops.fastclust.lowrank_center(
            values[begin:end] if indptr is None else values,
            None if indptr is None else indptr[begin : end + 1],  # positions stay absolute
            indices,
            None if mean is None else mean[batches],
            n_cols,
            size,
        )
        yield batches, slice(begin % batch_size, begin % batch_size + size), x


# The arguments of a product begin with those of _centred; the last two have a factor besides.


@without_autocast
def gram(*rows: Any) -> Tensor:
    values, indptr, *_, n_cols, batch_size = rows
    out = values.new_zeros(n_batches(values, indptr, batch_size), n_cols, n_cols)
    for batches, _, x in _centred(*rows):
        out[batches].baddbmm_(x.mT, x)
    return out


@without_autocast
def project(*arguments: Any) -> Tensor:
    *rows, v = arguments
    out = v.new_zeros(v.shape[0], rows[-1], v.shape[2])
    for batches, places, x in _centred(*rows):
        out[batches, places] = x @ v[batches]
    return out


@without_autocast
def project_transposed(*arguments: Any) -> Tensor:
    *rows, q = arguments
    out = q.new_zeros(q.shape[0], rows[-2], q.shape[2])
    for batches, places, x in _centred(*rows):
        out[batches].baddbmm_(x.mT, q[batches, places])
    return out


@without_autocast
def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


for _function in (gram, project, project_transposed, multiply):
    torch.library.impl(f"fastclust::lowrank_{_function.__name__}", "cuda", func=_function)


def csr_mean(
    values: Tensor, indptr: Tensor, indices: Tensor, n_cols: int, batch_size: int
) -> Tensor:
    """Column means [M, D] of CSR rows, of which lowrank_mean on CUDA makes a dense copy."""
    n_rows, shape = _n_rows(values, indptr), (n_batches(values, indptr, batch_size), n_cols)
    out = values.new_zeros(shape, dtype=torch.float64)
    for begin, end, size, batches in _batches_of(values, indptr, n_cols, batch_size):
        means = torch.ops.fastclust.lowrank_mean(
            values, indptr[begin : end + 1], indices, n_cols, size
        )
        # the piece's share of its batch, where it is not whole batches
        share = min(1.0, (end - begin) / min(batch_size, n_rows - batches.start * batch_size))
        out[batches] += share * means.double()
    return out.to(values.dtype)
