"""``python -m fastclust.compare``: every method on every graph, in tables that can be believed.

Each method is trained by ``python -m fastclust.train`` in a process and a run directory of its own;
what is compared is read from there afterwards, so that an interrupted comparison goes on where it
stopped and one training run serves every rule that chooses an epoch:

``last``
    The last epoch, as ``fit`` leaves it.
``inertia``, ``calinski-harabasz``, ``davies-bouldin``, ``modularity``, ``loss``
    The evaluated epoch that the rule prefers; no rule sees a label.
``oracle``
    The evaluated epoch with the best accuracy **by the true labels**. No user without labels can
    have it; it is here because most published numbers of the field were chosen so, and nowhere
    else in this package.

Floors, which need no training, stand beside them, and the published numbers, marked as such.

With ``--collect`` nothing is run: the tables are made of what earlier comparisons finished, each
method under the settings in which it differs from its preset. What an earlier ``--collect`` left,
rows and commands, can be collected again when its runs are gone; then it has no curves.
"""

from fastclust.compare.command import main

__all__ = ["main"]
