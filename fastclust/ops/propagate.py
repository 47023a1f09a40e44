"""Sparse propagation with residual and activation, in one pass forward and one pass backward."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fastclust._library import register_gradient
from fastclust.graph import Graph
from fastclust.interop import as_operand
from fastclust.validation import (
    check_choice,
    check_dense,
    check_finite,
    check_integer,
    check_like,
)

__all__ = ["propagate"]

Activation = Literal["none", "relu"]


def propagate(
    graph: Graph,
    h: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    activation: Activation = "none",
    steps: int = 1,
) -> torch.Tensor:
    r"""Propagate node features along the edges of a graph.

    .. math:: Y = \mathrm{act}(\bar A^{\,t} H + R)

    with :math:`\bar A` the graph's normalised adjacency and :math:`t` = ``steps``. With
    ``residual=h`` this is a layer of the encoders of ECN-MF (Eqs. 10-11), with ``steps`` the
    low-pass filter of HSAN and SSGC, and with ``Graph(adjacency, norm="none", self_loops=False)``
    the linear structure encoder of HSAN, :math:`A V`.

    Parameters
    ----------
    graph : Graph
        On the device of ``h``.
    h : torch.Tensor
        [N, d], float32 or float64, any strides, or an array that speaks DLPack (see
        :mod:`fastclust.interop`); rows that are contiguous are read in place. On CUDA also
        bfloat16: half the bytes, sums in float32, the result and gradients rounded once.
    residual : torch.Tensor, optional
        [N, d], added before the activation; of the dtype and on the device of ``h``. ``h``
        itself is read once only.
    activation : {"none", "relu"}, default "none"
        Applied to the sum.
    steps : int, default 1
        How often :math:`\bar A` is applied; 0 leaves ``h`` as it is.

    Returns
    -------
    torch.Tensor
        [N, d], contiguous. The same bits for any number of threads.

    Raises
    ------
    TypeError
        ``graph`` is no Graph, ``h`` or ``residual`` no tensor of such a dtype, ``steps`` no
        integer.
    ValueError
        Shapes, dtypes or devices do not fit, unknown ``activation``, negative ``steps``; ``h`` or
        ``residual`` holds NaN or infinite values (on CUDA and inside ``torch.compile``, where that
        is not looked at, they spread to the neighbours).

    Notes
    -----
    Differentiable in ``h`` and ``residual``. What the backward needs is one bit per element of
    the output with ``activation="relu"``, nothing without.

    Examples
    --------
    >>> import numpy as np, torch
    >>> g = Graph(np.array([[0, 1], [1, 0]]))
    >>> propagate(g, torch.tensor([[1.0], [3.0]]))
    tensor([[2.],
            [2.]])
    """
    given, h = h, as_operand(h)
    residual = h if residual is given else as_operand(residual)
    _check(graph, h, residual, activation, steps)
    check_finite("h", h)
    if residual is not None and residual is not h:
        check_finite("residual", residual)
    return propagate_any(graph, h, residual=residual, activation=activation, steps=steps)


def propagate_any(
    graph: Graph,
    h: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    activation: Activation = "none",
    steps: int = 1,
) -> torch.Tensor:
    """:func:`propagate` of tensors of any values.

    For models in training: where that diverges, the loop says so, and what to lower.
    """
    own_residual = residual is h and steps == 1
    relu = activation == "relu"
    if steps == 0:
        out = h if residual is None else h + residual
        out = torch.relu(out) if relu else out
        return out.clone(memory_format=torch.contiguous_format) if out is h else out.contiguous()

    tensors = _graph_args(graph, h.dtype)
    out = h
    for _ in range(steps - 1):
        out, _mask = _propagate(*tensors, out, None, False, False, False)
    want_mask = (
        relu
        and torch.is_grad_enabled()
        and (h.requires_grad or (residual is not None and residual.requires_grad))
    )
    out, _mask = _propagate(
        *tensors, out, None if own_residual else residual, own_residual, relu, want_mask
    )
    return out


def _check(graph: Any, h: Any, residual: Any, activation: Any, steps: Any) -> None:
    if not isinstance(graph, Graph):
        raise TypeError(f"graph must be a fastclust.Graph, got {type(graph).__name__}")
    check_dense("h", h, bfloat16_on_cuda=True)
    if h.ndim != 2:
        raise ValueError(
            f"h must have shape [N, d], got {list(h.shape)}; use h[:, None] for one value per node"
        )
    if h.shape[0] != graph.n_nodes:
        raise ValueError(
            f"h must have one row per node of the graph ({graph.n_nodes}), got {h.shape[0]} rows"
        )
    if h.device.type != graph.device.type or h.device.index != graph.device.index:
        raise ValueError(
            f"h must be on the device of the graph ({graph.device}), got {h.device}; "
            f"move the graph once with graph.to({str(h.device)!r})"
        )
    if residual is not None:
        if not isinstance(residual, torch.Tensor):
            raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
        if residual.shape != h.shape:
            raise ValueError(
                f"residual must have the shape of h ({list(h.shape)}), got {list(residual.shape)}"
            )
        check_like("residual", residual, "h", h)
    check_choice("activation", activation, ("none", "relu"))
    check_integer("steps", steps, 0)


def _graph_args(graph: Graph, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the first ten arguments of both operators."""
    return (
        graph.indptr,
        graph.indices,
        graph.values,
        *graph.scales(dtype),
        graph.self_loops,
        graph._task_rows,
        graph._segments,
        graph._hubs,
        graph._hub_edges,
    )


N_GRAPH_ARGS = 10


@torch.library.register_fake("fastclust::propagate")
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    h, want_mask = args[N_GRAPH_ARGS], args[N_GRAPH_ARGS + 4]
    n_nodes, n_cols = h.shape
    words = (n_cols + 31) // 32 if want_mask else 0  # a bit for each column
    return h.new_empty(n_nodes, n_cols), h.new_empty(n_nodes, words, dtype=torch.int32)


@torch.library.register_fake("fastclust::propagate_backward")
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    grad, want_residual = args[N_GRAPH_ARGS], args[N_GRAPH_ARGS + 3]
    n_nodes, n_cols = grad.shape
    rows = n_nodes if want_residual else 0
    return grad.new_empty(n_nodes, n_cols), grad.new_empty(rows, n_cols)


@torch.library.register_fake("fastclust::mask_rows")
def _(grad: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape)


def _save(ctx: Any, graph: tuple[Any, ...], mask: torch.Tensor | None) -> None:
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in graph]
    ctx.scalars = [value for value in graph if not isinstance(value, torch.Tensor)]
    tensors = [value for value in graph if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*tensors, mask)


def _saved(ctx: Any) -> tuple[list[Any], torch.Tensor | None]:
    """The operators' first ten arguments, and the mask."""
    *tensors, mask = ctx.saved_tensors
    tensor, scalar = iter(tensors), iter(ctx.scalars)
    return [next(tensor) if is_tensor else next(scalar) for is_tensor in ctx.is_tensor], mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _h, _residual, ctx.add_input, relu, want_mask = inputs[N_GRAPH_ARGS:]
    ctx.lacks_mask = relu and not want_mask
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs[:N_GRAPH_ARGS], output[1] if want_mask else None)


def _backward(ctx: Any, grad: torch.Tensor, _grad_mask: Any) -> tuple[Any, ...]:
    if ctx.lacks_mask:
        raise RuntimeError("fastclust::propagate needs want_mask to be differentiable with relu")
    graph, mask = _saved(ctx)
    want_h, want_residual = ctx.needs_input_grad[N_GRAPH_ARGS : N_GRAPH_ARGS + 2]
    grad_h = grad_residual = None
    if want_h:
        grad_h, grad_residual = _propagate_backward(
            *graph, grad, mask, ctx.add_input, want_residual and mask is not None
        )
    elif want_residual and mask is not None:
        grad_residual = _mask_rows(grad, mask)
    if not want_residual:
        grad_residual = None
    elif mask is None:
        grad_residual = grad
    return (*[None] * N_GRAPH_ARGS, grad_h, grad_residual, None, None, None)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _grad, mask, ctx.add_input, ctx.want_residual = inputs[N_GRAPH_ARGS:]
    _save(ctx, inputs[:N_GRAPH_ARGS], mask)


def _second(ctx: Any, v_h: torch.Tensor, v_residual: torch.Tensor) -> tuple[Any, ...]:
    """The gradient A^T M g, and M g, is linear in g: v goes to M (A v_h + v_residual)."""
    graph, mask = _saved(ctx)
    grad, _mask = _propagate(*graph, v_h, None, ctx.add_input, False, False)
    if ctx.want_residual:
        grad = grad + v_residual
    if mask is not None:
        grad = _mask_rows(grad, mask)
    return (*[None] * N_GRAPH_ARGS, grad, None, None, None)


def _setup_mask_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _mask_rows_backward(ctx: Any, v: torch.Tensor) -> tuple[Any, ...]:
    return _mask_rows(v, *ctx.saved_tensors), None


_propagate = register_gradient("propagate", _backward, _setup_context)
_propagate_backward = register_gradient("propagate_backward", _second, _setup_second)
_mask_rows = register_gradient("mask_rows", _mask_rows_backward, _setup_mask_rows)
