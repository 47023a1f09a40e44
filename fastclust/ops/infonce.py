"""Hard-sample-weighted InfoNCE over all pairs of 2N rows, without a 2N x 2N array.

The loss of HSAN (Hard Sample Aware Network, AAAI 2023, Eqs. 6 and 8 to 11). The mathematics stands
in ``csrc/infonce/infonce.h`` and, as plain torch, in :mod:`fastclust.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclust._library import register_gradient
from fastclust.interop import as_operand
from fastclust.memory import require_memory

#: Arithmetic of the products, as numbered in csrc/infonce/infonce.h.
PRECISIONS = {"fp32": 0, "tf32": 1, "bf16x3": 2, "bf16": 3}

#: Snapshots that one :class:`Hardness` can hold (bits of its membership masks).
MAX_SNAPSHOTS = 63


@dataclass(frozen=True, eq=False)
class Hardness:
    """Weights of :func:`hard_infonce`, held as snapshots of the embeddings: O(N d) memory.

    Made by :func:`hardness`; :func:`dense_weights` writes the array out. ``S`` below is the number
    of snapshots (refreshes), one unless weights of earlier refreshes are kept.

    Attributes:
        z: S tensors [2N, dz], attribute embeddings at each refresh.
        e: S tensors [2N, de], structure embeddings at each refresh.
        alpha: [S], the mix of the two similarities.
        range: [S, 2], least and greatest entry of the similarity, diagonal included.
        labels: int32 [S, N], cluster of each node.
        membership: int64 [N], bit s is set where the node was confident at refresh s.
        order: int32 [N], nodes by descending membership.
        beta: exponent of the weights.
    """

    z: tuple[Tensor, ...]
    e: tuple[Tensor, ...]
    alpha: Tensor
    range: Tensor
    labels: Tensor
    membership: Tensor
    order: Tensor
    beta: float

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return self.membership.shape[0]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as a flat dict of tensors, for a checkpoint."""
        state = {f"z.{s}": z for s, z in enumerate(self.z)}
        state |= {f"e.{s}": e for s, e in enumerate(self.e)}
        for name in ("alpha", "range", "labels", "membership", "order"):
            state[name] = getattr(self, name)
        state["beta"] = torch.tensor(self.beta, dtype=torch.float64)
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Hardness:
        """Rebuild from :meth:`state_dict`, on the device and in the dtype of its tensors.

        Raises:
            ValueError: an entry is missing.
        """
        try:
            n_snapshots = state["alpha"].shape[0]
            return cls(
                z=tuple(state[f"z.{s}"] for s in range(n_snapshots)),
                e=tuple(state[f"e.{s}"] for s in range(n_snapshots)),
                alpha=state["alpha"],
                range=state["range"],
                labels=state["labels"],
                membership=state["membership"],
                order=state["order"],
                beta=float(state["beta"]),
            )
        except KeyError as error:
            raise ValueError(
                f"state must be what Hardness.state_dict() returned; {error} is missing"
            ) from None


def hard_infonce(
    z: Tensor,
    e: Tensor | None,
    alpha: Tensor | float,
    *,
    weights: Hardness | None = None,
    precision: str | None = None,
) -> Tensor:
    """Hard-sample-weighted InfoNCE loss of two stacked views (HSAN, Eqs. 6, 8, 10, 11).

    With ``S = alpha Z Z^T + (1 - alpha) E E^T``, weights ``W`` constant and ``p(i)`` the other view
    of row ``i``::

        L = 1/(2N) sum_i [ log sum_{k != i} exp(W_ik S_ik) - W_{i,p(i)} S_{i,p(i)} ]

    Time is 2 (2N)^2 (dz + de) multiply-adds forward and backward together (3 where weights come
    from a snapshot); memory is a few copies of the inputs. Results are reproducible to the bit for
    any number of threads. Differentiable once, with respect to ``z``, ``e`` and ``alpha``; a
    gradient that is not needed is not computed.

    Args:
        z: [2N, dz] attribute embeddings, float32 or float64; rows ``i`` and ``N + i`` are the views
            of node ``i``. Rows are expected to have unit length: logits must stay below 80
            (float32) or 700 (float64) in absolute value.
        e: [2N, de] structure embeddings, or None for attribute similarity alone
            (``S = alpha Z Z^T``).
        alpha: weight of the attribute similarity, a 0-d tensor or a number; may leave [0, 1].
        weights: from :func:`hardness`; None means every weight is 1, which is NT-Xent at
            temperature 1.
        precision: arithmetic of the matrix products for float32 inputs. ``None`` and ``"fp32"``
            give float32-grade results everywhere. ``"bf16"`` rounds the operands of the products,
            not those of the weights, to bfloat16 and sums in float32: on CUDA, and on a CPU with
            AVX-512 BF16 at the AVX-512 dispatch level (elsewhere it runs as ``"fp32"``). Its rms
            error of a logit at dz + de = 1000 is 7e-5, of the gradients 1e-4 of their norm; no
            tested case with alpha in [0, 1] erred by more than 2^-8 of the largest entry.
            ``"tf32"`` and ``"bf16x3"`` name CUDA arithmetic (rms error of a logit 9e-6, 2e-7); a
            CPU has nothing faster than float32 at that accuracy (three bf16 products cost 1.5 times
            one in float32), so there they are ``"fp32"``.

    Returns:
        The loss, 0-d, dtype of ``z``.

    Raises:
        ValueError: a shape, device, value or ``precision`` does not fit.
        TypeError: an argument is not a tensor of floating point.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(2 * 5, 8), dim=1)
        >>> loss = hard_infonce(z, None, 1.0)
    """
    z, e, alpha = _check_views(z, e, alpha)
    if weights is not None:
        _check_weights(weights, z)
    code = _precision_code(precision, z.dtype)
    loss, _ = _hard_infonce(z, e, alpha, *_snapshot_arguments(weights), code)
    return loss


@torch.no_grad()
def hardness(
    z: Tensor,
    e: Tensor | None,
    alpha: Tensor | float,
    labels: Tensor,
    confident: Tensor,
    beta: float,
    *,
    previous: Hardness | None = None,
) -> Hardness:
    """Weights of hard pairs (HSAN, Eq. 9), to pass to :func:`hard_infonce`.

    For rows ``i``, ``k`` of nodes that are both confident, ``W_ik = |[same label] - s_ik|^beta``
    with ``s`` the similarity ``alpha Z Z^T + (1 - alpha) E E^T`` scaled to [0, 1] by its least and
    greatest entry over all 2N x 2N pairs; otherwise ``W_ik = 1``. The embeddings are copied, so the
    weights do not follow later training.

    Args:
        z: [2N, dz] attribute embeddings, float32 or float64.
        e: [2N, de] structure embeddings, or None.
        alpha: weight of the attribute similarity, a 0-d tensor or a number.
        labels: int64 [N], cluster of each node.
        confident: bool [N], the nodes whose label counts.
        beta: exponent, >= 0.
        previous: weights of the last refresh. Entries whose pair has left the confident set then
            keep their older value ("stale" weights, as the released code of HSAN does) instead of
            going back to 1. Snapshots that no pair refers to any more are dropped.

    Returns:
        The weights; O(N d) memory per snapshot.

    Raises:
        ValueError: a shape, device or value does not fit, or ``previous`` is full.
        TypeError: an argument has the wrong type.
    """
    z, e, alpha = _check_views(z, e, alpha)
    n = z.shape[0] // 2
    labels, confident = as_operand(labels), as_operand(confident)
    _check_vector(labels, "labels", n, z.device, (torch.int64, torch.int32))
    _check_vector(confident, "confident", n, z.device, (torch.bool,))
    if not isinstance(beta, int | float):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    extremes = torch.ops.fastclust.similarity_range(z, e, alpha, PRECISIONS["fp32"])
    return _refreshed(z, e, alpha, extremes, labels, confident, beta, previous)


def _refreshed(
    z: Tensor,
    e: Tensor,
    alpha: Tensor,
    extremes: Tensor,
    labels: Tensor,
    confident: Tensor,
    beta: float,
    previous: Hardness | None,
) -> Hardness:
    """The weights of a refresh, from checked arguments and the range of the similarity [2]."""
    new = Hardness(
        z=(z.detach().clone(),),
        e=(e.detach().clone(),),
        alpha=alpha.detach().reshape(1).clone(),
        range=extremes.reshape(1, 2),
        labels=labels.to(torch.int32, copy=True)[None],
        membership=confident.to(torch.int64),
        order=_descending(confident.to(torch.int64)),
        beta=float(beta),
    )
    return new if previous is None else _extend(previous, new)


def _snapshot_arguments(weights: Hardness | None) -> tuple[Any, ...]:
    """Weights as the operators take them."""
    if weights is None:
        return [], [], None, None, None, None, None, 0.0
    return (
        list(weights.z),
        list(weights.e),
        weights.alpha,
        weights.range,
        weights.labels,
        weights.membership,
        weights.order,
        weights.beta,
    )


def dense_weights(w: Hardness) -> Tensor:
    """Write the weights out: [2N, 2N], dtype of the embeddings, for small graphs and tests.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
        >>> w = hardness(z, None, 1.0, torch.tensor([0, 1]), torch.tensor([True, False]), 1.0)
        >>> dense_weights(w).shape
        torch.Size([4, 4])
    """
    member = torch.cat([w.membership, w.membership])  # [2N]
    rows = member.numel()
    needed = rows * rows * (8 + 2 * w.alpha.element_size())
    require_memory(needed, f"dense_weights [{rows}, {rows}]", "take fewer nodes", member.device)
    common = member[:, None] & member[None, :]  # [2N, 2N]
    dense = torch.ones_like(common, dtype=w.alpha.dtype)
    for s, (z, e) in enumerate(zip(w.z, w.e, strict=True)):
        similarity = w.alpha[s] * (z @ z.T) + (1 - w.alpha[s]) * (e @ e.T)
        least, greatest = w.range[s]
        width = greatest - least
        scaled = torch.where(width > 0, (similarity - least) / width, 0.0)
        labels = torch.cat([w.labels[s], w.labels[s]])
        same = (labels[:, None] == labels[None, :]).to(dense.dtype)
        values = (same - scaled).abs() ** w.beta
        dense = torch.where((common >> s) & 1 == 1, values, dense)  # a later refresh wins
    return dense


def _extend(previous: Hardness, new: Hardness) -> Hardness:
    """Put a refresh on top of earlier ones and drop the snapshots that it makes unreachable."""
    if previous.n_nodes != new.n_nodes:
        raise ValueError(
            f"previous must be for the same nodes: it has {previous.n_nodes}, z has {new.n_nodes}"
        )
    if previous.alpha.dtype != new.alpha.dtype or previous.alpha.device != new.alpha.device:
        raise ValueError(
            f"previous must have dtype {new.alpha.dtype} on {new.alpha.device} like z, "
            f"got {previous.alpha.dtype} on {previous.alpha.device}"
        )
    if previous.beta != new.beta:
        raise ValueError(f"previous must have beta = {new.beta}, got {previous.beta}")
    top = previous.alpha.shape[0]
    # Bit `top` may lie beyond what a kernel accepts until unused snapshots are gone.
    membership = previous.membership | (new.membership << top)
    keep = _reachable(membership, top + 1)
    if len(keep) > MAX_SNAPSHOTS:
        raise ValueError(
            f"previous already holds {top} refreshes that some pair still refers to; at most "
            f"{MAX_SNAPSHOTS} can be kept. Start anew with previous=None"
        )
    packed = torch.zeros_like(membership)
    for position, s in enumerate(keep):
        packed |= ((membership >> s) & 1) << position
    z, e = previous.z + new.z, previous.e + new.e
    rows = torch.tensor(keep, dtype=torch.int64, device=membership.device)
    return Hardness(
        z=tuple(z[s] for s in keep),
        e=tuple(e[s] for s in keep),
        alpha=torch.cat([previous.alpha, new.alpha])[rows],
        range=torch.cat([previous.range, new.range])[rows],
        labels=torch.cat([previous.labels, new.labels])[rows],
        membership=packed,
        order=_descending(packed),
        beta=new.beta,
    )


def _reachable(membership: Tensor, n_snapshots: int) -> list[int]:
    """Snapshots that are the newest common one of some pair of nodes (a node pairs with itself)."""
    masks = torch.unique(membership)  # [U]
    found = torch.zeros(n_snapshots, dtype=torch.bool, device=masks.device)
    for chunk in masks.split(max(1, 2**22 // max(1, masks.numel()))):
        common = torch.unique(chunk[:, None] & masks[None, :])
        for s in range(n_snapshots):
            found[s] |= ((common >> s) == 1).any()  # s is the highest bit
    # The newest refresh stays in any case: it carries the current state.
    found[n_snapshots - 1] = True
    return [s for s, used in enumerate(found.tolist()) if used]


def _descending(membership: Tensor) -> Tensor:
    return torch.argsort(membership, descending=True, stable=True).to(torch.int32)


def _check_views(
    z: Tensor, e: Tensor | None, alpha: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the embeddings and return them contiguous, e as a tensor, alpha 0-d in their dtype."""
    z = as_operand(z)
    _check_embedding(z, "z")
    rows = z.shape[0]
    if rows == 0 or rows % 2:
        raise ValueError(
            f"z must have 2N >= 2 rows, the two views of N nodes stacked, got shape "
            f"{tuple(z.shape)}"
        )
    if e is None:
        e = z.new_empty((rows, 0))
    else:
        e = as_operand(e)
        _check_embedding(e, "e")
        if e.shape[0] != rows:
            raise ValueError(
                f"e must have as many rows as z: z is {tuple(z.shape)}, e is {tuple(e.shape)}"
            )
        if e.dtype != z.dtype:
            raise TypeError(f"e must have the dtype of z, {z.dtype}, got {e.dtype}")
        if e.device != z.device:
            raise ValueError(f"e must be on the device of z, {z.device}, got {e.device}")
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(
                f"alpha must be a number or hold one element, got shape {tuple(alpha.shape)}"
            )
        if not alpha.is_floating_point():
            raise TypeError(f"alpha must be of floating point, got {alpha.dtype}")
        if alpha.device != z.device:
            raise ValueError(f"alpha must be on the device of z, {z.device}, got {alpha.device}")
        alpha = alpha.reshape(()).to(z.dtype)
    elif isinstance(alpha, int | float):
        alpha = torch.full((), alpha, dtype=z.dtype, device=z.device)
    else:
        raise TypeError(f"alpha must be a number or a 0-d tensor, got {type(alpha).__name__}")
    # Reading values stops a graph capture and a compiled graph, so it is left to eager CPU calls.
    if z.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, tensor in (("z", z), ("e", e), ("alpha", alpha)):
            if not math.isfinite(tensor.detach().sum()) and not tensor.isfinite().all():
                raise ValueError(f"{name} must be finite, but holds NaN or infinite values")
    return z.contiguous(), e.contiguous(), alpha


def _check_embedding(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [2N, d], got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {x.layout}; call .to_dense()")
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [2N, d], got {tuple(x.shape)}")


def _check_vector(
    x: Tensor, name: str, n: int, device: torch.device, dtypes: Sequence[torch.dtype]
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [{n}], got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {dtypes[0]}, got {x.dtype}")
    if tuple(x.shape) != (n,):
        raise ValueError(
            f"{name} must have shape [{n}], one entry per node (half the rows of z), "
            f"got {tuple(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name} must be on the device of z, {device}, got {x.device}")


def _check_weights(weights: Hardness, z: Tensor) -> None:
    if not isinstance(weights, Hardness):
        raise TypeError(
            f"weights must come from fastclust.ops.hardness, got {type(weights).__name__}"
        )
    if 2 * weights.n_nodes != z.shape[0]:
        raise ValueError(
            f"weights must be for the nodes of z: they are for {weights.n_nodes}, "
            f"z has {z.shape[0]} rows"
        )
    if weights.alpha.dtype != z.dtype or weights.alpha.device != z.device:
        raise ValueError(
            f"weights must have dtype {z.dtype} on {z.device} like z, "
            f"got {weights.alpha.dtype} on {weights.alpha.device}"
        )


def _precision_code(precision: str | None, dtype: torch.dtype) -> int:
    if precision is None:
        precision = "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None or one of {list(PRECISIONS)}, got {precision!r}")
    if dtype == torch.float64 and precision != "fp32":
        raise ValueError(f"precision={precision!r} is for float32 inputs, z is float64")
    return PRECISIONS[precision]


@torch.library.register_fake("fastclust::hard_infonce")
def _(z: Tensor, e: Tensor, alpha: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), z.new_empty((z.shape[0],), dtype=torch.float64)


@torch.library.register_fake("fastclust::hard_infonce_backward")
def _(
    grad_loss: Tensor, z: Tensor, e: Tensor, alpha: Tensor, row_sums: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_z, need_e, need_alpha = rest[9:12]  # after eight arguments of weights and the precision
    return (
        z.new_empty(z.shape if need_z else (0,)),
        e.new_empty(e.shape if need_e else (0,)),
        alpha.new_empty(() if need_alpha else (0,)),
    )


@torch.library.register_fake("fastclust::similarity_range")
def _(z: Tensor, e: Tensor, alpha: Tensor, precision: int, window: Sequence[int] = ()) -> Tensor:
    return z.new_empty((2,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, e, alpha, snapshot_z, snapshot_e, *tensors, beta, precision = inputs[:12]
    if any(inputs[12:]):
        raise RuntimeError("fastclust::hard_infonce is differentiable as a whole, not by windows")
    row_sums = output[1]
    ctx.mark_non_differentiable(row_sums)
    ctx.save_for_backward(z, e, alpha, row_sums, *tensors, *snapshot_z, *snapshot_e)
    ctx.n_snapshots = len(snapshot_z)
    ctx.beta = beta
    ctx.precision = precision


def _backward(ctx: Any, grad_loss: Tensor, _grad_row_sums: Tensor | None) -> tuple[Any, ...]:
    z, e, alpha, row_sums, *rest = ctx.saved_tensors
    tensors, snapshots = rest[:5], rest[5:]
    need = list(ctx.needs_input_grad[:3])
    n = ctx.n_snapshots
    gradients = _hard_infonce_backward(
        grad_loss.contiguous(), z, e, alpha, row_sums, snapshots[:n], snapshots[n:], *tensors,
        ctx.beta, ctx.precision, *need,
    )  # fmt: skip
    wanted = [g if used else None for g, used in zip(gradients, need, strict=True)]
    return (*wanted, [None] * n, [None] * n, None, None, None, None, None, None, None)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "hard_infonce is differentiable once: its gradient cannot be differentiated again. "
        "Leave create_graph=False, or use fastclust.reference.hard_infonce for small graphs"
    )


_hard_infonce = register_gradient("hard_infonce", _backward, _setup_context)
_hard_infonce_backward = register_gradient(
    "hard_infonce_backward", _no_second_derivative, lambda ctx, inputs, output: None
)
