"""Plain-torch twins of the operators: the documentation of their mathematics.

Written to be read and to be differentiated by autograd, in any dtype (tests use float64), with no
regard for time or memory. Each section names the paper and the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclust.graph import Graph

# ---------------------------------------------------------------------------------------------
# infonce: hard-sample-weighted InfoNCE (HSAN, AAAI 2023)
# ---------------------------------------------------------------------------------------------


def similarity(z: Tensor, e: Tensor | None, alpha: Tensor | float) -> Tensor:
    """Mixed similarity of all rows, Eq. 6: ``alpha Z Z^T + (1 - alpha) E E^T``, [2N, 2N]."""
    s = alpha * (z @ z.T)
    return s if e is None else s + (1 - alpha) * (e @ e.T)


def hard_infonce(
    z: Tensor, e: Tensor | None, alpha: Tensor | float, weights: Tensor | None = None
) -> Tensor:
    """Loss of Eqs. 8, 10 and 11 with constant weights [2N, 2N] (None: all 1), 0-d."""
    m = z.shape[0]
    logits = similarity(z, e, alpha)
    if weights is not None:
        logits = weights * logits
    rows = torch.arange(m, device=z.device)
    positive = logits[rows, (rows + m // 2) % m]  # [2N] the other view of each row
    others = logits.masked_fill(torch.eye(m, dtype=torch.bool, device=z.device), -torch.inf)
    return (torch.logsumexp(others, dim=1) - positive).mean()


def hardness(
    z: Tensor,
    e: Tensor | None,
    alpha: Tensor | float,
    labels: Tensor,
    confident: Tensor,
    beta: float,
    previous: Tensor | None = None,
) -> Tensor:
    """Weights of Eq. 9, [2N, 2N]; pairs outside the confident set keep ``previous`` (None: 1)."""
    s = similarity(z, e, alpha)
    width = s.max() - s.min()
    scaled = (s - s.min()) / width if width > 0 else torch.zeros_like(s)
    rows_label = torch.cat([labels, labels])
    rows_confident = torch.cat([confident, confident])
    same = (rows_label[:, None] == rows_label[None, :]).to(s.dtype)
    both = rows_confident[:, None] & rows_confident[None, :]
    outside = torch.ones_like(s) if previous is None else previous
    return torch.where(both, (same - scaled).abs() ** beta, outside)


# ---------------------------------------------------------------------------------------------
# matmul: dense product
# ---------------------------------------------------------------------------------------------


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias, [m, k] [k, n] + [n]."""
    return a @ b if bias is None else a @ b + bias


# ---------------------------------------------------------------------------------------------
# kmeans: Lloyd iterations (IEEE Trans. Inf. Theory 28, 1982)
# ---------------------------------------------------------------------------------------------


def kmeans(
    x: Tensor, centers: Tensor, *, max_iter: int = 300, tol: float = 1e-4
) -> tuple[Tensor, Tensor, float, int]:
    """Lloyd's iterations from given centres.

    ``label_i = argmin_k |x_i - c_k|^2`` (lowest index on ties); c_k = mean of its points; an empty
    cluster takes the point farthest from its centre; stop once ``sum_k |dC_k|^2`` is at most
    ``tol`` times the mean column variance.

    Parameters
    ----------
    x
        [N, d].
    centers
        [K, d], the start.

    Returns
    -------
    tuple
        labels [N], centers [K, d], inertia, iterations.
    """
    n_clusters = centers.shape[0]
    tolerance = tol * x.var(0, correction=0).mean()
    for n_iter in range(1, max_iter + 1):  # noqa: B007
        labels = (x[:, None] - centers[None]).square().sum(-1).argmin(1)  # [N]
        distance = (x - centers[labels]).square().sum(1)  # [N]
        repaired = False
        for k in range(n_clusters):
            counts = torch.bincount(labels, minlength=n_clusters)
            far = int(torch.where(counts[labels] > 1, distance, 0.0).argmax())
            if counts[k] > 0 or distance[far] == 0:
                continue
            labels[far], repaired = k, True
            distance = torch.minimum(distance, (x - x[far]).square().sum(1))
        one_hot = torch.nn.functional.one_hot(labels, n_clusters).to(x)  # [N, K]
        counts = one_hot.sum(0)[:, None]
        moved = torch.where(counts > 0, one_hot.T @ x / counts.clamp(min=1), centers)
        shift = (moved - centers).square().sum()
        centers = moved
        if shift <= tolerance and not repaired:
            break
    distances = (x[:, None] - centers[None]).square().sum(-1)  # [N, K]
    least = distances.min(1)
    return least.indices, centers, least.values.sum().item(), n_iter


# ---------------------------------------------------------------------------------------------
# propagate: normalised sparse propagation with residual and activation (ECN-MF, Eqs. 10-11)
# ---------------------------------------------------------------------------------------------


def dense_adjacency(graph: Graph) -> Tensor:
    r"""Return :math:`\bar A = D_r (A + I) D_c` as a dense matrix, float64 [N, N]."""
    n = graph.n_nodes
    indptr, columns = graph.indptr.cpu(), graph.indices.cpu().long()
    rows = torch.repeat_interleave(torch.arange(n), indptr.diff())
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    weights = torch.ones(len(columns)) if graph.values is None else graph.values.cpu()
    adjacency[rows, columns] = weights.double()
    if graph.self_loops:
        adjacency += torch.eye(n, dtype=torch.float64)
    degree = adjacency.sum(dim=1)
    inverse = torch.where(degree > 0, 1 / degree, torch.zeros_like(degree))
    if graph.norm == "rw":
        return inverse[:, None] * adjacency
    if graph.norm == "sym":
        return inverse.sqrt()[:, None] * adjacency * inverse.sqrt()[None, :]
    return adjacency


def propagate(
    graph: Graph,
    h: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    steps: int = 1,
) -> Tensor:
    r""":math:`\mathrm{act}(\bar A^{\,t} H + R)`, h and residual [N, d]."""
    out = h.double()
    adjacency = dense_adjacency(graph).to(h.device)
    for _ in range(steps):
        out = adjacency @ out
    if residual is not None:
        out = out + residual.double()
    return torch.relu(out) if activation == "relu" else out


# ---------------------------------------------------------------------------------------------
# lowrank: batched truncated SVD (ECN-MF, CMC 2024, Eqs. 2-9)
# ---------------------------------------------------------------------------------------------


def batched_svd(
    x: Tensor, rank: int, batch_size: int | None = None, center: bool = True
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Exact ``(u [b, r], s [r], vh [r, D], mean [D])`` of every batch of rows of x [N, D]."""
    result = []
    for batch in x.split(batch_size or x.shape[0]):
        mean = batch.mean(0) if center else batch.new_zeros(x.shape[1])
        u, s, vh = torch.linalg.svd(batch - mean, full_matrices=False)
        largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)
        result.append((u[:, :rank] * sign[:rank].T, s[:rank], (sign * vh)[:rank], mean))
    return result


def low_rank(
    x: Tensor,
    rank: int,
    batch_size: int | None = None,
    recombine: str = "merge",
    center: bool = True,
    add_mean: bool = False,
) -> Tensor:
    """X_r [N, D] in one of the four readings of Eqs. 5-9."""
    batches = batched_svd(x, rank, batch_size, center)
    all_s = torch.cat([s for _, s, _, _ in batches])  # [M r]
    all_vh = torch.cat([vh for _, _, vh, _ in batches])  # [M r, D]
    if recombine == "merge":
        mean = x.mean(0) if center else x.new_zeros(x.shape[1])
        offsets = [len(u) ** 0.5 * (m - mean) for u, _, _, m in batches]
        stacked = torch.cat([all_s[:, None] * all_vh, torch.stack(offsets)])
        v = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank]  # [r, D]
        return (x - mean) @ v.T @ v + add_mean * mean
    top = torch.argsort(all_s, descending=True, stable=True)[:rank]
    parts = []
    for i, (u, s, vh, mean) in enumerate(batches):
        if recombine == "per_batch":
            part = u * s @ vh
        elif recombine == "block":
            kept = top[top // rank == i] % rank  # this batch's triplets among the global top r
            part = u[:, kept] * s[kept] @ vh[kept]
        else:  # literal
            part = u * all_s[top] @ all_vh[top]
        parts.append(part + add_mean * mean)
    return torch.cat(parts)
