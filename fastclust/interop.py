"""Arrays of other libraries as torch tensors, over the same memory.

CuPy, JAX, Numba and others hand their arrays over by DLPack or the CUDA array interface. Every
operator takes such arrays in place of tensors and returns tensors, on the device where the data
are; ``cupy.from_dlpack(tensor)`` is the way back, again without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_operand", "from_foreign", "trains", "without_autocast"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def from_foreign(value: Any) -> Any:
    """A tensor over the memory of an array of another library; anything else as it is.

    NumPy arrays that must not be written to are copied: torch knows no such tensors. Work on a GPU
    array is waited for, in the order of streams, where it comes by DLPack; one that has the CUDA
    array interface alone must be ready, since torch does not look at the stream that it names.

    Examples
    --------
    >>> from_foreign(np.arange(3))
    tensor([0, 1, 2])
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc" or not value.dtype.isnative:
            return value
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if hasattr(value, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(value)
    if hasattr(value, "__cuda_array_interface__"):
        return torch.as_tensor(value, device="cuda")
    return value


def as_operand(value: Any) -> Any:
    """What an operator computes with: a tensor where ``value`` is any array, else ``value``.

    Under ``torch.autocast`` half-precision tensors become float32, as for torch's own losses.
    """
    if not isinstance(value, Tensor):
        value = from_foreign(value)
    if (
        isinstance(value, Tensor)
        and value.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled(value.device.type)
    ):
        return value.float()
    return value


def without_autocast(
    function: Callable[_Parameters, _Result],
) -> Callable[_Parameters, _Result]:
    """Decorate a function so that ``torch.autocast`` does not reach the products inside of it."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        # not one autocast as the decorator: its state would be shared by threads and nested calls
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return call


def trains(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorate a function that trains: no_grad, inference_mode and autocast do not reach it."""
    plain = without_autocast(function)

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with torch.inference_mode(False), torch.enable_grad():
            return plain(*args, **kwargs)

    return call
