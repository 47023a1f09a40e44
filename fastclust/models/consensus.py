"""Clusters by what many k-means runs agree on."""

from __future__ import annotations

from collections.abc import Sequence

import scipy.sparse as sp
import torch

from fastclust import ops
from fastclust.interop import without_autocast
from fastclust.models.inputs import derive_seed, sample_rows, sampled_kmeans
from fastclust.models.leading import gram_matrix, leading_bases

__all__ = ["AGREEMENT_ROWS", "SAMPLED_FROM", "cluster_means", "consensus_kmeans"]

_CONSENSUS_RANK = 4  # times K: singular vectors of the votes that are clustered
_CONSENSUS_RESTARTS = 20
# Columns of the votes (50 K with 100 starts) up to which they are decomposed in float64. That takes
# c^3: measured on 2708 nodes, one core, 0.07 s for 500 columns and 6.5 s for 3500, where a sketch
# of their 50 N entries takes 0.02 and 0.3 s. Few columns stay exact: little time is lost, and
# no rounding of the sketch chooses between equally good clusterings.
_EXACT_VOTES = 512
# Nodes from which on a sample votes and chooses T, and its rows: with all of 30,000 nodes, 40
# clusters, the whole fit took 73 CPU seconds instead of 20.
SAMPLED_FROM = 1 << 14
AGREEMENT_ROWS = 1 << 13
_MEAN_ROWS = 1 << 13  # of which the means of clusters are summed at a time on a GPU


@without_autocast
def consensus_kmeans(
    z: torch.Tensor,
    n_clusters: int,
    *,
    n_init: int = 100,
    seed: int = 0,
    others: Sequence[torch.Tensor] = (),
) -> ops.KMeansResult:
    """Cluster by what the better half of many k-means runs agrees on.

    Each of the runs of least inertia, half of them, has one vote: the indicators of its clusters,
    divided by the root of their sizes. These are orthonormal, so that every vote is a projection
    and a small cluster weighs as much as a large one. k-means on the 4 K leading singular vectors
    of all votes finds the consensus, and Lloyd's iterations from its means end in the minimum of
    inertia next to it. Of several minima with nearly the same inertia this takes the typical one,
    where "least inertia" takes one by chance (few runs) or an outlier (many).

    Of more than 16384 rows a sample of 8192 votes; the last iterations take all.

    Parameters
    ----------
    z : Tensor [N, d]
    n_clusters : int
        K.
    n_init : int
        k-means++ runs; with fewer than 4 the one of least inertia is the result.
    seed : int
        Of the runs.
    others : sequence of Tensor [N, d']
        Embeddings of the same nodes that vote as well; the runs are shared out among all.

    Returns
    -------
    KMeansResult
        As of :func:`fastclust.ops.kmeans`.
    """
    if n_init < 4:
        return sampled_kmeans(z, n_clusters, n_init=n_init, seed=seed)
    voters = [z, *others]
    if z.shape[0] > SAMPLED_FROM:
        sample = sample_rows(z.shape[0], AGREEMENT_ROWS, seed).to(z.device)
        voters = [voter[sample] for voter in voters]
    each = max(2, n_init // len(voters))
    votes = torch.cat([_votes(x, n_clusters, each, seed) for x in voters], dim=1)
    rows = _leading_coordinates(votes, _CONSENSUS_RANK * n_clusters, seed)
    agreed = ops.kmeans(rows, n_clusters, n_init=_CONSENSUS_RESTARTS, seed=seed)
    return ops.kmeans(z, n_clusters, init=cluster_means(voters[0], agreed.labels, n_clusters))


def cluster_means(z: torch.Tensor, labels: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """Means [K, d] of the rows of z [N, d] by cluster; zero where a cluster is empty."""
    sizes = torch.bincount(labels, minlength=n_clusters).clamp_min(1)  # [K]
    sums = z.new_zeros(n_clusters, z.shape[1])
    if z.device.type == "cpu":
        sums.index_add_(0, labels, z)
        return sums / sizes[:, None]
    # A GPU would add by atomics, in another order on each run.
    wide = sums.double()
    for rows, of in zip(z.split(_MEAN_ROWS), labels.split(_MEAN_ROWS), strict=True):
        members = torch.nn.functional.one_hot(of, n_clusters)  # [rows, K]
        wide += members.double().t() @ rows.double()
    return (wide / sizes[:, None]).to(z.dtype)


def _votes(x: torch.Tensor, n_clusters: int, n_runs: int, seed: int) -> torch.Tensor:
    """Orthonormal indicators [N, n_runs // 2 K] of the better half of k-means runs on x [N, d]."""
    runs = [
        ops.kmeans(x, n_clusters, n_init=1, seed=derive_seed(seed, run)) for run in range(n_runs)
    ]
    runs.sort(key=lambda run: float(run.inertia))
    best = [torch.nn.functional.one_hot(run.labels, n_clusters) for run in runs[: n_runs // 2]]
    votes = torch.cat(best, dim=1).to(x.dtype)
    return votes / votes.sum(0).clamp_min(1).sqrt()


def _leading_coordinates(votes: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """U s [N, min(width, N, c)], the leading singular triplets of votes [N, c], up to signs.

    Of up to 512 columns by float64 eigenvectors [N, min(width, c)]; of more by a randomised sketch,
    on the CPU of the entries that are not zero: one in K.
    """
    n_nodes, n_columns = votes.shape
    if n_columns <= _EXACT_VOTES:
        (basis,) = leading_bases(gram_matrix([votes]), [torch.ones(n_columns)], width).to(votes)
        return votes @ basis
    rows = sp.csr_array(votes.numpy()) if votes.device.type == "cpu" else votes
    svd = ops.batched_svd(rows, min(width, n_nodes, n_columns), center=False, seed=seed)
    return svd.u[0] * svd.s[0]
