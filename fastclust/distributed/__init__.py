"""Training by several processes of ``torchrun``, nodes shared out by rows: torch.distributed only.

Rank r of R holds the rows of nodes floor(r N / R) to floor((r + 1) N / R), both views of them, in
every array with a row per node: attributes, embeddings, structure encoders, their gradients and
moments. Other parameters are copies, and their gradients are summed as they come up. Models
call a :class:`Ranks` for whatever looks across rows; on one process it hands on to
:mod:`fastclust.ops`, to the bit what it was, under ``torchrun`` it is a :class:`ShardedRanks`.

The loss, all pairs of M = 2N rows of width D = dz + de, is the one step that is not linear in N.
Its operators take a window of tiles of the symmetric M x M matrix (``csrc/infonce/infonce.h``), and
both variants cover the triangle once, so each rank does 4 M^2 D / R flop (D / R more per
pass where weights come from a snapshot), and forward and backward agree on who does what:

- *gather* (R <= 4): every rank gathers all rows and takes a band of the triangle's rows of equal
  area; row sums are all-reduced, gradients reduce-scattered.
- *half-ring* (R > 4): at step s <= R / 2, rank r has the block of rank r + s and computes the pair
  of blocks, for both; the row sums and gradients of the visitor travel back. With R even the last
  step meets every pair twice and each side does one half. The next block travels while a pair is
  computed.

docs/distributed.md counts what a rank receives and holds: the first sends the fewest messages, the
memory of the second shrinks with R.

Blocks of a pair are stacked as one small problem, the first padded with zero nodes to whole tiles:
such a row adds exp(0) = 1 to every row sum, which is taken off again, and nothing to a gradient. A
mask inside the kernels would have cost every call a comparison per entry.

Sums over ranks go the same way at every call, so a run repeats to the bit on the same number of
ranks; on another number the order of sums differs, and results agree to rounding.
"""

from __future__ import annotations

from fastclust.distributed.launch import current, join, session, with_contexts
from fastclust.distributed.ranks import ONE, LaunchError, RankLostError, Ranks
from fastclust.distributed.sharded import ShardedRanks

__all__ = [
    "ONE",
    "LaunchError",
    "RankLostError",
    "Ranks",
    "ShardedRanks",
    "current",
    "join",
    "session",
    "with_contexts",
]
