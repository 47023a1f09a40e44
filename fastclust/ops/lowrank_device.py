"""The low-rank operators on CUDA tensors, composed of torch's own.

Same schemas and meanings as csrc/lowrank/lowrank.h, in batched torch calls. Dense rows are held
once more, centred; sparse rows stay sparse except in the Gram matrix. Not yet kernels of our own:
orthonormalising launches a few kernels a column, cutting CSR rows into several batches and
thin_svd may wait for the device. The functions take tensors of any device: tests compare them
with the native ones on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__: list[str] = []

_Optional = Tensor | None


def _blocks(
    values: Tensor, indptr: _Optional, indices: _Optional, n_cols: int, batch_size: int
) -> Iterator[Tensor]:
    """The batches [b, D] of CSR rows, in CSR; torch builds no CSR batches of unequal nnz."""
    assert indptr is not None and indices is not None
    n_rows = indptr.shape[0] - 1
    whole = torch.sparse_csr_tensor(
        indptr, indices.long(), values, (n_rows, n_cols), check_invariants=False
    )
    if batch_size >= n_rows:
        yield whole
        return
    rows = whole.to_sparse_coo()
    row = rows.indices()[0]
    for begin in range(0, n_rows, batch_size):
        count = min(batch_size, n_rows - begin)
        inside = (row >= begin) & (row < begin + count)
        part = torch.stack([row[inside] - begin, rows.indices()[1][inside]])
        yield torch.sparse_coo_tensor(
            part, rows.values()[inside], (count, n_cols), is_coalesced=True, check_invariants=False
        ).to_sparse_csr()


def _transposed(block: Tensor) -> Tensor:
    """X^T of a CSR matrix, in CSR: a stable sort by column keeps the order of sums fixed."""
    return block.t().to_sparse_csr()


def _padded(values: Tensor, mean: _Optional, batch_size: int) -> Tensor:
    """Dense centred batches [M, B, D]; rows past a short last batch are zero."""
    n_rows, n_cols = values.shape
    n_batches = -(-n_rows // batch_size)
    out = values.new_zeros(n_batches * batch_size, n_cols)
    out[:n_rows] = values
    if mean is not None:
        out[:n_rows] -= mean.repeat_interleave(batch_size, 0)[:n_rows]
    return out.view(n_batches, batch_size, n_cols)


def mean(
    values: Tensor, indptr: _Optional, indices: _Optional, n_cols: int, batch_size: int
) -> Tensor:
    if indptr is None:
        parts = []
        for batch in values.split(batch_size):  # differences keep constant columns exact
            shift = (batch - batch[0]).sum(0, dtype=torch.float64) / batch.shape[0]
            parts.append(batch[0].double() + shift)
    else:
        parts = [
            (_transposed(b).double() @ b.values().new_ones(b.shape[0], 1).double())[:, 0]
            / b.shape[0]
            for b in _blocks(values, indptr, indices, n_cols, batch_size)
        ]
    return torch.stack(parts).to(values.dtype)


def gram(
    values: Tensor,
    indptr: _Optional,
    indices: _Optional,
    mean: _Optional,
    n_cols: int,
    batch_size: int,
) -> Tensor:
    if indptr is None:
        x = _padded(values, mean, batch_size)
        return x.mT @ x
    parts = []
    for i, block in enumerate(_blocks(values, indptr, indices, n_cols, batch_size)):
        dense = block.to_dense() if mean is None else block.to_dense() - mean[i]
        parts.append(dense.T @ dense)
    return torch.stack(parts)


def project(
    values: Tensor,
    indptr: _Optional,
    indices: _Optional,
    mean: _Optional,
    n_cols: int,
    batch_size: int,
    v: Tensor,
) -> Tensor:
    if indptr is None:
        return _padded(values, mean, batch_size) @ v
    out = v.new_zeros(v.shape[0], batch_size, v.shape[2])
    for i, block in enumerate(_blocks(values, indptr, indices, n_cols, batch_size)):
        w = block @ v[i]
        out[i, : block.shape[0]] = w if mean is None else w - mean[i] @ v[i]
    return out


def project_transposed(
    values: Tensor,
    indptr: _Optional,
    indices: _Optional,
    mean: _Optional,
    n_cols: int,
    batch_size: int,
    q: Tensor,
) -> Tensor:
    if indptr is None:
        return _padded(values, mean, batch_size).mT @ q
    parts = []
    for i, block in enumerate(_blocks(values, indptr, indices, n_cols, batch_size)):
        inside = q[i, : block.shape[0]]
        z = _transposed(block) @ inside
        parts.append(z if mean is None else z - torch.outer(mean[i], inside.sum(0)))
    return torch.stack(parts)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def orthonormalize(
    y: Tensor, v: _Optional, bound: _Optional, root: float, passes: int
) -> tuple[Tensor, Tensor]:
    if bound is None:
        bound = y.new_zeros(y.shape[0], dtype=torch.float64)
    if v is None:
        return _gram_schmidt(y.double(), y.dtype)[0].to(y.dtype), bound
    wide = y.double()
    shift = 32 * torch.finfo(y.dtype).eps * wide.flatten(1).norm(dim=1) - root * bound  # [M]
    q, r = _gram_schmidt(wide + shift[:, None, None] * v.double(), y.dtype)
    if root <= 0.5:
        bound = bound.maximum(torch.linalg.svdvals(r)[:, -1] - shift)
    return q.to(y.dtype), bound


def thin_svd(y: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    q, r = _gram_schmidt(y.double(), y.dtype)
    u, s, vt = torch.linalg.svd(r)
    keep = s > 0
    u = torch.where(keep[:, None, :rank], u[:, :, :rank], 0.0)
    return (q @ u).to(y.dtype), s, torch.where(keep[:, :, None], vt, 0.0)


def _gram_schmidt(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In double, twice for every column: orthonormal at any condition number."""
    eps = torch.finfo(dtype).eps
    columns = wide.mT.contiguous()  # [M, l, n]
    r = columns.new_zeros(columns.shape[0], columns.shape[1], columns.shape[1])
    length = columns.norm(dim=2)  # [M, l]
    noise = 8 * torch.finfo(torch.float64).eps * length
    if dtype == torch.float32:
        noise = noise.maximum(0.5 * eps * length.amax(1, keepdim=True))
    for j in range(columns.shape[1]):
        column = columns[:, j : j + 1]  # [M, 1, n]
        for _ in range(2):
            part = column @ columns[:, :j].mT  # [M, 1, j]
            r[:, :j, j] += part[:, 0]
            column = column - part @ columns[:, :j]
        after = column[:, 0].norm(dim=1)
        r[:, j, j] = torch.where(after > noise[:, j], after, 0.0)
        scale = torch.where(after > noise[:, j], 1 / after, 0.0)
        columns[:, j : j + 1] = column * scale[:, None, None]
    return columns.mT.contiguous(), r


def normal(
    like: Tensor, n_batches: int, first_batch: int, n_rows: int, width: int, seed: int
) -> Tensor:
    """Philox 4x32-10 and Box-Muller of csrc/common/rng.h in 64-bit integers."""
    low = 0xFFFFFFFF
    size = n_rows * width
    index = torch.arange(-(-size // 4), device=like.device).expand(n_batches, -1)
    stream = torch.arange(first_batch, first_batch + n_batches, device=like.device)[:, None]
    x, y = index & low, index >> 32
    z, w = (stream & low).expand_as(index), (stream >> 32).expand_as(index)
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        # Products wrap at 64 bits like unsigned ones; the shifted half is masked.
        p0, p1 = x * 0xD2511F53, z * 0xCD9E8D57
        x, y, z, w = (p1 >> 32 & low) ^ y ^ k0, p1 & low, (p0 >> 32 & low) ^ w ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([x, y, z, w], -1).to(like.dtype) * 2.0**-32  # [M, size / 4, 4]
    radius = (-2 * (words[..., ::2] + 2.0**-33).log()).sqrt()
    angle = 2 * math.pi * words[..., 1::2]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)  # [M, size / 4, 2, 2]
    scale = 1 / (math.sqrt(n_rows) + math.sqrt(width))
    return (scale * pairs).flatten(1)[:, :size].reshape(n_batches, n_rows, width).contiguous()


for _function in (
    mean,
    gram,
    project,
    project_transposed,
    multiply,
    orthonormalize,
    thin_svd,
    normal,
):
    torch.library.impl(f"fastclust::lowrank_{_function.__name__}", "cuda", func=_function)
