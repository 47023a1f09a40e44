"""The one table of error bounds.

A kernel may err by at most FACTOR times what torch errs in the same dtype on the same input, both
against the float64 twin, plus the op's rounding allowance: so many units in the last place of the
largest magnitude in the result.

Products of operands rounded to bf16 err by BF16_ROUNDING, relative to the largest magnitude times
the size of the factors of a mixed similarity.
"""

from __future__ import annotations

import torch

__all__ = ["BF16_ROUNDING", "FACTOR", "ROUNDING", "bound"]

FACTOR = 2.0

# op -> units in the last place of the largest entry
ROUNDING = {
    "infonce": 4.0,
    "lowrank": 32.0,
    "matmul": 4.0,
    "propagate": 4.0,
}

BF16_ROUNDING = 2.0**-8  # two operands, half a unit in the last of 8 bits each


def bound(op: str, torch_error: float, largest: float, dtype: torch.dtype) -> float:
    """Largest error that ``op`` may show where torch shows ``torch_error`` in ``dtype``."""
    return FACTOR * torch_error + ROUNDING[op] * torch.finfo(dtype).eps * largest
