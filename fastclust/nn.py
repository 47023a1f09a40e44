"""The parts of HSAN and ECN-MF as ``torch.nn`` modules, for models and loops of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastclust import ops
from fastclust.graph import Graph
from fastclust.interop import as_operand
from fastclust.models.ecnmf import target_distribution
from fastclust.models.hsan import ALPHA_START, confident_nodes
from fastclust.models.inputs import unit_rows

__all__ = ["HardSampleInfoNCE", "LowRankView", "ResidualPropagation", "SoftAssignment"]


class HardSampleInfoNCE(nn.Module):
    """HSAN's loss between two views of all nodes (Liu et al., AAAI 2023, Eqs. 6 and 8 to 11).

    Memory is O(N d): no N x N array is made. All weights are 1 until the first :meth:`refresh`.

    Parameters
    ----------
    n_clusters : int
        K of the pseudo labels.
    tau : float, default 0.9
        Fraction of nodes that counts as clustered with confidence.
    beta : float, default 1.0
        Exponent of the hardness weights.
    n_init : int, default 10
        k-means restarts of a refresh.
    precision : str, optional
        As for :func:`fastclust.ops.hard_infonce`.

    Attributes
    ----------
    alpha : torch.nn.Parameter
        Weight of attribute against structure similarity; starts at 0.99999.
    weights : Hardness or None
        Of the last refresh; part of ``state_dict``, moves and converts with the module.

    Examples
    --------
    >>> loss = HardSampleInfoNCE(n_clusters=3)
    >>> first, second = torch.randn(20, 8), torch.randn(20, 8)
    >>> labels = loss.refresh(first, second)
    >>> loss(first, second).shape
    torch.Size([])
    """

    weights: ops.Hardness | None

    def __init__(
        self,
        n_clusters: int,
        *,
        tau: float = 0.9,
        beta: float = 1.0,
        n_init: int = 10,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.n_clusters, self.tau, self.beta = n_clusters, tau, beta
        self.n_init, self.precision = n_init, precision
        self.alpha = nn.Parameter(torch.tensor(ALPHA_START))
        self.weights = None

    def forward(
        self, z1: Tensor, z2: Tensor, e1: Tensor | None = None, e2: Tensor | None = None
    ) -> Tensor:
        """The loss of attribute views z1, z2 [N, dz] and structure views e1, e2 [N, de], a scalar.

        Rows need not have unit length. Without structure views only attributes are compared, and
        alpha takes no part.
        """
        z, e = _stacked(z1, z2), _structure(e1, e2)
        alpha = 1.0 if e is None else self.alpha
        return ops.hard_infonce(z, e, alpha, weights=self.weights, precision=self.precision)

    @torch.no_grad()
    def refresh(
        self,
        z1: Tensor,
        z2: Tensor,
        e1: Tensor | None = None,
        e2: Tensor | None = None,
        *,
        seed: int = 0,
    ) -> Tensor:
        """Judge anew which pairs are hard, by k-means of the mean view; returns labels int64 [N].

        HSAN does so after every tenth step.
        """
        z, e = _stacked(z1, z2), _structure(e1, e2)
        first, second = z.chunk(2)
        mean = (first + second) / 2
        result = ops.kmeans(mean, self.n_clusters, n_init=self.n_init, seed=seed)
        confident = confident_nodes(mean, result.centers, self.tau)
        alpha = 1.0 if e is None else self.alpha
        self.weights = ops.hardness(z, e, alpha, result.labels, confident, self.beta)
        return result.labels

    def get_extra_state(self) -> dict[str, Tensor]:
        """The weights, for ``state_dict``."""
        return {} if self.weights is None else self.weights.state_dict()

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """The weights, from ``load_state_dict``, to where the module is."""
        self.weights = None
        if state:
            self.weights = ops.Hardness.from_state_dict(state).apply(
                lambda t: t.to(self.alpha if t.is_floating_point() else self.alpha.device)
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HardSampleInfoNCE:
        # what to(), cuda(), double() and their like call
        if self.weights is not None:
            self.weights = self.weights.apply(fn)
        return super()._apply(fn, recurse)


class ResidualPropagation(nn.Module):
    """act(Abar (H W + b) + H), a layer of ECN-MF's encoders (Cheng et al., CMC 2024, Eqs. 10-11).

    Parameters
    ----------
    in_features, out_features : int
        Columns of H and of the result; the residual is there only where they are equal.
    activation : {"relu", "none"}, default "relu"
        Fused into the propagation.
    bias : bool, default True
        Whether there is b.

    Examples
    --------
    >>> graph = Graph(torch.tensor([[0, 1, 2], [1, 2, 3]]))
    >>> ResidualPropagation(8, 4)(graph, torch.randn(4, 8)).shape
    torch.Size([4, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: Literal["relu", "none"] = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation

    def forward(self, graph: Graph, h: Tensor) -> Tensor:
        """H [N, in_features] to [N, out_features]; float32 under autocast."""
        residual = h if self.linear.in_features == self.linear.out_features else None
        out = as_operand(self.linear(h))
        if residual is not None:
            residual = residual.to(out.dtype)
        return ops.propagate(graph, out, residual=residual, activation=self.activation)


class LowRankView(nn.Module):
    """The low-rank second view X_r of ECN-MF (Eqs. 2-9), times a weight, without forming X_r.

    Parameters
    ----------
    x : array or tensor [N, D]
        Attributes, constant.
    rank : int, float or "gavish-donoho"
    **options
        As for :func:`fastclust.ops.low_rank`.

    Examples
    --------
    >>> LowRankView(torch.randn(50, 20), rank=5)(torch.randn(20, 3)).shape
    torch.Size([50, 3])
    """

    left: Tensor  # [N, R]
    right: Tensor  # [R, D]

    def __init__(self, x: Any, rank: int | float | str, **options: Any) -> None:
        super().__init__()
        left, right = ops.low_rank(x, rank, **options).factors()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, weight: Tensor) -> Tensor:
        """X_r W [N, k] for W [D, k]."""
        return self.left @ (self.right @ weight)


class SoftAssignment(nn.Module):
    """The clustering head of ECN-MF: Q = softmax(Z W + b), and its self-training loss (Eqs. 14-16).

    Parameters
    ----------
    width : int
        Columns of Z.
    n_clusters : int
        K.

    Examples
    --------
    >>> head = SoftAssignment(8, 3)
    >>> z = torch.randn(20, 8)
    >>> head.start(z)
    >>> log_q = head(z)
    >>> loss, labels = head.divergence(log_q), log_q.argmax(1)
    """

    def __init__(self, width: int, n_clusters: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, n_clusters)

    def forward(self, z: Tensor) -> Tensor:
        """log Q [N, K] for z [N, width]; float32 under autocast."""
        return torch.log_softmax(as_operand(self.linear(z)), dim=1)

    @torch.no_grad()
    def start(self, z: Tensor, *, n_init: int = 10, seed: int = 0) -> None:
        """Set W and b so that Q is the posterior of the k-means clusters of z [N, width]."""
        result = ops.kmeans(z, self.linear.out_features, n_init=n_init, seed=seed)
        sharpness = z.shape[0] / max(result.inertia, 1e-8 * z.shape[0])
        self.linear.weight.copy_(2.0 * sharpness * result.centers)
        self.linear.bias.copy_(-sharpness * result.centers.square().sum(1))

    @staticmethod
    def divergence(log_q: Tensor) -> Tensor:
        """KL(P || Q) / N with P the sharpened Q, a constant (Eqs. 15-16); log_q [N, K]."""
        target = target_distribution(log_q.exp())
        return nn.functional.kl_div(log_q, target, reduction="batchmean")


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Two views [N, d] as unit rows in one array [2N, d], in float32 under autocast."""
    return torch.cat([unit_rows(as_operand(first)), unit_rows(as_operand(second))])


def _structure(e1: Tensor | None, e2: Tensor | None) -> Tensor | None:
    if (e1 is None) != (e2 is None):
        raise ValueError("e1 and e2 must both be given or both be None")
    return None if e1 is None or e2 is None else _stacked(e1, e2)
