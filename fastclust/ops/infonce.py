"""Hard-sample-weighted InfoNCE over all pairs of 2N rows, without a 2N x 2N array.

The loss of HSAN (Hard Sample Aware Network, AAAI 2023, Eqs. 6 and 8 to 11). The mathematics stands
in ``csrc/infonce/infonce.h`` and, as plain torch, in :mod:`fastclust.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from fastclust._library import register_gradient
from fastclust.interop import as_operand, without_autocast
from fastclust.memory import require_memory
from fastclust.validation import check_choice, check_dense, check_finite

# Logits with which the CPU finds row sums for any number of rows: further inside the limits of its
# exponential (csrc/common/vec_math.h) than rows, or rounding errors, can add up to.
_LOGITS = {torch.float32: 70, torch.float64: 670}

#: Arithmetic of the products, in the order of csrc/infonce/infonce.h.
Precision = Literal["fp32", "tf32", "bf16x3", "bf16"]
PRECISIONS = {name: code for code, name in enumerate(get_args(Precision))}

#: Snapshots that one :class:`Hardness` can hold (bits of its membership masks).
MAX_SNAPSHOTS = 63

# Fields of a Hardness that are one tensor each, in the order of the operators' arguments.
_TENSORS = ("alpha", "range", "labels", "membership", "order")

#: Rows and columns of a tile of :class:`StoredHardness` (kWeightTile of csrc/infonce/infonce.h).
WEIGHT_TILE = 192


@dataclass(frozen=True, eq=False)
class Hardness:
    """Weights of :func:`hard_infonce`, held as snapshots of the embeddings: O(N d) memory.

    Made by :func:`hardness`; :func:`dense_weights` writes the array out. ``S`` below is the number
    of snapshots (refreshes), one unless weights of earlier refreshes are kept. Each is one more
    product per pass; :class:`StoredHardness` has none, but holds the array.

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

    def apply(self, function: Callable[[Tensor], Tensor]) -> Hardness:
        """The same weights of what ``function`` makes of each tensor: moved or converted."""
        made: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self.with_views(function), **made)

    def with_views(self, function: Callable[[Tensor], Tensor]) -> Hardness:
        """The same weights, their embeddings replaced by what ``function`` makes of each."""
        return replace(self, z=tuple(map(function, self.z)), e=tuple(map(function, self.e)))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as a flat dict of tensors, for a checkpoint."""
        state = {f"z.{s}": z for s, z in enumerate(self.z)}
        state |= {f"e.{s}": e for s, e in enumerate(self.e)}
        state |= {name: getattr(self, name) for name in _TENSORS}
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
                **{name: state[name] for name in _TENSORS},
                beta=float(state["beta"]),
            )
        except KeyError as error:
            raise ValueError(
                f"state must be what Hardness.state_dict() returned; {error} is missing"
            ) from None


@dataclass(frozen=True, eq=False)
class StoredHardness:
    """Weights of :func:`hard_infonce`, stored: some 8 N^2 bytes in float32, on the CPU.

    Made by :func:`hardness` with ``storage="stored"``; :func:`dense_weights` writes the array out.
    A pass over them costs what it costs without weights, however many refreshes they come from.

    Attributes:
        tiles: [T (T + 1) / 2, 192, 192] with T = ceil(2N / 192), the upper triangle of W in tiles,
            row by row; dtype of the embeddings. Place 2u + v is view v of node u.
        n_nodes: N.
        beta: exponent of the weights.
    """

    tiles: Tensor
    n_nodes: int
    beta: float

    @classmethod
    def from_snapshots(cls, weights: Hardness) -> StoredHardness:
        """The same weights, stored: its refreshes are gone through again.

        Raises:
            ValueError: the weights are not on the CPU.
        """
        stored = cls._ones(weights.n_nodes, weights.alpha, weights.beta)
        for s, (z, e) in enumerate(zip(weights.z, weights.e, strict=True)):
            confident = (weights.membership >> s) & 1 == 1
            stored._refresh(z, e, weights.alpha[s], weights.range[s], weights.labels[s], confident)
        return stored

    @staticmethod
    def n_bytes(n_nodes: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory that the weights of N nodes take."""
        side = -(-2 * n_nodes // WEIGHT_TILE)
        return side * (side + 1) // 2 * WEIGHT_TILE**2 * dtype.itemsize

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as a flat dict of tensors, for a checkpoint; ``tiles`` is not copied."""
        return {
            "tiles": self.tiles,
            "n_nodes": torch.tensor(self.n_nodes),
            "beta": torch.tensor(self.beta, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> StoredHardness:
        """Rebuild from :meth:`state_dict`; ``tiles`` is copied, since refreshes write to it.

        Raises:
            ValueError: an entry is missing, or ``tiles`` has another shape than the nodes need.
        """
        try:
            tiles, n, beta = state["tiles"], int(state["n_nodes"]), float(state["beta"])
        except KeyError as error:
            raise ValueError(
                f"state must be what StoredHardness.state_dict() returned; {error} is missing"
            ) from None
        shape = _tiles_shape(n)
        if tuple(tiles.shape) != shape:
            raise ValueError(
                f"tiles of {n} nodes must have shape {shape}, got {tuple(tiles.shape)}"
            )
        return cls(tiles.clone(memory_format=torch.contiguous_format), n, beta)

    @classmethod
    def _ones(cls, n: int, like: Tensor, beta: float) -> StoredHardness:
        """The weights before the first refresh, in the dtype of a tensor on the CPU."""
        if like.device.type != "cpu":
            raise ValueError(
                f'storage="stored" is for the CPU, got tensors on {like.device}; take '
                f'storage="snapshots"'
            )
        require_memory(
            cls.n_bytes(n, like.dtype),
            f"stored weights of {n} nodes",
            'take storage="snapshots" or fewer nodes',
        )
        return cls(torch.ones(_tiles_shape(n), dtype=like.dtype), n, float(beta))

    def _refresh(
        self,
        z: Tensor,
        e: Tensor,
        alpha: Tensor,
        extremes: Tensor,
        labels: Tensor,
        confident: Tensor,
    ) -> None:
        """Overwrite the weights of pairs of confident nodes."""
        torch.ops.fastclust.update_stored_weights(
            self.tiles, z, e, alpha, extremes, labels, confident, self.beta
        )
        # A backward pass that still needs the old values fails instead of taking the new ones.
        torch.autograd.graph.increment_version(self.tiles)


def _tiles_shape(n: int) -> tuple[int, int, int]:
    side = -(-2 * n // WEIGHT_TILE)
    return side * (side + 1) // 2, WEIGHT_TILE, WEIGHT_TILE


def hard_infonce(
    z: Tensor,
    e: Tensor | None,
    alpha: Tensor | float,
    *,
    weights: Hardness | StoredHardness | None = None,
    precision: str | None = None,
) -> Tensor:
    """Hard-sample-weighted InfoNCE loss of two stacked views (HSAN, Eqs. 6, 8, 10, 11).

    With ``S = alpha Z Z^T + (1 - alpha) E E^T``, weights ``W`` constant and ``p(i)`` the other view
    of row ``i``::

        L = 1/(2N) sum_i [ log sum_{k != i} exp(W_ik S_ik) - W_{i,p(i)} S_{i,p(i)} ]

    Time is 2 (2N)^2 (dz + de) multiply-adds forward and backward together (1 more for each snapshot
    that weights come from, none where they are stored); memory is a few copies of the inputs.
    Results are reproducible to the bit for any number of threads. Differentiable once, with respect
    to ``z``, ``e`` and ``alpha``; a gradient that is not needed is not computed.

    Args:
        z: [2N, dz] attribute embeddings, float32 or float64; rows ``i`` and ``N + i`` are the views
            of node ``i``. Rows are expected to have unit length: logits must stay below 70
            (float32) or 670 (float64) in absolute value.
        e: [2N, de] structure embeddings, or None for attribute similarity alone
            (``S = alpha Z Z^T``).
        alpha: weight of the attribute similarity, a 0-d tensor or a number; may leave [0, 1].
        weights: from :func:`hardness`; None means every weight is 1, which is NT-Xent at
            temperature 1.
        precision: arithmetic of the matrix products for float32 inputs. ``None`` and ``"fp32"``
            give float32-grade results: on a CPU by float32, on CUDA by ``"bf16x3"``, three bfloat16
            products of operands split in two, which keeps 17 bits of them (rms error of a logit up
            to 3e-7, of the gradients up to 1e-5 of their norm). ``"bf16"`` rounds the operands of
            the products, not those of the weights, to bfloat16 and sums in float32: on CUDA, and on
            a CPU with AVX-512 BF16 at the AVX-512 dispatch level (elsewhere it runs as
            ``"fp32"``). Its rms error of a logit at dz + de = 1000 is 7e-5, of the gradients 1e-4
            of their norm; no tested case with alpha in [0, 1] erred by more than 2^-8 of the
            largest entry.
            ``"tf32"`` (rms error of a logit 9e-6) and ``"bf16x3"`` name CUDA arithmetic; a CPU has
            nothing faster than float32 at that accuracy (three bf16 products cost 1.5 times one in
            float32), so there they are ``"fp32"``.

    Returns:
        The loss, 0-d, dtype of ``z``.

    Raises:
        ValueError: a shape, device, value or ``precision`` does not fit, or logits leave their
            range (on CUDA and inside ``torch.compile``, where that is not looked at, the loss is
            then not finite).
        TypeError: an argument is not a tensor of floating point.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(2 * 5, 8), dim=1)
        >>> loss = hard_infonce(z, None, 1.0)
    """
    z, e, alpha = _check_views(z, e, alpha)
    if weights is not None:
        _check_weights(weights, z)
    code = _precision_code(precision, z.dtype)
    if isinstance(weights, StoredHardness):
        none = _snapshot_arguments(None)
        loss, row_sums = _hard_infonce(z, e, alpha, *none, code, [], weights.tiles)
    else:
        loss, row_sums = _hard_infonce(z, e, alpha, *_snapshot_arguments(weights), code)
    _check_row_sums(row_sums, z)
    return loss


def _check_row_sums(row_sums: Tensor, z: Tensor) -> None:
    """Refuse a loss whose exponentials left their range: the CPU marks their rows with NaN."""
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return  # looking would stop a graph
    if row_sums.isnan().any():
        raise ValueError(
            f"z and e must give logits below {_LOGITS[z.dtype]} in absolute value ({z.dtype}), "
            f"got larger ones; give rows unit length, or a temperature that is not so small"
        )


@overload
def hardness(
    z: Tensor, e: Tensor | None, alpha: Tensor | float, labels: Tensor, confident: Tensor,
    beta: float, *, previous: Hardness | None = None, storage: Literal["snapshots"] = "snapshots",
) -> Hardness: ...  # fmt: skip
@overload
def hardness(
    z: Tensor, e: Tensor | None, alpha: Tensor | float, labels: Tensor, confident: Tensor,
    beta: float, *, previous: StoredHardness | None = None, storage: Literal["stored"],
) -> StoredHardness: ...  # fmt: skip
@torch.no_grad()
def hardness(
    z: Tensor,
    e: Tensor | None,
    alpha: Tensor | float,
    labels: Tensor,
    confident: Tensor,
    beta: float,
    *,
    previous: Hardness | StoredHardness | None = None,
    storage: Literal["snapshots", "stored"] = "snapshots",
) -> Hardness | StoredHardness:
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
            going back to 1. Snapshots that no pair refers to any more are dropped. Stored weights
            are updated where they lie and handed on: ``previous`` has the new values afterwards,
            and is not to be used again.
        storage: ``"snapshots"`` keeps the embeddings of every refresh that counts, O(N d) memory
            each, and makes weights of them inside each pass: a product more per snapshot.
            ``"stored"`` (CPU) keeps the upper triangle of W itself, 2 N^2 elements, which costs
            a pass nothing but reading it: for stale weights of small graphs.

    Returns:
        The weights: :class:`Hardness`, or :class:`StoredHardness`.

    Raises:
        ValueError: a shape, device or value does not fit, or ``previous`` is full.
        TypeError: an argument has the wrong type.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
        >>> labels, confident = torch.tensor([0, 1]), torch.tensor([True, True])
        >>> w = hardness(z, None, 1.0, labels, confident, 1.0, storage="stored")
        >>> confident = torch.tensor([False, True])  # the other node keeps its weights
        >>> w = hardness(z, None, 1.0, labels, confident, 1.0, previous=w, storage="stored")
        >>> w.tiles.shape
        torch.Size([1, 192, 192])
    """
    check_choice("storage", storage, ("snapshots", "stored"))
    z, e, alpha = _check_views(z, e, alpha)
    n = z.shape[0] // 2
    labels, confident = as_operand(labels), as_operand(confident)
    _check_vector(labels, "labels", n, z.device, (torch.int64, torch.int32))
    _check_vector(confident, "confident", n, z.device, (torch.bool,))
    readable = labels.device.type != "meta" and not torch.compiler.is_compiling()
    if readable and labels.dtype == torch.int64 and not torch.equal(labels, labels.int()):
        labels = torch.unique(labels, return_inverse=True)[1]  # the kernels take int32
    if not isinstance(beta, int | float | np.number):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}")
    beta = float(beta)
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    if previous is not None and isinstance(previous, StoredHardness) != (storage == "stored"):
        raise TypeError(f"previous must be of storage={storage!r}, got {type(previous).__name__}")
    stored = None
    if storage == "stored":
        if isinstance(previous, StoredHardness):
            _check_previous(previous, n, z, beta)
            stored = replace(previous)
        else:
            stored = StoredHardness._ones(n, z, beta)
    extremes = torch.ops.fastclust.similarity_range(z, e, alpha, PRECISIONS["fp32"])
    if stored is not None:
        labels = labels.to(torch.int32).contiguous()
        stored._refresh(z, e, alpha, extremes, labels, confident.contiguous())
        return stored
    assert not isinstance(previous, StoredHardness)
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
        return [], [], *[None] * len(_TENSORS), 0.0
    tensors = [getattr(weights, name) for name in _TENSORS]
    return list(weights.z), list(weights.e), *tensors, weights.beta


@without_autocast
def dense_weights(w: Hardness | StoredHardness) -> Tensor:
    """Write the weights out: [2N, 2N], dtype of the embeddings, for small graphs and tests.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
        >>> w = hardness(z, None, 1.0, torch.tensor([0, 1]), torch.tensor([True, False]), 1.0)
        >>> dense_weights(w).shape
        torch.Size([4, 4])
    """
    if not isinstance(w, Hardness | StoredHardness):
        raise TypeError(f"w must come from hardness(), got {type(w).__name__}")
    rows = 2 * w.n_nodes
    element = _elements(w)
    needed = rows * rows * (8 + 2 * element.element_size())
    require_memory(needed, f"dense_weights [{rows}, {rows}]", "take fewer nodes", element.device)
    if isinstance(w, StoredHardness):
        return _dense_stored(w)
    member = torch.cat([w.membership, w.membership])  # [2N]
    common = member[:, None] & member[None, :]  # [2N, 2N]
    dense = torch.ones_like(common, dtype=w.alpha.dtype)
    for s, (z, e) in enumerate(zip(w.z, w.e, strict=True)):
        similarity = w.alpha[s] * (z @ z.T) + (1 - w.alpha[s]) * (e @ e.T)
        least, greatest = w.range[s]
        width = greatest - least
        normal = width >= torch.finfo(width.dtype).tiny
        scaled = torch.where(normal, (similarity - least) / width, 0.0)
        labels = torch.cat([w.labels[s], w.labels[s]])
        same = (labels[:, None] == labels[None, :]).to(dense.dtype)
        values = (same - scaled).abs() ** w.beta
        dense = torch.where((common >> s) & 1 == 1, values, dense)  # a later refresh wins
    return dense


def _dense_stored(w: StoredHardness) -> Tensor:
    """[2N, 2N], rows and columns from place 2u + v to row v N + u."""
    n, side = w.n_nodes, -(-2 * w.n_nodes // WEIGHT_TILE)
    padded = w.tiles.new_empty(side, WEIGHT_TILE, side, WEIGHT_TILE)
    i, j = torch.triu_indices(side, side)
    padded[j, :, i] = w.tiles.mT
    padded[i, :, j] = w.tiles
    places = padded.view(side * WEIGHT_TILE, -1)[: 2 * n, : 2 * n]
    return places.reshape(n, 2, n, 2).permute(1, 0, 3, 2).reshape(2 * n, 2 * n)


def _elements(w: Hardness | StoredHardness) -> Tensor:
    """A tensor of the weights' dtype and device."""
    return w.tiles if isinstance(w, StoredHardness) else w.alpha


def _check_like_z(name: str, w: Hardness | StoredHardness, z: Tensor) -> None:
    held = _elements(w)
    if held.dtype != z.dtype or held.device != z.device:
        raise ValueError(
            f"{name} must have dtype {z.dtype} on {z.device} like z, "
            f"got {held.dtype} on {held.device}"
        )


def _check_previous(previous: Hardness | StoredHardness, n: int, like: Tensor, beta: float) -> None:
    if previous.n_nodes != n:
        raise ValueError(
            f"previous must be for the same nodes: it has {previous.n_nodes}, z has {n}"
        )
    _check_like_z("previous", previous, like)
    if previous.beta != beta:
        raise ValueError(f"previous must have beta = {beta}, got {previous.beta}")


def _extend(previous: Hardness, new: Hardness) -> Hardness:
    """Put a refresh on top of earlier ones and drop the snapshots that it makes unreachable."""
    _check_previous(previous, new.n_nodes, new.alpha, new.beta)
    top = previous.alpha.shape[0]
    # Bit `top` may lie beyond what a kernel accepts until unused snapshots are gone.
    membership = previous.membership | (new.membership << top)
    keep = _reachable(membership, top + 1)
    if len(keep) > MAX_SNAPSHOTS:
        raise ValueError(
            f"previous already holds {top} refreshes that some pair still refers to; at most "
            f"{MAX_SNAPSHOTS} can be kept. Start anew with previous=None, or take storage='stored'"
        )
    packed = torch.zeros_like(membership)
    for position, s in enumerate(keep):
        packed |= ((membership >> s) & 1) << position
    z, e = previous.z + new.z, previous.e + new.e
    rows = torch.tensor(keep, dtype=torch.int64, device=membership.device)

    def kept(name: str) -> Tensor:
        return torch.cat([getattr(previous, name), getattr(new, name)])[rows]

    return Hardness(
        z=tuple(z[s] for s in keep),
        e=tuple(e[s] for s in keep),
        alpha=kept("alpha"),
        range=kept("range"),
        labels=kept("labels"),
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
    elif isinstance(alpha, int | float | np.number):
        alpha = torch.full((), alpha, dtype=z.dtype, device=z.device)
    else:
        raise TypeError(f"alpha must be a number or a 0-d tensor, got {type(alpha).__name__}")
    for name, tensor in (("z", z), ("e", e), ("alpha", alpha)):
        check_finite(name, tensor)
    return z.contiguous(), e.contiguous(), alpha


def _check_embedding(x: Tensor, name: str) -> None:
    check_dense(name, x)
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


def _check_weights(weights: Hardness | StoredHardness, z: Tensor) -> None:
    if not isinstance(weights, Hardness | StoredHardness):
        raise TypeError(
            f"weights must come from fastclust.ops.hardness, got {type(weights).__name__}"
        )
    if 2 * weights.n_nodes != z.shape[0]:
        raise ValueError(
            f"weights must be for the nodes of z: they are for {weights.n_nodes}, "
            f"z has {z.shape[0]} rows"
        )
    if isinstance(weights, StoredHardness) and z.device.type != "cpu":
        raise ValueError(
            f'weights of storage="stored" are for the CPU, z is on {z.device}; make them with '
            f'storage="snapshots"'
        )
    _check_like_z("weights", weights, z)


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


@torch.library.register_fake("fastclust::update_stored_weights")
def _(stored: Tensor, *_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, e, alpha, snapshot_z, snapshot_e, *tensors, beta, precision = inputs[:12]
    window = inputs[12] if len(inputs) > 12 else []
    stored = inputs[13] if len(inputs) > 13 else None
    if window:
        raise RuntimeError("fastclust::hard_infonce is differentiable as a whole, not by windows")
    row_sums = output[1]
    ctx.mark_non_differentiable(row_sums)
    ctx.save_for_backward(z, e, alpha, row_sums, stored, *tensors, *snapshot_z, *snapshot_e)
    ctx.n_snapshots = len(snapshot_z)
    ctx.beta = beta
    ctx.precision = precision


def _backward(ctx: Any, grad_loss: Tensor, _grad_row_sums: Tensor | None) -> tuple[Any, ...]:
    z, e, alpha, row_sums, stored, *rest = ctx.saved_tensors
    tensors, snapshots = rest[:5], rest[5:]
    need = list(ctx.needs_input_grad[:3])
    n = ctx.n_snapshots
    gradients = _hard_infonce_backward(
        grad_loss.contiguous(), z, e, alpha, row_sums, snapshots[:n], snapshots[n:], *tensors,
        ctx.beta, ctx.precision, *need, *([] if stored is None else [[], stored]),
    )  # fmt: skip
    wanted = [g if used else None for g, used in zip(gradients, need, strict=True)]
    # One for each argument, a list for a list; torch drops arguments at the end that are defaults.
    last: tuple[Any, ...] = () if stored is None else ([], None)
    return (*wanted, [None] * n, [None] * n, None, None, None, None, None, None, None, *last)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "hard_infonce is differentiable once: its gradient cannot be differentiated again. "
        "Leave create_graph=False, or use fastclust.reference.hard_infonce for small graphs"
    )


_hard_infonce = register_gradient("hard_infonce", _backward, _setup_context)
_hard_infonce_backward = register_gradient(
    "hard_infonce_backward", _no_second_derivative, lambda ctx, inputs, output: None
)
