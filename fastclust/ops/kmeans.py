"""k-means with all restarts at once: greedy k-means++, Lloyd's iterations, repaired clusters.

The native side (``csrc/kmeans``) has four operators, all on centred data; this module checks the
input, runs them in order and picks the restart with the least inertia. Labels are integers and
centres are means over a discrete choice, so nothing here is differentiable: results are detached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastclust import _library  # noqa: F401  (registers the operators)
from fastclust.interop import as_operand
from fastclust.ops.powers import times_power
from fastclust.validation import check_dense, check_integer

_METHODS = {"k-means++": 0, "random": 1, "paper-code": 2}
# The released HSAN code: at most this many iterations, until (sum_k |dC_k|)^2 < 1e-4.
_PAPER_CODE_ITERATIONS = 500
_PAPER_CODE_TOLERANCE = 1e-4
# On CUDA the host asks only this often whether all restarts have converged.
_CUDA_ITERATIONS_PER_CHECK = 16
# Starts worked through at a time: no more fit a grid of CUDA blocks.
_MOST_STARTS = 2**16 - 1
_MAX_FINAL_REPAIRS = 16


@dataclass(frozen=True)
class KMeansResult:
    """Outcome of :func:`kmeans`: the restart with the least inertia.

    Attributes
    ----------
    labels
        int64 [N], the nearest centre of every point, on the device of the data.
    centers
        [K, d], in the dtype and on the device of the data.
    inertia
        Sum of squared distances of the points to their centres, summed in float64.
    n_iter
        Lloyd iterations of that restart. Both are tensors inside ``torch.compile``.
    """

    labels: Tensor
    centers: Tensor
    inertia: float
    n_iter: int


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    n_init: int = 10,
    max_iter: int = 300,
    tol: float = 1e-4,
    init: str | Tensor | None = None,
    seed: int = 0,
) -> KMeansResult:
    """Cluster the rows of ``x`` into ``n_clusters`` groups of least squared distance.

    Minimises ``sum_i min_k |x_i - c_k|^2`` by Lloyd's iterations [1]_ from ``n_init`` starts, all
    at once. Distances are taken on centred data and near ties are decided in float64, so data far
    from the origin lose nothing; equal distances go to the lowest index. An empty cluster moves to
    the point farthest from its centre. With fewer distinct points than clusters some clusters stay
    empty. The same ``seed`` gives the same bits for any number of threads.

    Not differentiable: the result is detached from ``x``.

    Parameters
    ----------
    x
        [N, d], float32 or float64, on CPU or CUDA, any strides. A centred copy is made.
    n_clusters
        K, between 1 and N.
    n_init
        Starts; the one with the least inertia is returned. Ignored with a tensor ``init`` and with
        ``"paper-code"``.
    max_iter
        Most iterations of a start.
    tol
        A start ends when the squared movements of its centres add up to at most ``tol`` times the
        mean variance of the columns of ``x`` (as in scikit-learn).
    init
        - ``None`` or ``"k-means++"``: greedy k-means++ [2]_ with 2 + floor(log K) trials a step.
        - ``"random"``: K distinct points.
        - ``"paper-code"``: the start and the stopping rule of the released HSAN code: of 20 draws
          of K distinct points the one with the least sum of *all* N K squared distances (which
          favours points near the mean), one run until the lengths of the centres' movements add up
          to less than 0.01 or 500 iterations; ``n_init``, ``max_iter`` and ``tol`` do not apply.
          Two things differ: the random numbers, and that an empty cluster is repaired (there its
          centre becomes NaN and draws every point to itself).
        - tensor [K, d]: one run from these centres (a warm start).
    seed
        Seed of the counter-based random numbers.

    Returns
    -------
    KMeansResult
        ``labels`` int64 [N], ``centers`` [K, d], ``inertia``, ``n_iter``.

    Raises
    ------
    TypeError
        ``x`` or ``init`` is not a floating-point tensor, or a number has the wrong type.
    ValueError
        Wrong shapes, NaN or infinite values, ``n_clusters`` outside [1, N], a negative ``tol``.

    References
    ----------
    .. [1] S. P. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982).
    .. [2] D. Arthur and S. Vassilvitskii, "k-means++: the advantages of careful seeding",
       SODA 2007.

    Examples
    --------
    >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
    >>> result = kmeans(x, 2)
    >>> result.inertia
    1.0
    >>> bool(result.labels[0] == result.labels[1])
    True
    """
    x, init = as_operand(x), as_operand(init)
    if torch.compiler.is_compiling():
        given, method = (init, None) if isinstance(init, Tensor) else (None, init)
        fit = torch.ops.fastclust.kmeans_fit
        return KMeansResult(*fit(x, n_clusters, n_init, max_iter, tol, given, method, seed))
    _check(x, n_clusters, n_init, max_iter, tol, seed)
    ops = torch.ops.fastclust
    xc, mean, variance = ops.kmeans_center(x.detach().contiguous())
    exponent = _exponent(x, xc, variance.item())
    if exponent:  # squared distances would overflow or vanish
        xc = times_power(xc, -exponent)
        variance = xc.double().square().sum() / x.numel()

    norm_rule = isinstance(init, str) and init == "paper-code"
    if norm_rule:
        max_iter, n_init = _PAPER_CODE_ITERATIONS, 1
        tolerance = torch.full_like(variance, _PAPER_CODE_TOLERANCE)
        tolerance = times_power(times_power(tolerance, -exponent), -exponent)
    else:
        tolerance = variance * tol
    if isinstance(init, Tensor):
        centers = _given_centers(init, x, n_clusters, mean, xc, exponent)
    else:
        method = _METHODS.get("k-means++" if init is None else init)
        if method is None:
            raise ValueError(
                f"init must be None, a tensor [K, d] or one of {', '.join(map(repr, _METHODS))}, "
                f"was {init!r}"
            )
        centers = ops.kmeans_init(xc, n_clusters, n_init, method, seed % 2**63)

    labels, inertia, ends, n_iter = _best_end(xc, centers, tolerance, norm_rule, max_iter)
    return KMeansResult(
        labels=labels.long(),
        centers=(times_power(ends[:, : x.shape[1]].double(), exponent) + mean).to(x.dtype),
        inertia=times_power(times_power(inertia, exponent), exponent).item(),
        n_iter=n_iter,
    )


def _best_end(
    xc: Tensor, centers: Tensor, tolerance: Tensor, norm_rule: bool, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Labels, inertia, centers [K, dp] and iterations of the best of the starts [R, K, dp]."""
    ops = torch.ops.fastclust
    found = []
    for starts in centers.split(_MOST_STARTS):
        ends, n_iter = _lloyd(xc, starts, tolerance, norm_rule, max_iter)
        labels, inertia = ops.kmeans_assign(xc, ends)
        best = int(inertia.argmin())
        found.append((labels[best], inertia[best], ends[best], int(n_iter[best])))
    labels, inertia, end, iterations = min(found, key=lambda end: float(end[1]))
    # Between the last update and the last assignment a cluster can lose its last point.
    for _ in range(_MAX_FINAL_REPAIRS):
        n_used = int((torch.bincount(labels, minlength=len(end)) > 0).sum())
        if n_used == len(end) or inertia.item() == 0.0:
            break
        moved, _, _ = ops.kmeans_lloyd(xc, end[None], tolerance, norm_rule, 1)
        all_labels, all_inertia = ops.kmeans_assign(xc, moved)
        labels, inertia, end = all_labels[0], all_inertia[0], moved[0]
        iterations += 1
    return labels, inertia, end, iterations


def _lloyd(
    xc: Tensor, centers: Tensor, tolerance: Tensor, norm_rule: bool, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Iterate until every restart has converged; (centers [R, K, dp], n_iter int64 [R])."""
    chunk = _CUDA_ITERATIONS_PER_CHECK if xc.is_cuda else max_iter
    lloyd = torch.ops.fastclust.kmeans_lloyd
    centers, n_iter, converged = lloyd(xc, centers, tolerance, norm_rule, min(chunk, max_iter))
    for done in range(chunk, max_iter, chunk):
        left = torch.nonzero(~converged)[:, 0]  # [restarts still moving]
        if left.numel() == 0:
            break
        steps = min(chunk, max_iter - done)
        moved, more, finished = lloyd(xc, centers[left], tolerance, norm_rule, steps)
        centers[left] = moved
        n_iter[left] += more
        converged[left] = finished
    return centers, n_iter


def _given_centers(
    init: Tensor, x: Tensor, n_clusters: int, mean: Tensor, xc: Tensor, exponent: int
) -> Tensor:
    """Shift, scale and pad a warm start like the data: [1, K, dp]."""
    if init.shape != (n_clusters, x.shape[1]):
        raise ValueError(
            f"init must have shape [n_clusters, d] = [{n_clusters}, {x.shape[1]}], "
            f"got {list(init.shape)}"
        )
    if not init.is_floating_point():
        raise TypeError(f"init must hold floating-point centers, got {init.dtype}")
    if init.device != x.device:
        raise ValueError(f"init must be on the device of x ({x.device}), got one on {init.device}")
    if not torch.isfinite(init).all():
        raise ValueError("init must hold finite values, found NaN or infinity")
    centers = xc.new_zeros(1, n_clusters, xc.shape[1])
    centers[0, :, : x.shape[1]] = times_power(init.detach().double() - mean, -exponent)
    return centers


def _exponent(x: Tensor, xc: Tensor, variance: float) -> int:
    """Of the power of two that centred data must be divided by; 0: they can stay as they are."""
    info = torch.finfo(x.dtype)
    if variance > math.sqrt(info.tiny) and variance * x.numel() < info.max / 16:
        return 0
    largest = float(xc.abs().max())
    if math.isfinite(largest):
        return math.frexp(largest)[1]
    if x.isfinite().all():
        raise ValueError(f"x is too widely spread for differences in {x.dtype}: scale it down")
    raise ValueError("x must hold finite values, found NaN or infinity")


def _check(x: Any, n_clusters: int, n_init: int, max_iter: int, tol: float, seed: int) -> None:
    check_dense("x", x)
    if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x must have shape [N, d] with N, d >= 1, got {list(x.shape)}")
    if x.shape[0] >= 2**31:
        raise ValueError(f"x must have fewer than 2^31 rows, got {x.shape[0]}")
    check_integer("n_clusters", n_clusters, 1)
    check_integer("n_init", n_init, 1)
    check_integer("max_iter", max_iter, 1)
    check_integer("seed", seed)
    if n_clusters > x.shape[0]:
        raise ValueError(
            f"n_clusters must not exceed the number of points, got n_clusters={n_clusters} for "
            f"{x.shape[0]} points"
        )
    if not isinstance(tol, Real) or not tol >= 0:
        raise ValueError(f"tol must be a number >= 0, got {tol!r}")


@torch.library.custom_op("fastclust::kmeans_fit", mutates_args=())
def _fit(
    x: Tensor,
    n_clusters: int,
    n_init: int,
    max_iter: int,
    tol: float,
    init: Tensor | None,
    method: str | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole of :func:`kmeans` as one operator: its loops depend on the data."""
    result = kmeans(
        x,
        n_clusters,
        n_init=n_init,
        max_iter=max_iter,
        tol=tol,
        init=method if init is None else init,
        seed=seed,
    )
    inertia = x.new_tensor(result.inertia, dtype=torch.float64)
    return result.labels, result.centers, inertia, x.new_tensor(result.n_iter, dtype=torch.int64)


@_fit.register_fake
def _(x: Tensor, n_clusters: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty(n_clusters, x.shape[1]),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("fastclust::kmeans_center")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, d = x.shape
    xc = x.new_empty(n, (d + 15) // 16 * 16)
    return xc, x.new_empty(d, dtype=torch.float64), x.new_empty((), dtype=torch.float64)


@torch.library.register_fake("fastclust::kmeans_init")
def _(x: Tensor, n_clusters: int, n_restarts: int, method: int, seed: int) -> Tensor:
    return x.new_empty(n_restarts, n_clusters, x.shape[1])


@torch.library.register_fake("fastclust::kmeans_lloyd")
def _(
    x: Tensor, centers: Tensor, tolerance: Tensor, norm_rule: bool, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    n_restarts = centers.shape[0]
    n_iter = x.new_empty(n_restarts, dtype=torch.int64)
    return torch.empty_like(centers), n_iter, x.new_empty(n_restarts, dtype=torch.bool)


@torch.library.register_fake("fastclust::kmeans_assign")
def _(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    n_restarts = centers.shape[0]
    labels = x.new_empty(n_restarts, x.shape[0], dtype=torch.int32)
    return labels, x.new_empty(n_restarts, dtype=torch.float64)
