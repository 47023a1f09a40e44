"""Matrix products of the low-rank operators on CUDA tensors: cuBLAS's, through torch.

Same schemas and meanings as csrc/lowrank/lowrank.h; the centred rows are held dense, once more.
Everything that is not a product has kernels of its own in csrc/lowrank/lowrank_cuda.cu. Nothing
here waits for the device. With ``torch.backends.cuda.matmul.allow_tf32`` the products, and with
them the factors, have the precision of TF32; ``torch.autocast`` does not reach them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclust.interop import without_autocast

__all__: list[str] = []

_Optional = Tensor | None


@without_autocast
def gram(
    values: Tensor,
    indptr: _Optional,
    indices: _Optional,
    mean: _Optional,
    n_cols: int,
    batch_size: int,
) -> Tensor:
    x = torch.ops.fastclust.lowrank_center(values, indptr, indices, mean, n_cols, batch_size)
    return x.mT @ x


@without_autocast
def project(
    values: Tensor,
    indptr: _Optional,
    indices: _Optional,
    mean: _Optional,
    n_cols: int,
    batch_size: int,
    v: Tensor,
) -> Tensor:
    x = torch.ops.fastclust.lowrank_center(values, indptr, indices, mean, n_cols, batch_size)
    return x @ v


@without_autocast
def project_transposed(
    values: Tensor,
    indptr: _Optional,
    indices: _Optional,
    mean: _Optional,
    n_cols: int,
    batch_size: int,
    q: Tensor,
) -> Tensor:
    x = torch.ops.fastclust.lowrank_center(values, indptr, indices, mean, n_cols, batch_size)
    return x.mT @ q


@without_autocast
def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


for _function in (gram, project, project_transposed, multiply):
    torch.library.impl(f"fastclust::lowrank_{_function.__name__}", "cuda", func=_function)
