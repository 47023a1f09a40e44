"""What the methods do to their constants: weighted rows, tensors from host arrays, seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from sklearn.preprocessing import normalize
from torch import Tensor

from fastclust import ops

__all__ = [
    "as_tensor",
    "check_counts",
    "derive_seed",
    "inverse_document_frequency",
    "kmeans_labels",
    "nearest_center",
    "project",
    "sample_rows",
    "sampled_kmeans",
    "stacked_unit_rows",
    "uniform_parameter",
    "unit_rows",
    "weighted_rows",
]

NORM_FLOOR = 1e-12
# Restarts of k-means see at most so many rows.
SAMPLE_ROWS = 1 << 16
# Sums of squares of less than this stay within float32.
_LARGE = 1e12


def inverse_document_frequency(features: Any) -> npt.NDArray[np.float32]:
    """Smooth idf [D] of X [N, D], dense or CSR: 1 + ln((1 + N) / (1 + nodes that have it))."""
    n, d = features.shape
    if sp.issparse(features):
        frequency = np.bincount(features.indices, minlength=d)
    else:
        frequency = np.count_nonzero(features, axis=0)
    return (np.log((1.0 + n) / (1.0 + frequency)) + 1.0).astype(np.float32)


def check_counts(features: Any) -> None:
    """Raise ``ValueError`` unless X [N, D] is what tf-idf may weight: nowhere negative."""
    if features.min() < 0:
        raise ValueError(
            f"weighting 'tf-idf' must be given features of 0 or more, got {features.min():g}; use "
            f"weighting='l2'"
        )


def weighted_rows(features: Any, idf: npt.NDArray[np.float32] | None = None) -> Any:
    """Rows of X [N, D], dense or CSR, of unit length after columns were weighted by idf [D].

    Zero rows stay zero.
    """
    if idf is not None and sp.issparse(features):
        data = features.data * idf[features.indices]
        features = sp.csr_array((data, features.indices, features.indptr), features.shape)
    elif idf is not None:
        features = features * idf
    values = features.data if sp.issparse(features) else features
    if values.size and max(values.max(), -values.min()) > _LARGE:
        return normalize(features.astype(np.float64)).astype(np.float32)
    return normalize(features)


def as_tensor(
    x: npt.NDArray[np.float32] | sp.csr_array | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """A host matrix [N, D] as a tensor: dense stays dense, CSR becomes a sparse CSR tensor."""
    if isinstance(x, Tensor):
        return x.to(device=device)
    if isinstance(x, np.ndarray):
        return torch.as_tensor(np.ascontiguousarray(x), device=device)
    parts = (x.indptr.astype(np.int64), x.indices.astype(np.int64), x.data)
    indptr, indices, values = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    with warnings.catch_warnings():
        # torch tells once per process that CSR tensors are in beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        tensor = torch.sparse_csr_tensor(
            indptr, indices, values, size=x.shape, check_invariants=False
        )
    return tensor.to(device=device)


def derive_seed(seed: int, *path: int) -> int:
    """A seed for one draw of a run, from the run's seed and the draw's name as numbers.

    Every draw is keyed by what it is for instead of being taken from a stream, so that a resumed
    run, or one evaluated more often, draws the same numbers.
    """
    return int(np.random.SeedSequence((seed, *path)).generate_state(1)[0] >> 1)


def uniform_parameter(
    shape: tuple[int, ...], bound: float, generator: torch.Generator
) -> torch.nn.Parameter:
    """A parameter drawn uniformly from [-bound, bound]; float32, on the CPU."""
    return torch.nn.Parameter(
        torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    )


def _with_norms(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [N, d] and the norms [N, 1] of its rows.

    Where a norm or its square would overflow, x comes back with such rows shrunk by a power of two,
    and the factors [N, 1] besides. That costs a pass over x, and is looked for in the norms but
    where it would break a compiled graph. Looking waits for a GPU: in a training or a capture on
    one, where such rows are those of a run that has diverged, they are left to become zeros.
    """
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if x.is_cuda and (x.requires_grad or torch.cuda.is_current_stream_capturing()):
        return x, norms, None
    if not torch.compiler.is_compiling() and math.isfinite(norms.detach().sum()):
        return x, norms, None
    largest = math.frexp(torch.finfo(x.dtype).max)[1]  # the exponent of the dtype's range
    peaks = x.detach().abs().amax(1, keepdim=True)
    exponents = torch.frexp(peaks).exponent.clamp(max=largest - 2)  # of a power that is normal
    shrunk = torch.ldexp(torch.ones_like(peaks), -exponents)
    factor = torch.where(peaks > 2.0 ** (largest // 3), shrunk, 1.0)
    x = x * factor
    return x, torch.linalg.vector_norm(x, dim=1, keepdim=True), factor


class _StackedUnitRows(torch.autograd.Function):
    """The unit rows of two views in one array. Keeps the result and the norms, not the views."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        n, d = first.shape
        out = first.new_empty(2 * n, d)
        norms = first.new_empty(2 * n, 1)
        shrinkage = None
        for half, view in ((slice(0, n), first), (slice(n, None), second)):
            view, norm, factor = _with_norms(view)
            norms[half] = norm.clamp_min_(NORM_FLOOR)
            torch.div(view, norms[half], out=out[half])
            if factor is not None:
                shrinkage = norms.new_ones(2 * n, 1) if shrinkage is None else shrinkage
                shrinkage[half] = factor
        # A norm that does not fit its dtype: the gradient is 0 to rounding.
        ctx.save_for_backward(out, norms if shrinkage is None else norms / shrinkage)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        out, norms = ctx.saved_tensors
        # d(x / |x|): the part of the gradient along the row itself drops out.
        views = []
        for g, y, norm in zip(gradients[0].chunk(2), out.chunk(2), norms.chunk(2), strict=True):
            along = torch.linalg.vecdot(g, y)[:, None]
            views.append(torch.addcmul(g, y, along, value=-1.0).div_(norm))
        return views[0], views[1]


def stacked_unit_rows(first: Tensor, second: Tensor) -> Tensor:
    """Two views [N, d] as unit rows in one array [2N, d]; zero rows stay zero."""
    return _StackedUnitRows.apply(first, second)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x [N, d] divided by their Euclidean norm; zero rows stay zero."""
    x, norms, _factor = _with_norms(x)
    return x / norms.clamp_min(NORM_FLOOR)


def project(x: Tensor, basis: Mapping[str, Tensor]) -> Tensor:
    """(x - mean) V^T for x [N, D], dense or CSR; V = ``basis["components"]`` [r, D]."""
    axes = basis["components"].T.contiguous()  # [D, r]
    return x @ axes - basis["mean"] @ axes


def nearest_center(z: Tensor, centers: Tensor) -> Tensor:
    """The centre [K, d] nearest to each row of z [N, d], int64 [N]."""
    return torch.cdist(z.double(), centers.double()).argmin(1)


def sample_rows(n: int, count: int, seed: int) -> Tensor:
    """``count`` distinct numbers below n, ascending, int64; all of them where n is no more."""
    if n <= count:
        return torch.arange(n)
    chosen = np.random.default_rng(derive_seed(seed, n)).choice(n, count, replace=False)
    return torch.from_numpy(np.sort(chosen))


def sampled_kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    n_init: int,
    seed: int,
    rows: int = SAMPLE_ROWS,
    max_iter: int = 300,
) -> ops.KMeansResult:
    """k-means of many points: restarts on ``rows`` of them, then one run of all.

    Up to ``rows`` points this is :func:`fastclust.ops.kmeans`. Beyond, the centres that the
    restarts find on a random sample are where at most ``max_iter`` iterations on all points begin.
    """
    n = x.shape[0]
    if n <= max(rows, n_clusters):
        return ops.kmeans(x, n_clusters, n_init=n_init, seed=seed)
    chosen = sample_rows(n, max(rows, n_clusters), seed).to(x.device)
    start = ops.kmeans(x[chosen], n_clusters, n_init=n_init, seed=seed).centers
    return ops.kmeans(x, n_clusters, init=start, max_iter=max_iter, seed=seed)


def kmeans_labels(result: Any) -> npt.NDArray[np.int64]:
    """Labels of an ``ops.kmeans`` result on the host."""
    return np.asarray(result.labels.cpu(), dtype=np.int64)
