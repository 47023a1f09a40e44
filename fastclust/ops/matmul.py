"""Dense matrix product: the encoders' largest cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclust._library import register_gradient
from fastclust.interop import as_operand, without_autocast
from fastclust.validation import check_dense, check_like

__all__ = ["matmul"]


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """The product a b + bias of two dense matrices.

    On the CPU this is fastclust's own packed product: the same bits for any number of threads
    (torch's may differ), and transposed factors are read where they lie. On CUDA it is torch's,
    in the dtype of ``a`` under ``torch.autocast``, too.

    Parameters
    ----------
    a : Tensor [m, k]
        float32 or float64, any strides.
    b : Tensor [k, n]
        Of the dtype and on the device of ``a``, any strides.
    bias : Tensor [n], optional
        Added to every row.
    out : Tensor [m, n], optional
        Where to write the result, contiguous; outside autograd only.
    precision : {"fp32", "tf32", "bf16x3", "bf16"}, default "fp32"
        ``"bf16"`` is torch's product of the factors rounded to bfloat16, rounded once more: a
        relative error of about 3e-3 instead of 1e-7. The others multiply in the dtype of ``a``.

    Returns
    -------
    Tensor
        [m, n], contiguous.

    Raises
    ------
    TypeError
        ``a`` or ``b`` is no tensor of float32 or float64.
    ValueError
        Shapes, dtypes or devices do not fit; ``out`` takes part in autograd.

    Examples
    --------
    >>> import torch
    >>> matmul(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), bias=torch.ones(1))
    tensor([[12.]])
    """
    a, b, bias = as_operand(a), as_operand(b), as_operand(bias)
    _check(a, b, bias, out)
    if precision == "bf16":
        with torch.autocast(a.device.type, enabled=False):  # might make float16 of them
            product = (a.bfloat16() @ b.bfloat16()).to(a.dtype)
        product = product if bias is None else product + bias
        return product if out is None else out.copy_(product)
    bias = None if bias is None else bias.contiguous()
    if out is not None:
        torch.ops.fastclust.matmul_out(out, a, b, bias)
        return out
    return _matmul(a, b, bias)


def _check(a: Any, b: Any, bias: Tensor | None, out: Tensor | None) -> None:
    check_dense("a", a)
    check_dense("b", b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a and b must have shapes [m, k] and [k, n], got {list(a.shape)} and {list(b.shape)}"
        )
    shapes = {"b": list(b.shape), "bias": [b.shape[1]], "out": [a.shape[0], b.shape[1]]}
    for name, y in (("b", b), ("bias", bias), ("out", out)):
        if y is None:
            continue
        if list(y.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {list(y.shape)}")
        check_like(name, y, "a", a)
    if out is not None:
        if not out.is_contiguous():
            raise ValueError("out must be contiguous")
        inputs = [x for x in (a, b, bias, out) if x is not None]
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise ValueError("out takes no part in autograd: call under torch.no_grad()")


@without_autocast
def _on_cuda(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


@without_autocast
def _on_cuda_out(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


torch.library.impl("fastclust::matmul", "cuda", func=_on_cuda)
torch.library.impl("fastclust::matmul_out", "cuda", func=_on_cuda_out)


@torch.library.register_fake("fastclust::matmul")
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("fastclust::matmul_out")
def _(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, _bias = inputs
    need_a, need_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if need_b else None, b if need_a else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b, need_bias = ctx.needs_input_grad[:3]
    return (
        _matmul(grad, b.t(), None) if need_a else None,
        _matmul(a.t(), grad, None) if need_b else None,
        grad.sum(0) if need_bias else None,
    )


_matmul = register_gradient("matmul", _backward, _setup_context)
