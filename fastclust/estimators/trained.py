"""What HSAN and ECN-MF share: the training loop and its keywords."""

from __future__ import annotations

import hashlib
import inspect
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from fastclust import distributed
from fastclust.callbacks import print_progress
from fastclust.checkpoints import parse_interval, require_checkpoint_dir
from fastclust.estimators.base import Count, Features, GraphClusterer, Rate, Self, jsonable_params
from fastclust.interop import trains
from fastclust.ops.infonce import Precision
from fastclust.training import (
    Selection,
    Trainable,
    train,
)

# Names in ``parameters_`` of the projection that attributes go through first.
AXES = ("components", "mean")

# Keywords that say how a run is watched and kept, not what it computes.
_RUN_ONLY = (
    "callbacks", "checkpoint_dir", "checkpoint_every", "device", "resume", "verbose",
    "weight_storage",
)  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class TrainedClusterer(GraphClusterer):
    """What HSAN and ECN-MF share: the training loop and its keywords."""

    epochs: Count | None = None
    lr: Rate | None = None
    width: Count = 600
    protocol: Literal["standard", "paper-code"] = "standard"
    optimizer: Literal["adam", "averaged", "accumulated"] | None = None
    precision: Precision = "fp32"
    selection: Selection = "last"
    eval_every: Count = 10
    callbacks: Annotated[Any, "array-like", callable, None] = None
    checkpoint_dir: str | os.PathLike[str] | None = None
    checkpoint_every: Count | str = "60s"
    resume: bool = False
    verbose: Annotated[int, "verbose"] = 0

    def _build(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[Trainable, dict[str, torch.Tensor]]:
        """The model to train, and what beside its parameters embeds other nodes.

        Sets ``resolved_``, with the ``epochs``, ``lr`` and ``optimizer`` of the loop among it.
        """
        raise NotImplementedError

    def _check_settings(self, n_nodes: int, n_features: int) -> None:
        parse_interval(self.checkpoint_every)  # wrong without checkpoint_dir, too

    @trains
    def fit(self: Self, X: Any, y: Any = None, *, adjacency: Any = None) -> Self:
        """Cluster the nodes of an attributed graph.

        Parameters
        ----------
        X : array, scipy sparse, pandas table, torch tensor [N, D], or torch_geometric Data
            Node attributes. A ``Data`` object brings its graph along, with its edge weights. Arrays
            of other libraries (CuPy, JAX) are taken by DLPack.
        y : ignored
            Present for scikit-learn; never read.
        adjacency : scipy sparse, array [N, N], torch tensor, edge index [2, E] or networkx graph
            The graph; None takes the symmetric ``n_neighbors`` nearest-neighbour graph of X. A
            square pandas table and a networkx graph are put in the order of the index of X where
            both name the same nodes; otherwise row i of one belongs to row i of the other.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            Unusable data or settings; the message names the argument.
        InsufficientMemoryError
            It cannot fit into memory; told before anything large is allocated.
        TrainingInterrupted
            SIGINT or SIGTERM with ``checkpoint_dir`` set, after the checkpoint was written.
        TrainingDivergedError
            The loss or the embedding is no longer finite.
        """
        require_checkpoint_dir(self.resume, self.checkpoint_dir)
        features, graph, device = self._prepare(X, adjacency)
        ranks = distributed.current(features.shape[0])
        if ranks.size > 1 and self._samples(features.shape[0]):
            raise distributed.LaunchError(
                "mini-batches are trained by one process: leave torchrun, or batch_size and "
                "n_negatives"
            )
        model, basis = self._build(features, graph, device)
        rule = {key: self.resolved_[key] for key in ("epochs", "optimizer", "lr")}
        identity = None
        if self.checkpoint_dir is not None or ranks.size > 1:
            settings = jsonable_params(self, self.seed_)
            identity = {
                "estimator": type(self).__name__,
                **{key: value for key, value in settings.items() if key not in _RUN_ONLY},
                **rule,
                "data": data_digest(features, graph),
            }
            # Ranks that differ in these would wait for each other's answers to other questions.
            keeping = {"resume": self.resume, "checkpoint_dir": self.checkpoint_dir is not None}
            ranks.check_same(identity | keeping)
        callbacks = [] if self.callbacks is None else self.callbacks
        callbacks = [callbacks] if callable(callbacks) else list(callbacks)
        if self.verbose:
            callbacks.append(print_progress)
        result = train(
            model,
            adjacency=graph,
            selection=self.selection,
            eval_every=self.eval_every,
            callbacks=callbacks,
            checkpoint_dir=self.checkpoint_dir,
            checkpoint_every=self.checkpoint_every,
            resume=self.resume,
            identity=identity,
            **rule,
        )
        self.labels_, self.embedding_ = result.labels, result.embedding
        self.parameters_ = result.parameters | {k: v.cpu() for k, v in basis.items()}
        self.history_, self.n_iter_ = result.history, self.resolved_["epochs"]
        self.selected_epoch_ = result.epoch
        self._tell_of_one_cluster()
        return self

    def _keywords(self, model: type) -> dict[str, Any]:
        """What a model's keywords are by the same name here: resolved, or as given."""
        known = self.get_params(deep=False) | self.resolved_
        known |= {"n_clusters": self.n_clusters_, "seed": self.seed_}
        return {name: known[name] for name in inspect.signature(model).parameters if name in known}

    def _restore(self, model: torch.nn.Module) -> None:
        """Give a model the trained parameters that it has."""
        wanted = model.state_dict()
        model.load_state_dict({k: v for k, v in self.parameters_.items() if k in wanted})


def data_digest(
    features: Features, graph: sp.csr_array, labels: npt.NDArray[np.int64] | None = None
) -> str:
    """SHA-256 of the data, in hexadecimal."""
    digest = hashlib.sha256()
    arrays = [graph.indptr, graph.indices, graph.data]
    if isinstance(features, np.ndarray):
        arrays.append(features)
    else:
        arrays += [features.indptr, features.indices, features.data]
    if labels is not None:
        arrays.append(labels)
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
