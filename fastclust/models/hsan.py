"""HSAN, the Hard Sample Aware Network (Liu et al., AAAI 2023), as a torch module.

Two un-shared attribute encoders and two un-shared structure encoders give two views of every node.
A learnable mix of attribute and structure similarity scores all pairs of the 2N rows (Eq. 6); an
InfoNCE loss weights every pair by how hard it is (Eqs. 8-11), judged by the pseudo labels of the
nodes clustered with high confidence (Eq. 9). Nothing here is N x N: the loss and its weights are
tiled inside :mod:`fastclust.ops`, and the structure encoders are sparse products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from fastclust import ops
from fastclust.distributed import ONE, Ranks
from fastclust.graph import Graph
from fastclust.interop import without_autocast
from fastclust.models.consensus import consensus_kmeans
from fastclust.models.inputs import (
    SAMPLE_ROWS,
    as_tensor,
    derive_seed,
    nearest_center,
    project,
    sampled_kmeans,
    stacked_unit_rows,
    uniform_parameter,
)
from fastclust.models.leading import leading_directions
from fastclust.validation import check_choice

__all__ = ["HSANModel", "confident_nodes", "filtered_attributes", "principal_axes"]

_INITIALISE, _CLUSTER = range(2)  # what a derived seed is for

ALPHA_START = 0.99999

WeightStorage = Literal["auto", "snapshots", "stored"]
# Up to here "auto" stores stale weights: N = 11,500 in float32.
STORED_BYTES = 1 << 30


def principal_axes(x: Tensor, n_input: int) -> dict[str, Tensor]:
    """Leading principal axes of x [N, D]: ``components`` [n_input, D] and ``mean`` [D]."""
    # Seven power iterations bring the axes to those of a full decomposition. The published runs
    # take scikit-learn's PCA, itself randomised, with another seed each time.
    svd = ops.batched_svd(x, n_input, center=True, n_iter=7, oversample=10, seed=0)
    return {"components": svd.vh[0], "mean": svd.mean[0]}


def filtered_attributes(
    x: npt.NDArray[np.float32] | sp.csr_array | Tensor,
    adjacency: sp.csr_array,
    *,
    filter_steps: int,
    n_input: int | Mapping[str, Tensor] | None,
    device: torch.device | str | None = None,
) -> Tensor:
    """S^t X with S = D1^-1/2 (A + I) D1^-1/2, after an optional PCA (section 3.2 of the paper).

    Parameters
    ----------
    x : array, CSR matrix or tensor [N, D]
        Attributes; not normalised.
    adjacency : CSR matrix [N, N]
        Symmetric, no self loops.
    filter_steps : int
        t, the number of smoothing steps.
    n_input : int, mapping or None
        Number of principal components (centred, not whitened) to keep first, or the axes
        themselves, from :func:`principal_axes`; None keeps X.
    device : torch.device or str, optional
        Where to compute; by default on the device of x.

    Returns
    -------
    Tensor
        Dense float32 [N, D'], D' = n_input or D.
    """
    features = as_tensor(x, device)
    if n_input is not None:
        axes = principal_axes(features, n_input) if isinstance(n_input, int) else n_input
        features = project(features, axes)  # [N, D']
    elif features.layout == torch.sparse_csr:
        features = features.to_dense()
    if filter_steps == 0:
        return features
    graph = Graph(adjacency, norm="sym").to(features.device)
    return ops.propagate(graph, features, steps=filter_steps)


@without_autocast
def confident_nodes(
    z: Tensor,
    centers: Tensor,
    tau: float,
    *,
    released: bool = False,
    gather: Callable[[Tensor], Tensor] = ONE.gather,
) -> Tensor:
    """The fraction ``tau`` of the nodes that lies most clearly with one centre.

    The score of node i is 1 / sum_k exp(d_ik^2 - min_k d_ik^2), d the distance to the centres:
    small where one centre is much nearer than the rest.

    Parameters
    ----------
    z : Tensor [N, d]
    centers : Tensor [K, d]
    tau : float
        Kept fraction, 0 (no node) to 1 (all).
    released : bool
        Keep every node whose score is at most the int(N (1 - tau))-th largest, as the released
        code does: that node itself and ties included.
    gather : callable
        Where z holds a part of the nodes: takes scores of these to those of all N.

    Returns
    -------
    Tensor
        bool [N].
    """
    score = gather(torch.cat([_clarity(rows, centers) for rows in z.split(SAMPLE_ROWS)]))  # [N]
    n = score.shape[0]
    if released:
        n_low = int(n * (1 - tau))
        if n_low == 0:
            return torch.ones(n, dtype=torch.bool, device=z.device)
        return score <= score.sort(descending=True).values[n_low - 1]
    n_kept = int(np.floor(tau * n + 1e-9))
    kept = torch.zeros(n, dtype=torch.bool, device=z.device)
    kept[score.argsort(stable=True)[:n_kept]] = True
    return kept


def _clarity(z: Tensor, centers: Tensor) -> Tensor:
    """The score of :func:`confident_nodes` [N]."""
    distance = (  # [N, K]
        z.double().square().sum(1, keepdim=True)
        - 2.0 * (z @ centers.T).double()
        + centers.double().square().sum(1)
    )
    return 1.0 / torch.exp(distance - distance.amin(1, keepdim=True)).sum(1)


def _storage_of(
    wish: WeightStorage, x: Tensor, *, stale: bool, ranks: Ranks = ONE
) -> Literal["snapshots", "stored"]:
    """How weights of the N nodes of x [N, D] are held, see :class:`HSANModel`.

    Raises
    ------
    ValueError
        ``"stored"`` is asked for where it cannot be had.
    """
    check_choice("weight_storage", wish, get_args(WeightStorage))
    # Ranks of a launch share their work out even where there is one of them only.
    where = x.device.type if ranks is ONE else f"a launch of {ranks.size} processes"
    possible = where == "cpu"
    if wish == "stored" and not possible:
        raise ValueError(
            f"weight_storage='stored' is for one process on the CPU, this is {where}; take "
            f"weight_storage='snapshots'"
        )
    if wish != "auto":
        return wish
    small = ops.StoredHardness.n_bytes(x.shape[0], x.dtype) <= STORED_BYTES
    return "stored" if stale and possible and small else "snapshots"


class HSANModel(nn.Module):
    """Encoders, loss and hard-sample weights of HSAN on one graph.

    Parameters
    ----------
    x : Tensor [N, D']
        Filtered attributes, see :func:`filtered_attributes`.
    graph : Graph
        The raw adjacency: ``Graph(adjacency, norm="none", self_loops=False)``.
    n_clusters : int
        K.
    width, activation, tau, beta, structure, refresh_every, precision
        As for :class:`fastclust.HSAN`. Without structure encoders alpha is 1 and no parameter; the
        first refresh is after the first step.
    weights : {"hard", "none"}
        ``"none"`` keeps all weights at 1.
    stale_weights : bool
        Whether a pair that leaves the confident set keeps its last weight (released code) or
        returns to 1 (Eq. 9).
    weight_storage : {"auto", "snapshots", "stored"}
        As for :class:`fastclust.HSAN`. A checkpoint of snapshots can be gone on with stored, not
        the reverse.
    clamp_alpha : bool
        Keep alpha in [0, 1]; the paper leaves it free.
    kmeans : {"consensus", "k-means++", "paper-code"}
        How pseudo labels and results are clustered: by what 10 ``n_init`` starts agree on in the
        2 K leading singular directions of Z (:func:`fastclust.models.consensus.consensus_kmeans`),
        the best of ``n_init`` k-means++ restarts on Z, or one run from the released code's draw of
        centres, see :func:`fastclust.ops.kmeans`. An empty cluster is
        repaired either way (in the released code it ends in NaN centres).
    n_init : int
        Restarts of k-means++; ten times as many vote on a consensus.
    seed : int
        Of the initial weights and of k-means.
    ranks : Ranks
        The processes that share the graph by rows, see :mod:`fastclust.distributed`.
    """

    by_rows = frozenset(("v.0", "v.1"))  # parameters with a row per node
    weights: ops.Hardness | ops.StoredHardness | None
    centers: Tensor  # [K, d]

    def __init__(
        self,
        x: Tensor,
        graph: Graph,
        *,
        n_clusters: int,
        width: int = 1500,
        activation: Literal["identity", "sigmoid"] = "identity",
        tau: float = 0.9,
        beta: float = 1.0,
        structure: bool = True,
        weights: Literal["hard", "none"] = "hard",
        stale_weights: bool = False,
        weight_storage: WeightStorage = "auto",
        refresh_every: int = 10,
        clamp_alpha: bool = False,
        kmeans: Literal["consensus", "k-means++", "paper-code"] = "consensus",
        n_init: int = 10,
        precision: str = "fp32",
        seed: int = 0,
        ranks: Ranks = ONE,
    ) -> None:
        super().__init__()
        self.ranks = ranks
        self.x, self.graph = ranks.rows(x), ranks.graph(graph)
        self.n_clusters, self.n_init, self.kmeans = n_clusters, n_init, kmeans
        self.activation, self.tau, self.beta = activation, tau, beta
        self.use_weights, self.stale_weights = weights == "hard", stale_weights
        self.weight_storage = _storage_of(
            weight_storage, x, stale=self.use_weights and stale_weights, ranks=ranks
        )
        self.refresh_every, self.clamp_alpha = refresh_every, clamp_alpha
        self.precision, self.seed = precision, seed
        self.weights = None
        self._clustered: tuple[int, ops.KMeansResult, Tensor] | None = None

        # Linear layers in torch's own initialisation: uniform within 1 / sqrt(fan in).
        generator = torch.Generator().manual_seed(derive_seed(seed, _INITIALISE))
        n, n_features = x.shape
        views = range(2)
        bound = n_features**-0.5
        shape = (width, n_features)
        self.w = nn.ParameterList(uniform_parameter(shape, bound, generator) for _ in views)
        self.b = nn.ParameterList(uniform_parameter((width,), bound, generator) for _ in views)
        self.structure = structure
        if structure:
            bound = n**-0.5
            shape = (n, width)
            whole = (uniform_parameter(shape, bound, generator) for _ in views)
            self.v = nn.ParameterList(nn.Parameter(ranks.rows(v.detach())) for v in whole)
            self.c = nn.ParameterList(uniform_parameter((width,), bound, generator) for _ in views)
            self.alpha: Tensor = nn.Parameter(torch.tensor(ALPHA_START, dtype=torch.float32))
        else:
            one = torch.tensor(1.0, dtype=torch.float32)
            self.register_buffer("alpha", one, persistent=False)
        # Of the last clustering, for nodes that were not trained on.
        self.register_buffer("centers", torch.zeros(n_clusters, width, dtype=torch.float32))
        self.to(x.device)
        ranks.sum_gradients(p for name, p in self.named_parameters() if name not in self.by_rows)

    # --- the network -----------------------------------------------------------------------------

    def attribute_views(self, x: Tensor | None = None) -> Tensor:
        """Z [2N, d]: unit rows of act(X~ W_v + b_v), view 1 above view 2; of x for other rows."""
        x = self.x if x is None else x
        first, second = (
            ops.matmul(x, w.t(), bias=b)  # [N, d]
            for w, b in zip(self.w, self.b, strict=True)
        )
        if self.activation == "sigmoid":
            first, second = torch.sigmoid(first), torch.sigmoid(second)
        return stacked_unit_rows(first, second)

    def structure_views(self) -> Tensor | None:
        """E [2N, d]: unit rows of A V_v + c_v; None without structure encoders."""
        if not self.structure:
            return None
        encoders = zip(self.v, self.c, strict=True)
        first, second = (self.ranks.propagate(self.graph, v).add_(c) for v, c in encoders)
        return stacked_unit_rows(first, second)

    def embedding(self) -> Tensor:
        """Z = (Z^1 + Z^2) / 2 [N, d], not normalised again."""
        first, second = self.attribute_views().chunk(2)
        return (first + second) / 2

    # --- what the training loop calls ------------------------------------------------------------

    def begin(self) -> None:
        """Nothing to prepare: the first epoch trains with all weights 1."""

    def loss(self) -> Tensor:
        """The weighted InfoNCE loss (Eqs. 8, 10, 11 as trained), a scalar."""
        self._clustered = None
        return self.ranks.hard_infonce(
            self.attribute_views(),
            self.structure_views(),
            self.alpha,
            weights=self.weights,
            precision=self.precision,
        )

    @torch.no_grad()
    def after_step(self, epoch: int) -> None:
        """After the step of this epoch (from 0): refresh the weights when it is time."""
        if self.clamp_alpha and self.structure:
            self.alpha.clamp_(0.0, 1.0)
        if not self.use_weights or epoch % self.refresh_every != 0:
            return
        result, z_mean = self._cluster(epoch)
        released = self.kmeans == "paper-code"
        confident = confident_nodes(
            z_mean, result.centers, self.tau, released=released, gather=self.ranks.gather
        )
        previous = self.weights if self.stale_weights else None
        self.weights = None  # its memory is needed
        self.weights = self.ranks.hardness(
            self.attribute_views(),
            self.structure_views(),
            self.alpha,
            self.ranks.gather(result.labels),
            confident,
            self.beta,
            previous=previous,
            storage=self.weight_storage,
        )

    @torch.no_grad()
    def assign(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Clusters int64 [N] and embedding [N, d] after this epoch."""
        result, z_mean = self._cluster(epoch)
        return self.ranks.gather(result.labels), self.ranks.gather(z_mean)

    @torch.no_grad()
    def predict(self) -> tuple[Tensor, Tensor]:
        """Nearest centre of the last clustering, int64 [N], and embedding [N, d]; no k-means."""
        z = self.embedding()
        return nearest_center(z, self.centers), z

    def diagnostics(self) -> dict[str, float]:
        """What is worth watching beside the loss."""
        return {"alpha": float(self.alpha.detach())}

    def extra_state(self) -> dict[str, Tensor]:
        """The weights of the last refresh, for a checkpoint."""
        if self.weights is None:
            return {}
        if isinstance(self.weights, ops.StoredHardness):
            return self.weights.state_dict()
        return self.ranks.whole_weights(self.weights).state_dict()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`extra_state` gave."""
        if not state:
            self.weights = None
        elif "tiles" in state:
            if self.weight_storage != "stored":
                raise ValueError(
                    "its hard-sample weights are stored, which only one process on the CPU can go "
                    "on with: resume there, with weight_storage='stored' or 'auto'; a run to be "
                    "resumed on several processes or on a GPU needs weight_storage='snapshots' "
                    "from its start"
                )
            self.weights = ops.StoredHardness.from_state_dict(state)
        else:
            whole = ops.Hardness.from_state_dict(state)
            stored = self.weight_storage == "stored"
            self.weights = (
                ops.StoredHardness.from_snapshots(whole)
                if stored
                else self.ranks.own_weights(whole)
            )

    def _cluster(self, epoch: int) -> tuple[ops.KMeansResult, Tensor]:
        """k-means on the embedding; a refresh and an evaluation of the same epoch share it."""
        if self._clustered is None or self._clustered[0] != epoch:
            z = self.embedding()
            seed = derive_seed(self.seed, _CLUSTER, epoch)
            if self.kmeans == "paper-code":
                result = self.ranks.kmeans(z, self.n_clusters, init="paper-code", seed=seed)
            elif self.kmeans == "consensus":
                result = self._consensus(z, seed)
            else:
                kmeans = self.ranks.kmeans if self.ranks.size > 1 else sampled_kmeans
                result = kmeans(z, self.n_clusters, n_init=self.n_init, seed=seed)
            self.centers.copy_(result.centers)
            self._clustered = (epoch, result, z)
        return self._clustered[1:]

    @without_autocast
    def _consensus(self, z: Tensor, seed: int) -> ops.KMeansResult:
        """Consensus of k-means in the leading directions of z [N, d]; every rank finds the same.

        The centres are those of the directions' span: what of a node lies outside of it is as far
        from all of them, so that nodes belong to the nearest in Z, too.
        """
        whole = self.ranks.gather(z)
        directions = leading_directions(whole, 2 * self.n_clusters, seed=seed)  # [d, 2 K]
        found = consensus_kmeans(
            ops.matmul(whole, directions), self.n_clusters, n_init=10 * self.n_init, seed=seed
        )
        centers = found.centers @ directions.T
        return replace(found, labels=self.ranks.rows(found.labels), centers=centers)
