"""SSGC: an embedding by smoothing attributes over the graph, without any training.

Simple spectral graph convolution (Zhu and Koniusz, 2021) averages the first T powers of the
symmetric propagation S = D^-1/2 (A + I) D^-1/2 applied to the attributes. Leading singular vectors
of the result, with rows of unit length, are what k-means then clusters.

Two recipes: ``"plain"`` does just that. ``"multiview"`` does it for two weightings of the
attributes and four scalings of their singular vectors, joins the views, and picks T by how well
clusterings from disjoint halves of the data agree; attributes that only encode degrees are replaced
by the degrees. No label is used anywhere.

Everything is done on the leading singular pairs of the attributes: smoothing acts on
rows and scaling on columns, so one smoothing of N x 256 numbers serves all scalings, and no
N x D array is made.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from scipy.stats import rankdata
from sklearn.metrics import normalized_mutual_info_score
from sklearn.preprocessing import normalize

from fastclust import ops
from fastclust.graph import Graph

__all__ = ["ssgc_embedding"]

Features: TypeAlias = Any  # numpy.ndarray or scipy.sparse.csr_array, float32 [N, D]
Recipe = Literal["multiview", "plain"]
Weighting = Literal["auto", "l2", "tf-idf"]

_PAIRS = 256  # leading singular pairs of the attributes that are kept
_NEGLIGIBLE = 1e-8  # squared singular values below this share of the largest are rounding
_KEEP = 0.05  # share of the unsmoothed attributes
_DEFAULT_STEPS = 8
_OTHER_STEPS = (0, 1, 2, 4)
_MARGIN = 1.05  # by how much fewer steps must agree better to be preferred
_SPLITS = 2
_RESTARTS = 3
_DEGREE_SHARE = 0.9
_PLAIN_COMPONENTS = 20


def ssgc_embedding(
    features: Features,
    adjacency: sp.csr_array,
    n_clusters: int,
    *,
    recipe: Recipe = "multiview",
    n_steps: int | None = None,
    n_components: int | None = None,
    weighting: Weighting = "auto",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Embed the nodes of an attributed graph for k-means.

    Parameters
    ----------
    features : numpy.ndarray or scipy.sparse.csr_array
        X [N, D], float32, as from :func:`fastclust.validation.check_features`.
    adjacency : scipy.sparse.csr_array
        A [N, N], as from :func:`fastclust.validation.check_adjacency`.
    n_clusters : int
        K; sets the default size of the embedding, and the clusterings that choose T.
    recipe : {"multiview", "plain"}, default "multiview"
        See the module's head.
    n_steps : int, optional
        T, the number of propagation steps averaged. By default 8, for ``"multiview"`` unless 0, 1,
        2 or 4 steps give a clearly better agreement between halves of the data.
    n_components : int, optional
        Width of the embedding and of each view; by default 2 K (``"multiview"``) or 20
        (``"plain"``), or what the data allow.
    weighting : {"auto", "l2", "tf-idf"}, default "auto"
        Rows of unit length, of the attributes as they are or after smooth tf-idf. ``"auto"``: both
        for ``"multiview"`` (tf-idf only where no attribute is negative), ``"l2"`` for ``"plain"``.
    seed : int, default 0
        Seed of the random sketches and splits.
    device : torch.device or str, default "cpu"
        Where to compute.

    Returns
    -------
    embedding : torch.Tensor
        float32 [N, n_components] with rows of unit length (zero for nodes without attributes near
        them), or [N, 1] with the rank of the degree in (0, 1].
    info : dict
        ``recipe`` (``"multiview"``, ``"plain"`` or ``"degree"``), ``n_steps`` and ``agreement``
        (NMI by number of steps, or None where nothing was chosen).

    Raises
    ------
    ValueError
        Unknown ``recipe`` or ``weighting``, negative ``n_steps``, tf-idf of negative attributes.

    References
    ----------
    Zhu, H. and Koniusz, P. (2021). Simple spectral graph convolution. ICLR.
    """
    _check(features, recipe, n_steps, n_components, weighting)
    if recipe == "multiview" and weighting == "auto" and _encodes_degree(features, adjacency):
        degree = np.asarray(adjacency.sum(axis=1)).reshape(-1)
        rank = (rankdata(degree) / degree.size).astype(np.float32)
        info = {"recipe": "degree", "n_steps": 0, "agreement": None}
        return torch.from_numpy(rank[:, None]).to(device), info

    if recipe == "plain":
        weightings = ["l2" if weighting == "auto" else weighting]
    elif weighting == "auto":
        weightings = ["l2", "tf-idf"] if _minimum(features) >= 0 else ["l2"]
    else:
        weightings = [weighting]

    agreement = None
    if n_steps is None and recipe == "multiview":
        agreement = _agreement(features, adjacency, n_clusters, weightings[-1], seed, device)
        n_steps = _choose_steps(agreement)
    elif n_steps is None:
        n_steps = _DEFAULT_STEPS

    width = n_components or (2 * n_clusters if recipe == "multiview" else _PLAIN_COMPONENTS)
    graph = Graph(adjacency, norm="sym").to(device)
    views = []
    for name in weightings:
        q, energy, mean_energy = _leading_pairs(_weighted(features, name), seed, device)
        smooth = _smoothed(graph, q, (n_steps,))[n_steps]
        for scale in _scalings(energy, mean_energy, recipe):
            views.append(_leading_rows(smooth, scale, width))
    embedding = views[0]
    if len(views) > 1:
        joined = torch.cat(views, dim=1)  # [N, 8 width]
        embedding = _leading_rows(joined, torch.ones(joined.shape[1]), width)
    return embedding, {"recipe": recipe, "n_steps": n_steps, "agreement": agreement}


def _check(
    features: Features,
    recipe: str,
    n_steps: int | None,
    n_components: int | None,
    weighting: str,
) -> None:
    if recipe not in ("multiview", "plain"):
        raise ValueError(f"recipe must be 'multiview' or 'plain', got {recipe!r}")
    if weighting not in ("auto", "l2", "tf-idf"):
        raise ValueError(f"weighting must be 'auto', 'l2' or 'tf-idf', got {weighting!r}")
    if weighting == "tf-idf" and _minimum(features) < 0:
        raise ValueError(
            f"weighting 'tf-idf' must be given features of 0 or more, got {_minimum(features):g}; "
            f"use weighting='l2'"
        )
    if n_steps is not None and n_steps < 0:
        raise ValueError(f"n_steps must be 0 or more, got {n_steps}")
    if n_components is not None and n_components < 1:
        raise ValueError(f"n_components must be at least 1, got {n_components}")


# --- attributes -----------------------------------------------------------------------------------


def _minimum(features: Features) -> float:
    return float(features.min())


def _weighted(features: Features, weighting: str) -> Features:
    """Rows of unit length, after smooth tf-idf if wanted; zero rows stay zero."""
    if weighting == "tf-idf":
        n = features.shape[0]
        if sp.issparse(features):
            frequency = np.bincount(features.indices, minlength=features.shape[1])
        else:
            frequency = np.count_nonzero(features, axis=0)
        idf = (np.log((1.0 + n) / (1.0 + frequency)) + 1.0).astype(np.float32)  # [D]
        if sp.issparse(features):
            data = features.data * idf[features.indices]
            features = sp.csr_array((data, features.indices, features.indptr), features.shape)
        else:
            features = features * idf
    return normalize(features)


def _encodes_degree(features: Features, adjacency: sp.csr_array) -> bool:
    """Whether X is one-hot and its columns explain the nodes' degrees.

    The share of the variance of log(1 + degree) between columns, corrected for their
    number: an identity matrix explains everything and nothing.
    """
    x = sp.csr_array(features)
    n = x.shape[0]
    if x.nnz != n or (np.diff(x.indptr) != 1).any():
        return False
    _, group = np.unique(x.indices, return_inverse=True)
    n_groups = int(group.max()) + 1
    y = np.log1p(np.asarray(adjacency.sum(axis=1), np.float64).reshape(-1))
    total = float(((y - y.mean()) ** 2).sum())
    if n_groups == n or total == 0:
        return False
    means = np.bincount(group, weights=y) / np.bincount(group)
    within = float(((y - means[group]) ** 2).sum())
    return 1 - (within / (n - n_groups)) / (total / (n - 1)) >= _DEGREE_SHARE


def _leading_pairs(
    x: Features, seed: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Coordinates in the leading right singular vectors, their energies, and the mean over all D.

    Returns Q = X V [N, r], w [r] = squared singular values (float64, on the CPU), |X|_F^2 / D.
    """
    rank = min(_PAIRS, *x.shape)
    svd = ops.batched_svd(_tensor(x, device), rank, center=False, n_iter=4, seed=seed)
    u, s = svd.u[0], svd.s[0]
    energy = s.double().cpu() ** 2
    kept = max(1, int((energy > _NEGLIGIBLE * energy[0]).sum()))
    values = x.data if sp.issparse(x) else x
    mean_energy = float(np.square(values, dtype=np.float64).sum()) / x.shape[1]
    return u[:, :kept] * s[:kept], energy[:kept], mean_energy


def _tensor(x: Features, device: torch.device | str) -> torch.Tensor:
    if not sp.issparse(x):
        return torch.from_numpy(x).to(device)
    return torch.sparse_csr_tensor(
        torch.from_numpy(x.indptr), torch.from_numpy(x.indices), torch.from_numpy(x.data), x.shape
    ).to(device)


# --- smoothing and views --------------------------------------------------------------------------


def _smoothed(graph: Graph, q: torch.Tensor, steps: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """0.05 Q + 0.95 / T sum_{t=1..T} S^t Q for every T in ``steps``; Q itself for T = 0."""
    result = {0: q} if 0 in steps else {}
    power, total = q, torch.zeros_like(q)
    for t in range(1, max(steps) + 1):
        power = ops.propagate(graph, power)
        total += power
        if t in steps:
            result[t] = torch.add(_KEEP * q, total, alpha=(1 - _KEEP) / t)
    return result


def _scalings(energy: torch.Tensor, mean_energy: float, recipe: str) -> list[torch.Tensor]:
    """Column scalings [r] of the views: none, and three that whiten less or more."""
    if recipe == "plain":
        return [torch.ones_like(energy)]
    return [
        torch.ones_like(energy),
        energy.clamp(min=torch.finfo(torch.float32).tiny) ** -0.25,
        (energy + mean_energy).clamp(min=torch.finfo(torch.float32).tiny) ** -0.5,
        (energy + 10 * mean_energy).clamp(min=torch.finfo(torch.float32).tiny) ** -0.5,
    ]


def _leading_rows(m: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """U s of the leading ``width`` singular triplets of M diag(scale), rows of unit length.

    By the eigenvectors of the small Gram matrix, in float64: [N, c] with few columns c.
    """
    scale = scale.to(torch.float64)
    wide = m.to(torch.float64)
    gram = (wide.T @ wide).cpu() * scale[:, None] * scale  # [c, c]
    _, vectors = torch.linalg.eigh(gram)
    basis = scale[:, None] * vectors.flip(1)[:, :width]  # [c, width]
    largest = basis.abs().argmax(dim=0, keepdim=True)
    basis = basis * torch.sign(torch.gather(basis, 0, largest))
    rows = m @ basis.to(m.dtype).to(m.device)
    return torch.nn.functional.normalize(rows, dim=1)


# --- the number of steps --------------------------------------------------------------------------


def _agreement(
    features: Features,
    adjacency: sp.csr_array,
    n_clusters: int,
    weighting: str,
    seed: int,
    device: torch.device | str,
) -> dict[int, float] | None:
    """How well clusterings from disjoint halves of columns and edges agree, by number of steps.

    What two halves that share no attribute and no edge have in common is structure, not
    noise. The mean NMI over random splits, or None where there is not enough to split.
    """
    n, d = features.shape
    upper = sp.triu(adjacency, 1).tocoo()
    if d < 2 or upper.nnz < 2:
        return None
    columns = features.tocsc() if sp.issparse(features) else features
    steps = (*_OTHER_STEPS, _DEFAULT_STEPS)
    rng = np.random.default_rng(seed)
    scores: dict[int, list[float]] = {t: [] for t in steps}
    for split in range(_SPLITS):
        column_order, edge_order = rng.permutation(d), rng.permutation(upper.nnz)
        labels: dict[int, list[npt.NDArray[np.int64]]] = {t: [] for t in steps}
        for half in range(2):
            part = columns[:, np.sort(column_order[half::2])]
            part = part.tocsr() if sp.issparse(part) else part
            q, energy, _ = _leading_pairs(_weighted(part, weighting), seed + split, device)
            edges = edge_order[half::2]
            one_way = sp.csr_array(
                (upper.data[edges], (upper.row[edges], upper.col[edges])), shape=(n, n)
            )
            graph = Graph(one_way + one_way.T, norm="sym").to(device)
            scale = energy.clamp(min=torch.finfo(torch.float32).tiny) ** -0.25
            for t, smooth in _smoothed(graph, q, steps).items():
                rows = _leading_rows(smooth, scale, 2 * n_clusters)
                found = ops.kmeans(rows, n_clusters, n_init=_RESTARTS, seed=seed + split)
                labels[t].append(found.labels.cpu().numpy())
        for t in steps:
            scores[t].append(float(normalized_mutual_info_score(*labels[t])))
    return {t: float(np.mean(values)) for t, values in scores.items()}


def _choose_steps(agreement: dict[int, float] | None) -> int:
    """8 steps, unless fewer agree clearly better."""
    if agreement is None:
        return _DEFAULT_STEPS
    best = max(_OTHER_STEPS, key=lambda t: agreement[t])
    clear = agreement[best] > _MARGIN * agreement[_DEFAULT_STEPS]
    return best if clear else _DEFAULT_STEPS
