"""``python -m fastclust.convert``: edge lists of any length to a folder of arrays.

The folder is what :func:`fastclust.load_dataset` and ``--dataset`` take by its path, mapped into
memory instead of read:

====================================  ============================================================
``dataset.json``                      ``format``, ``version``, ``n_nodes``, ``n_edges`` (both
                                      directions), ``n_features``
``adj_indptr.npy  adj_indices.npy``   int64 [N + 1], int32 [E]: symmetric CSR, no self loops, no
                                      repeated edge, neighbours ascending
``adj_data.npy``                      float32 [E], where edges have weights
``features.npy``                      float32 [N, D], or ``x_indptr.npy`` int64 [N + 1],
                                      ``x_indices.npy`` int32, ``x_data.npy`` float32
``labels.npy``                        int64 [N], where there are labels
====================================  ============================================================

How: one pass over the edges writes both directions of each, as (row, neighbour) in 64 bits, to a
file per 2^16 rows; then file by file is sorted, freed of repetitions and appended. No step holds
more than a block of the input or one such file, and a file over the limit is split by rows until it
fits. The result has another name until it is complete.
"""

from fastclust.convert.command import main
from fastclust.convert.passes import convert
from fastclust.datasets.folder import write_directory

__all__ = ["convert", "main", "write_directory"]
