"""Plain-torch twins of the operators: the documentation of their mathematics.

Written to be read and to be differentiated by autograd, in any dtype (tests use float64), with no
regard for time or memory. Each section names the paper and the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# infonce: hard-sample-weighted InfoNCE (HSAN, AAAI 2023)
# ---------------------------------------------------------------------------------------------


def similarity(z: Tensor, e: Tensor | None, alpha: Tensor | float) -> Tensor:
    """Mixed similarity of all rows, Eq. 6: ``alpha Z Z^T + (1 - alpha) E E^T``, [2N, 2N]."""
    s = alpha * (z @ z.T)
    return s if e is None else s + (1 - alpha) * (e @ e.T)


def hard_infonce(
    z: Tensor, e: Tensor | None, alpha: Tensor | float, weights: Tensor | None = None
) -> Tensor:
    """Loss of Eqs. 8, 10 and 11 with constant weights [2N, 2N] (None: all 1), 0-d."""
    m = z.shape[0]
    logits = similarity(z, e, alpha)
    if weights is not None:
        logits = weights * logits
    rows = torch.arange(m, device=z.device)
    positive = logits[rows, (rows + m // 2) % m]  # [2N] the other view of each row
    others = logits.masked_fill(torch.eye(m, dtype=torch.bool, device=z.device), -torch.inf)
    return (torch.logsumexp(others, dim=1) - positive).mean()


def hardness(
    z: Tensor,
    e: Tensor | None,
    alpha: Tensor | float,
    labels: Tensor,
    confident: Tensor,
    beta: float,
    previous: Tensor | None = None,
) -> Tensor:
    """Weights of Eq. 9, [2N, 2N]; pairs outside the confident set keep ``previous`` (None: 1)."""
    s = similarity(z, e, alpha)
    width = s.max() - s.min()
    scaled = (s - s.min()) / width if width > 0 else torch.zeros_like(s)
    rows_label = torch.cat([labels, labels])
    rows_confident = torch.cat([confident, confident])
    same = (rows_label[:, None] == rows_label[None, :]).to(s.dtype)
    both = rows_confident[:, None] & rows_confident[None, :]
    outside = torch.ones_like(s) if previous is None else previous
    return torch.where(both, (same - scaled).abs() ** beta, outside)
