"""What was tried to beat SSGC's default without labels: one command per idea.

python benchmarks/beyond.py IDEA --datasets cora,citeseer --seeds 0-4

Scores in percent, ACC / NMI, mean +- sample standard deviation over seeds. Labels are read only to
score. docs/beyond.md says what each idea gave.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

import fastclust as fc
from fastclust import ops
from fastclust.cli import parse_seeds
from fastclust.datasets import load_dataset, nearest_neighbor_graph
from fastclust.graph import Graph
from fastclust.metrics import clustering_scores
from fastclust.models import back_ends, ssgc
from fastclust.models.consensus import _votes, cluster_means, consensus_kmeans
from fastclust.models.ecnmf import target_distribution
from fastclust.models.hsan import confident_nodes
from fastclust.models.inputs import (
    derive_seed,
    inverse_document_frequency,
    stacked_unit_rows,
    unit_rows,
)
from fastclust.models.leading import gram_matrix, leading_bases
from fastclust.validation import check_adjacency, check_features

Results = Iterator[tuple[str, np.ndarray]]  # name of a variant, labels [N]
Parts = list[tuple[torch.Tensor, torch.Tensor, float]]  # pairs [N, c], energies [c], mean energy


@dataclass
class Task:
    """An attributed graph, and the labels to score by."""

    x: np.ndarray | sp.csr_array  # [N, D]
    a: sp.csr_array  # [N, N]
    y: np.ndarray  # [N]

    @property
    def k(self) -> int:
        return len(np.unique(self.y))


# Sizes, edges and noise of planted graphs that nothing was chosen by; sizes unequal in three.
PLANTED: dict[str, dict[str, object]] = {
    "sbm0": {"shape": (2000, 5000, 50, 7), "homophily": 0.7, "feature_noise": 0.35},
    "sbm1": {
        "shape": (3000, 20000, 50, 10),
        "homophily": 0.5,
        "feature_noise": 0.35,
        "sizes": [8, 4, 3, 2, 2, 1, 1, 1, 1, 1],
    },
    "sbm2": {
        "shape": (2000, 4000, 100, 6),
        "homophily": 0.8,
        "feature_noise": 0.3,
        "sizes": [4, 3, 2, 2, 1, 1],
    },
    "sbm3": {"shape": (4000, 12000, 40, 15), "homophily": 0.6, "feature_noise": 0.3},
    "sbm4": {"shape": (1500, 3000, 30, 5), "homophily": 0.6, "feature_noise": 0.4},
    "sbm5": {
        "shape": (2500, 25000, 60, 8),
        "homophily": 0.35,
        "feature_noise": 0.4,
        "sizes": [6, 3, 2, 2, 1, 1, 1, 1],
    },
    "sbm6": {
        "shape": (3000, 15000, 30, 6),
        "homophily": 0.7,
        "feature_noise": 0.5,
        "sizes": [10, 3, 2, 2, 1, 1],
    },
    "sbm7": {"shape": (2000, 40000, 30, 10), "homophily": 0.5, "feature_noise": 0.6},
    "sbm8": {
        "shape": (3000, 9000, 60, 12),
        "homophily": 0.8,
        "feature_noise": 0.25,
        "sizes": [12, 8, 6, 4, 3, 2, 2, 1, 1, 1, 1, 1],
    },
}


def task(name: str) -> Task:
    """A benchmark graph, a planted one (sbm0 to sbm8), or digits5, digits15: neighbours joined."""
    if name in PLANTED:
        keywords = dict(PLANTED[name])
        data = fc.make_attributed_sbm(*keywords.pop("shape"), **keywords, random_state=5)  # type: ignore[misc, arg-type]
    elif name.startswith("digits"):
        digits = load_digits()
        x = digits.data.astype(np.float32)
        return Task(x, nearest_neighbor_graph(x, n_neighbors=int(name[6:])), digits.target)
    else:
        data = load_dataset(name)
    x = check_features(data.features)
    if sp.issparse(x) and x.nnz > 0.1 * x.shape[0] * x.shape[1]:
        x = x.toarray()
    return Task(x, check_adjacency(data.adjacency), np.asarray(data.labels))


# --- pieces of SSGC -------------------------------------------------------------------------------


def leading_pairs(x: np.ndarray | sp.csr_array, seed: int) -> Parts:
    """Of both weightings; of rows of unit length alone where attributes are negative."""
    parts = []
    for weighting in ("l2", "tf-idf") if x.min() >= 0 else ("l2",):
        idf = inverse_document_frequency(x) if weighting == "tf-idf" else None
        q, _, energy, mean_energy = ssgc._leading_pairs(x, idf, seed, "cpu")
        parts.append((q, energy, mean_energy))
    return parts


def views(smoothed: list[torch.Tensor], parts: Parts, width: int) -> torch.Tensor:
    """Unit rows of the leading singular vectors of all views, side by side."""
    columns = []
    for smooth, (_, energy, mean_energy) in zip(smoothed, parts, strict=True):
        scalings = ssgc._scalings(energy, mean_energy, "multiview")
        bases = leading_bases(gram_matrix([smooth]), scalings, width).to(smooth)
        columns += [unit_rows(smooth @ basis) for basis in bases]
    return torch.cat(columns, dim=1)


def cut(x: torch.Tensor, width: int) -> torch.Tensor:
    """Unit rows of the leading singular vectors of x."""
    (basis,) = leading_bases(gram_matrix([x]), [torch.ones(x.shape[1])], width).to(x)
    return unit_rows(x @ basis)


def smoothed(graph: Graph, parts: Parts, n_steps: int) -> list[torch.Tensor]:
    return [ssgc._smoothed(graph, q, (n_steps,))[n_steps] for q, _, _ in parts]


def embedding(t: Task, seed: int, n_steps: int = 8, width: int = 2) -> torch.Tensor:
    """SSGC's multiview embedding with T steps and width K columns."""
    parts = leading_pairs(t.x, seed)
    graph = Graph(t.a, norm="sym")
    return cut(views(smoothed(graph, parts, n_steps), parts, width * t.k), width * t.k)


def consensus(z: torch.Tensor, k: int, seed: int, **keywords: object) -> np.ndarray:
    return consensus_kmeans(z, k, seed=seed, **keywords).labels.numpy()  # type: ignore[arg-type]


def fused(votes: torch.Tensor, z: torch.Tensor | None, k: int, seed: int) -> np.ndarray:
    """Clusters of all votes [N, *]; with z, after Lloyd's iterations on it."""
    (basis,) = leading_bases(gram_matrix([votes]), [torch.ones(votes.shape[1])], 4 * k).to(votes)
    agreed = ops.kmeans(votes @ basis, k, n_init=20, seed=seed).labels
    if z is None:
        return agreed.numpy()
    sizes = torch.bincount(agreed, minlength=k).clamp_min(1)[:, None]
    means = torch.zeros(k, z.shape[1]).index_add_(0, agreed, z) / sizes
    return ops.kmeans(z, k, init=means).labels.numpy()


# --- ideas ----------------------------------------------------------------------------------------


def default(t: Task, seed: int) -> Results:
    """fc.SSGC as it is, and with the best of a hundred starts instead of votes."""
    yield "SSGC", fc.SSGC(t.k, random_state=seed).fit(t.x, adjacency=t.a).labels_
    best = fc.SSGC(t.k, random_state=seed, consensus=False).fit(t.x, adjacency=t.a)
    yield "SSGC, consensus=False", best.labels_


def votes(t: Task, seed: int) -> Results:
    """Votes of one or several embeddings, as counts or as orthonormal indicators."""
    zs = {(s, w): embedding(t, seed, s, w) for s in (4, 8, 16) for w in (2, 4)}
    n_runs = 50
    ballots = {key: _votes(z, t.k, n_runs, seed) for key, z in zs.items()}
    z = zs[8, 2]
    yield "counts, T 8", fused((ballots[8, 2] > 0).to(z), z, t.k, seed)
    for name, keys in {
        "T 8": [(8, 2)],
        "T 16": [(16, 2)],
        "T 4, 8, 16": [(4, 2), (8, 2), (16, 2)],
        "T 8, 16": [(8, 2), (16, 2)],
        "T 8, width 2 K, 4 K": [(8, 2), (8, 4)],
        "T 4, 8, 16, width 2 K, 4 K": list(zs),
    }.items():
        ballot = torch.cat([ballots[key] for key in keys], dim=1)
        yield name, fused(ballot, z, t.k, seed)
        yield name + ", without Lloyd", fused(ballot, None, t.k, seed)


def single_views(t: Task, seed: int) -> Results:
    """One view at a time, unit rows of all 256 columns before the cut."""
    parts = leading_pairs(t.x, seed)
    for n, (smooth, part) in enumerate(
        zip(smoothed(Graph(t.a, norm="sym"), parts, 8), parts, strict=True)
    ):
        for m, scale in enumerate(ssgc._scalings(part[1], part[2], "multiview")):
            x = unit_rows(smooth * scale.float())
            for width in (2, 4):
                name = f"weighting {n}, scaling {m}, {width} K"
                yield name, consensus(cut(x, width * t.k), t.k, seed)


def bagging(t: Task, seed: int) -> Results:
    """Votes of embeddings from ten random halves, or 70 %, of the columns and edges."""
    z = embedding(t, seed)
    upper = sp.triu(t.a, 1).tocoo()
    n, d = t.x.shape
    columns = t.x.tocsc() if sp.issparse(t.x) else t.x
    for share in (0.5, 0.7):
        rng = np.random.default_rng(derive_seed(seed, int(10 * share)))
        ballots = []
        for bag in range(10):
            part = columns[:, np.sort(rng.permutation(d)[: int(share * d)])]
            part = part.tocsr() if sp.issparse(part) else part
            e = rng.permutation(upper.nnz)[: int(share * upper.nnz)]
            one_way = sp.csr_array((upper.data[e], (upper.row[e], upper.col[e])), shape=(n, n))
            bagged = Task(part, (one_way + one_way.T).tocsr(), t.y)
            ballots.append(_votes(embedding(bagged, seed), t.k, 20, derive_seed(seed, bag)))
        yield f"{share:.0%} bags", fused(torch.cat(ballots, dim=1), None, t.k, seed)
        yield f"{share:.0%} bags, Lloyd", fused(torch.cat(ballots, dim=1), z, t.k, seed)


def reweighting(t: Task, seed: int) -> Results:
    """Edges weighted by how alike the embedded ends are, smoothed and embedded again."""
    parts = leading_pairs(t.x, seed)
    edges = t.a.tocoo()
    for name, weight in {
        "cosine": lambda c: np.maximum(c, 0) + 1e-3,
        "cosine squared": lambda c: np.maximum(c, 0) ** 2 + 1e-3,
        "cosine above 0.3": lambda c: (c > 0.3) + 1e-3,
    }.items():
        for n_steps in (8, 16):
            z = embedding(t, seed)
            for round_ in (1, 2):
                cosine = np.einsum("ij,ij->i", z.numpy()[edges.row], z.numpy()[edges.col])
                weighted = sp.csr_array(
                    (weight(cosine).astype(np.float32), (edges.row, edges.col)), shape=t.a.shape
                )
                again = smoothed(Graph(weighted, norm="sym"), parts, n_steps)
                z = cut(views(again, parts, 2 * t.k), 2 * t.k)
                yield f"{name}, T {n_steps}, round {round_}", consensus(z, t.k, seed)


def _averaged(parameters: list[torch.Tensor], lr: float) -> torch.optim.Adam:
    """HSAN's averaged-gradient step."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.99999, 0.99999))


def _contrast(
    x: torch.Tensor,
    k: int,
    seed: int,
    epochs: tuple[int, ...],
    confident: float | None = None,
    beta: float = 1.0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """HSAN's loss without structure, encoders near the identity: Z [N, d] after these epochs.

    ``confident``: fraction of the nodes whose pairs are weighted by hardness (renewed every tenth
    epoch; with the consensus of many starts for pseudo labels), None for W = 1.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    d = x.shape[1]
    encoders = [
        (torch.eye(d) + 0.01 * torch.randn(d, d, generator=generator)).requires_grad_()
        for _ in range(2)
    ]
    optimizer = _averaged(encoders, 3e-3)
    alpha, weights = torch.tensor(1.0), None
    for epoch in range(epochs[-1] + 1):
        z = stacked_unit_rows(*(x @ w for w in encoders))
        mean = z.detach().unflatten(0, (2, -1)).mean(0)
        if epoch in epochs:
            yield epoch, mean
        if confident is not None and epoch % 10 == 0:
            labels = torch.from_numpy(consensus(cut(mean, 2 * k), k, seed))
            clear = confident_nodes(mean, cluster_means(mean, labels, k), confident)
            weights = ops.hardness(z.detach(), None, alpha, labels, clear, beta)
        loss = ops.hard_infonce(z, None, alpha, weights=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def infonce(t: Task, seed: int) -> Results:
    """HSAN's loss (W = 1, structure off) from the joined views before the cut, at the identity."""
    parts = leading_pairs(t.x, seed)
    x = views(smoothed(Graph(t.a, norm="sym"), parts, 8), parts, 2 * t.k)
    for epoch, z in _contrast(x, t.k, seed, (0, 10, 20, 40)):
        yield f"epoch {epoch}", consensus(z, t.k, seed)
        yield f"epoch {epoch}, cut to 2 K", consensus(cut(z, 2 * t.k), t.k, seed)


def hard_samples(t: Task, seed: int) -> Results:
    """The same with hard-sample weights, from the joined views and from their cut to 2 K."""
    parts = leading_pairs(t.x, seed)
    joined = views(smoothed(Graph(t.a, norm="sym"), parts, 8), parts, 2 * t.k)
    for name, x in (("joined", joined), ("cut", cut(joined, 2 * t.k))):
        for confident, beta in ((None, 1.0), (0.3, 1.0), (0.9, 1.0), (0.9, 3.0), (1.0, 1.0)):
            weights = "W = 1" if confident is None else f"tau {confident}, beta {beta}"
            for epoch, z in _contrast(x, t.k, seed, (0, 10, 30, 100), confident, beta):
                labels = consensus(cut(z, 2 * t.k), t.k, seed)
                yield f"{name}, {weights}, epoch {epoch}", labels


def _walk(a: sp.csr_array, nodes: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    degree = np.diff(a.indptr)
    for _ in range(length):
        step = a.indptr[nodes] + (rng.random(len(nodes)) * degree[nodes]).astype(int)
        nodes = np.where(degree[nodes] > 0, a.indices[np.minimum(step, a.nnz - 1)], nodes)
    return nodes


def neighbours(t: Task, seed: int) -> Results:
    """A linear map trained so that nodes met on short walks are alike, others not."""
    parts = leading_pairs(t.x, seed)
    x = views(smoothed(Graph(t.a, norm="sym"), parts, 8), parts, 4 * t.k)
    (start,) = leading_bases(gram_matrix([x]), [torch.ones(x.shape[1])], 64).to(x)
    n = x.shape[0]
    for temperature in (1.0, 0.3):
        for longest in (1, 4):
            rng = np.random.default_rng(seed)
            w = start.clone().requires_grad_()
            optimizer = _averaged([w], 3e-3)
            for step in range(401):
                if step in (0, 50, 200, 400):
                    name = f"temperature {temperature}, walks to {longest}, step {step}"
                    yield name, consensus(unit_rows((x @ w).detach()), t.k, seed)
                nodes = rng.choice(n, min(n, 1024), replace=False)
                met = _walk(t.a, nodes, int(rng.integers(1, longest + 1)), rng)
                u, v = (unit_rows(x[torch.from_numpy(i)] @ w) for i in (nodes, met))
                across, within = u @ v.T / temperature, u @ u.T / temperature
                others = torch.cat([across, within.fill_diagonal_(-torch.inf)], dim=1)
                loss = (torch.logsumexp(others, dim=1) - across.diagonal()).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def self_training(t: Task, seed: int) -> Results:
    """ECN-MF's head on the joined views: a softmax over centres, sharpened targets, argmax."""
    parts = leading_pairs(t.x, seed)
    x = views(smoothed(Graph(t.a, norm="sym"), parts, 8), parts, 2 * t.k)
    z = cut(x, 2 * t.k)
    start = torch.from_numpy(consensus(z, t.k, seed))
    (basis,) = leading_bases(gram_matrix([x]), [torch.ones(x.shape[1])], 2 * t.k).to(x)
    one_hot = torch.nn.functional.one_hot(start, t.k).to(z)
    centers = (one_hot.T @ z) / one_hot.sum(0).clamp_min(1)[:, None]
    sharpness = 1.0 / (z - centers[start]).square().sum(1).mean()
    w, c = basis.clone().requires_grad_(), centers.clone().requires_grad_()
    optimizer = torch.optim.Adam([w, c], lr=1e-3)
    for step in range(201):
        u = unit_rows(x @ w)
        log_q = torch.log_softmax(-sharpness * torch.cdist(u, c).square(), dim=1)
        if step in (0, 20, 50, 100, 200):
            yield f"step {step}", log_q.argmax(1).numpy()
        p = target_distribution(log_q.exp())
        loss = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def spectral(t: Task, seed: int) -> Results:
    """Normalised cut of the embedding's nearest neighbours, of edges, and of sums of both."""
    near = nearest_neighbor_graph(embedding(t, seed).numpy(), 15).astype(np.float64)
    a = t.a.astype(np.float64)
    for name, share in {"neighbours": 0.0, "1 : 0.5": 0.5, "1 : 1": 1.0, "edges": None}.items():
        w = a if share is None else near / near.sum() + share * a / a.sum()
        # A regularised cut does not single out loosely tied nodes.
        for kind, extra in (("regularised", 1.0), ("as it is", 0.0)):
            degree = np.asarray(w.sum(axis=1)).reshape(-1)
            scale = sp.diags_array((degree + max(extra, 1e-9) * degree.mean()) ** -0.5)
            vectors = back_ends.leading_eigenvectors(sp.csr_array(scale @ w @ scale), t.k, seed)
            u = torch.from_numpy(vectors.astype(np.float32))
            yield f"{name}, {kind}, unit rows", consensus(unit_rows(u), t.k, seed)
            yield f"{name}, {kind}", consensus(u, t.k, seed)


def which_back_end(t: Task, seed: int) -> Results:
    """fc.SSGC with each back end, and with the one that it chooses; prints what it judged by."""
    for back_end in ("kmeans", "cut", "auto"):
        begin = time.process_time()
        fitted = fc.SSGC(t.k, back_end=back_end, random_state=seed).fit(t.x, adjacency=t.a)
        seconds = time.process_time() - begin
        yield back_end, fitted.labels_
        evidence = fitted.back_end_evidence_ or {}
        judged = [
            f"{name} {evidence[name]['cut'] / evidence[name]['kmeans']:.3f}"
            for name in ("between_halves", "with_whole")
            if name in evidence
        ]
        taken = [fitted.resolved_["back_end"], *judged, f"{seconds:.1f} CPU seconds"]
        print(f"  seed {seed}, {back_end}: {', '.join(taken)}", flush=True)


CENTRALITIES = ("degree", "PageRank", "eigenvector")


def centralities(t: Task, seed: int) -> Results:
    """Ranks of degree, PageRank and eigenvector centrality, alone and together."""
    ranks = torch.from_numpy(ssgc._centrality_ranks(t.a))
    for chosen in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        name = " + ".join(CENTRALITIES[c] for c in chosen)
        yield name, consensus(ranks[:, chosen].contiguous(), t.k, seed)
    mean = rankdata(ranks.sum(dim=1).numpy()) / len(t.y)
    yield "mean rank, equal bins", np.ceil(mean * t.k).astype(int) - 1


def fewer_edges(t: Task, seed: int) -> Results:
    """The same after a random tenth, or fifth, of the edges is gone: does an order persist?"""
    upper = sp.triu(t.a, 1).tocoo()
    order = np.random.default_rng(seed).permutation(upper.nnz)
    for share in (0.9, 0.8, 0.5):
        e = order[: int(share * upper.nnz)]
        one_way = sp.csr_array((upper.data[e], (upper.row[e], upper.col[e])), shape=t.a.shape)
        for name, labels in centralities(Task(t.x, (one_way + one_way.T).tocsr(), t.y), seed):
            yield f"{share:.0%}: {name}", labels


IDEAS: dict[str, Callable[[Task, int], Results]] = {
    "default": default,
    "votes": votes,
    "single-views": single_views,
    "bagging": bagging,
    "reweighting": reweighting,
    "infonce": infonce,
    "hard-samples": hard_samples,
    "neighbours": neighbours,
    "self-training": self_training,
    "spectral": spectral,
    "back-ends": which_back_end,
    "centralities": centralities,
    "fewer-edges": fewer_edges,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("idea", choices=IDEAS)
    parser.add_argument("--datasets", default="cora,citeseer,amap,amac")
    parser.add_argument("--seeds", default="0-4", type=parse_seeds)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.datasets.split(","):
        t = task(name)
        begin = time.process_time()
        scores: dict[str, list[tuple[float, float]]] = {}
        found: dict[str, list[np.ndarray]] = {}
        for seed in arguments.seeds:
            for variant, labels in IDEAS[arguments.idea](t, seed):
                score = clustering_scores(t.y, labels)
                scores.setdefault(variant, []).append((100 * score["acc"], 100 * score["nmi"]))
                found.setdefault(variant, []).append(labels)
        seconds = (time.process_time() - begin) / len(arguments.seeds)
        print(f"{name}: {seconds:.1f} CPU seconds a seed")
        for variant, pairs in scores.items():
            mean = np.mean(pairs, axis=0)
            spread = np.std(pairs, axis=0, ddof=1) if len(pairs) > 1 else np.zeros(2)
            # Of the clusterings of two seeds: how much is left to chance.
            same = [
                normalized_mutual_info_score(u, v)
                for u, v in zip(found[variant][:-1], found[variant][1:], strict=True)
            ]
            between = f"  seeds agree {np.mean(same):.3f}" if same else ""
            print(
                f"  {variant:44} {mean[0]:5.2f} +- {spread[0]:4.2f} / "
                f"{mean[1]:5.2f} +- {spread[1]:4.2f}{between}",
                flush=True,
            )


if __name__ == "__main__":
    main()
