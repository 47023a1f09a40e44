"""Watch a training run: a callback that prints, draws, and stops when the clusters settle.

python examples/callback.py
"""

import numpy as np

import fastclust as fc


class Settled(Exception):
    """The clusters no longer change."""


class Watch:
    """Called after every epoch; ``event.evaluation`` is there in the evaluated ones."""

    def __init__(self, patience: int) -> None:
        self.patience, self.calm, self.labels = patience, 0, None

    def __call__(self, event) -> None:
        if event.evaluation is None:
            return
        labels = event.evaluation["labels"]
        moved = 1.0 if self.labels is None else float(np.mean(labels != self.labels))
        self.labels = labels
        self.calm = self.calm + 1 if moved < 0.002 else 0
        print(
            f"epoch {event.epoch:3}  loss {event.loss:.4f}  moved {100 * moved:.1f} %  "
            f"modularity {event.evaluation['modularity']:.4f}"
        )
        if self.calm >= self.patience:
            raise Settled


data = fc.load_dataset("digits")
watch = Watch(patience=3)
model = fc.ECNMF(n_clusters=10, epochs=400, width=128, eval_every=5, callbacks=watch)
try:
    model.fit(data.features, adjacency=data.adjacency)
except Settled:
    print("settled")
print(fc.metrics.clustering_scores(data.labels, watch.labels))
