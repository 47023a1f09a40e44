"""Scaling by powers of two, which costs no digit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["times_power"]


def times_power(x: Tensor, exponents: int | npt.NDArray[np.int64]) -> Tensor:
    """x 2^exponents, of one exponent or one for each index of the first dimension (x on the CPU).

    In two steps, since a power alone may leave the range of the dtype.
    """
    if not np.any(exponents):
        return x
    halves = exponents // 2
    for half in (halves, exponents - halves):
        power: Any = np.ldexp(1.0, half)
        if isinstance(power, np.ndarray):
            power = torch.from_numpy(power).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        x = x * power
    return x
