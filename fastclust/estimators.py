"""The methods as scikit-learn estimators: :class:`HSAN`, :class:`ECNMF` and :class:`SSGC`."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from fastclust import distributed, ops
from fastclust._version import __version__
from fastclust.datasets import nearest_neighbor_graph
from fastclust.files import as_json, file_digest, replacing, write_atomically
from fastclust.graph import Graph
from fastclust.interop import trains, without_autocast
from fastclust.memory import require_memory
from fastclust.models.back_ends import (
    MOST_NODES,
    BackEnd,
    compare_back_ends,
    cut_vectors,
    no_comparison,
)
from fastclust.models.ecnmf import ECNMFModel, choose_propagation
from fastclust.models.hsan import HSANModel, WeightStorage, filtered_attributes, principal_axes
from fastclust.models.inputs import (
    as_tensor,
    check_counts,
    inverse_document_frequency,
    kmeans_labels,
    nearest_center,
    project,
    sampled_kmeans,
    unit_rows,
    weighted_rows,
)
from fastclust.models.minibatch import Batching, SampledECNMF, SampledHSAN
from fastclust.models.n_clusters import estimate_n_clusters
from fastclust.models.ssgc import (
    LEADING_PAIRS,
    Recipe,
    Weighting,
    cluster_means,
    consensus_kmeans,
    encodes_degree,
    ssgc_embedding,
    ssgc_projection,
)
from fastclust.ops.infonce import Precision
from fastclust.presets import preset
from fastclust.training import Selection, Trainable, parse_interval, print_progress, train
from fastclust.validation import (
    DataWarning,
    align_adjacency,
    check_adjacency,
    check_device,
    check_features,
    check_n_clusters,
    is_graph_data,
    unpack_graph_data,
)

__all__ = ["ECNMF", "HSAN", "SSGC"]

Features: TypeAlias = npt.NDArray[np.float32] | sp.csr_array
Self = TypeVar("Self", bound="_GraphClusterer")

# Sparse attributes with a larger share of entries than this are worked with as dense ones.
DENSE_FROM = 0.1

# The averaged-gradient rule moves by about lr x epochs in all; near 0.4 is where it did best, with
# rates from 1e-3 (400 epochs) to 3e-3 (150 epochs). So it takes the fewer epochs: they cost 2.7
# times less, and end on bat and eat at the same clusters.
AVERAGED_PATH = 0.4
AVERAGED_LR_MAX = 3e-3
AVERAGED_EPOCHS = 150
PUBLISHED_EPOCHS = 400

# Starts of k-means on the rows of a cut: they lie apart, and more find the same.
CUT_STARTS = 20
# A coordinate that no row of an embedding comes near: rows have unit length.
FAR = 1e3

# Types of keywords with what scikit-learn checks them by.
Count = Annotated[int, Interval(Integral, 1, None, closed="left")]
Pair = Annotated[int, Interval(Integral, 2, None, closed="left")]
Steps = Annotated[int, Interval(Integral, 0, None, closed="left")]
Weight = Annotated[float, Interval(Real, 0, None, closed="left")]
Rate = Annotated[float, Interval(Real, 0, None, closed="neither")]
Share = Annotated[float, Interval(Real, 0, 1, closed="both")]
Fraction = Annotated[float, Interval(Real, 0, 1, closed="neither")]

# Names in ``parameters_`` of the projection that attributes go through first.
AXES = ("components", "mean")

# Fitted attributes that go into config.json.
_FITTED = (
    "history_", "n_iter_", "n_features_in_", "seed_", "resolved_", "selected_epoch_",
    "n_clusters_", "n_clusters_evidence_", "recipe_", "n_steps_", "back_end_evidence_",
)  # fmt: skip

# Keywords that say how a run is watched and kept, not what it computes.
_RUN_ONLY = (
    "callbacks", "checkpoint_dir", "checkpoint_every", "device", "resume", "verbose",
    "weight_storage",
)  # fmt: skip


class _Fitted:
    """What ``fit`` leaves; apart from the keywords, which dataclasses collect."""

    labels_: npt.NDArray[np.int64]
    embedding_: npt.NDArray[np.float32]
    history_: list[dict[str, Any]]
    n_iter_: int
    n_features_in_: int
    n_clusters_: int
    n_clusters_evidence_: dict[str, Any] | None
    parameters_: dict[str, torch.Tensor]
    resolved_: dict[str, Any]  # what fit took for keywords that leave the choice to it
    selected_epoch_: int
    seed_: int


@dataclass(eq=False, repr=False, kw_only=True)
class _GraphClusterer(
    _Fitted, ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator
):
    """What the three estimators share: keywords, input checks, new nodes, presets, files."""

    n_clusters: int | Literal["auto"] = field(default=8, kw_only=False)
    random_state: Annotated[Any, "random_state"] = 0
    device: str | torch.device = "auto"
    n_init: Count = 10
    n_neighbors: Count = 10

    _name: ClassVar[str]

    @property
    def _parameter_constraints(self) -> dict[str, list[Any]]:
        """What scikit-learn checks the keywords by, from their type hints."""
        hints = get_type_hints(type(self), include_extras=True)
        return {name: _constraints(hints[name]) for name in self.get_params(deep=False)}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = []  # embeddings are float32
        return tags

    @property
    def _n_features_out(self) -> int:
        return int(self.embedding_.shape[1])

    def _checked_input(
        self, X: Any, adjacency: Any, *, reset: bool
    ) -> tuple[Features, sp.csr_array | None]:
        """Features and canonical adjacency, or None, from anything :meth:`fit` accepts."""
        if is_graph_data(X):
            if adjacency is not None:
                raise ValueError("adjacency must be None where X brings its own graph")
            X, graph = unpack_graph_data(X)
            features = X
        else:
            features = check_features(X, name="X")
            graph = None
            if adjacency is not None:
                adjacency = align_adjacency(adjacency, X)
                graph = check_adjacency(adjacency, int(features.shape[0]))
        named = X if hasattr(X, "columns") else features
        validate_data(self, named, reset=reset, skip_check_array=True)
        return features, graph

    def _prepare(self, X: Any, adjacency: Any) -> tuple[Features, sp.csr_array, torch.device]:
        """Checked data of a fit; sets ``seed_``, ``n_clusters_`` and its evidence."""
        auto = isinstance(self.n_clusters, str) and self.n_clusters == "auto"
        if not auto:
            check_n_clusters(self.n_clusters, minimum=1)
        self._validate_params()
        device = check_device(self.device)
        features, graph = self._checked_input(X, adjacency, reset=True)
        n = int(features.shape[0])
        if n == 1:
            raise ValueError("X must have at least 2 rows, one per node, got n_samples=1")
        advice = "reduce the features or take a subgraph"
        width = self.get_params().get("width")
        require_memory(
            self._memory_needed(*features.shape),
            f"{type(self).__name__} on {n} nodes with {features.shape[1]} features",
            advice if width is None else f"lower width (now {width}), {advice}",
            device,
        )
        if graph is None:
            graph = nearest_neighbor_graph(features, min(self.n_neighbors, n - 1))
        self.seed_ = _seed(self.random_state)
        if auto:
            self.n_clusters_, self.n_clusters_evidence_ = estimate_n_clusters(
                features, graph, seed=self.seed_, device=device
            )
            return features, graph, device
        self.n_clusters_ = check_n_clusters(self.n_clusters, n, minimum=1)
        self.n_clusters_evidence_ = None
        if self.n_clusters_ == 1:
            # scikit-learn's contract wants one cluster to work; it is hardly what anyone wants.
            warnings.warn(
                "n_clusters should be at least 2, got 1: all nodes are one cluster",
                DataWarning,
                stacklevel=3,
            )
        return features, graph, device

    def _tell_of_one_cluster(self) -> None:
        """Warn where all nodes fell into one of several clusters."""
        if self.n_clusters_ > 1 and np.all(self.labels_ == self.labels_[0]):
            warnings.warn(
                f"all nodes are in one of the {self.n_clusters_} clusters asked for: attributes "
                f"may look alike to the method; see whether they are constant, very small, or far "
                f"from 0, which wants centring",
                DataWarning,
                stacklevel=5,
            )

    def _memory_needed(self, n_nodes: int, n_features: int) -> int:
        """Bytes that a fit holds at once at least: parameters, their optimiser, embeddings."""
        raise NotImplementedError

    # --- new nodes --------------------------------------------------------------------------------

    def transform(self, X: Any, *, adjacency: Any = None) -> npt.NDArray[np.float32]:
        """Embed nodes with what was learned; nothing is trained.

        Parameters
        ----------
        X : as for :meth:`fit`
            Attributes [M, D] of the nodes, with the D columns of the training data.
        adjacency : as for :meth:`fit`
            The graph [M, M] that these nodes make up: another graph, or the training graph with new
            nodes and their edges appended (X then holds the old rows too). None: nodes without
            edges, each embedded from its own attributes alone.

        Returns
        -------
        ndarray float32 [M, d]
            For the training graph this is ``embedding_``, up to rounding and, for ECN-MF and SSGC,
            to the error of the randomised decomposition behind it.

        Raises
        ------
        ValueError, TypeError
            Unusable data, or the method defines no embedding of other nodes: ECN-MF with several
            batches whose low-rank views are not merged, SSGC where it fell back to degrees.
        """
        return self._infer(X, adjacency)[1]

    def predict(self, X: Any, *, adjacency: Any = None) -> npt.NDArray[np.int64]:
        """The cluster of each node, int64 [M]; arguments and errors as for :meth:`transform`.

        HSAN and SSGC take the nearest of the trained centres, ECN-MF its softmax head.
        """
        return self._infer(X, adjacency)[0]

    def fit_transform(
        self, X: Any, y: Any = None, *, adjacency: Any = None
    ) -> npt.NDArray[np.float32]:
        """``fit`` followed by ``transform`` of the same data; y is ignored."""
        return self.fit(X, adjacency=adjacency).transform(X, adjacency=adjacency)

    @without_autocast
    def _infer(self, X: Any, adjacency: Any) -> tuple[Any, Any]:
        check_is_fitted(self)
        features, graph = self._checked_input(X, adjacency, reset=False)
        if graph is None:
            n = int(features.shape[0])
            graph = sp.csr_array((n, n), dtype=np.float32)
        labels, embedding = self._predict(features, graph, check_device(self.device))
        return labels.cpu().numpy(), embedding.float().cpu().numpy()

    def _predict(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clusters int64 [M] and embedding [M, d] of other nodes."""
        raise NotImplementedError

    # --- presets and files ------------------------------------------------------------------------

    @classmethod
    def for_dataset(cls: type[Self], name: str, **overrides: Any) -> Self:
        """An estimator with the settings of a benchmark graph, see :mod:`fastclust.presets`.

        Parameters
        ----------
        name : str
            cora, citeseer, amap, amac, bat, eat, uat or digits.
        **overrides
            Keywords of the constructor that replace or add to the preset.

        Raises
        ------
        ValueError
            Unknown name.
        """
        return cls(**{**preset(cls._name, name), **overrides})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the fitted estimator: ``model.safetensors`` (parameters, labels, embedding) and
        ``config.json`` (every keyword, history). Callbacks are not kept.
        """
        check_is_fitted(self)
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"parameters/{k}": v.contiguous() for k, v in self.parameters_.items()}
        tensors["labels"] = torch.from_numpy(self.labels_)
        tensors["embedding"] = torch.from_numpy(self.embedding_)
        with replacing(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, {"fastclust": __version__})
        fitted = {key: getattr(self, key) for key in _FITTED if hasattr(self, key)}
        if hasattr(self, "feature_names_in_"):
            fitted["feature_names_in_"] = self.feature_names_in_.tolist()
        config = {
            "fastclust": __version__,
            "estimator": type(self).__name__,
            "parameters": _jsonable_params(self, self.seed_),
            "fitted": as_json(fitted),
            # Tells the tensors of another save, should this one end before this file is written.
            "model": file_digest(folder / "model.safetensors"),
        }
        write_atomically(folder / "config.json", json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls: type[Self], directory: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            The folder lacks a file, a file is damaged or of another save, or it holds another
            estimator.
        """
        folder = Path(directory)
        try:
            config = json.loads((folder / "config.json").read_text())
            tensors = load_file(folder / "model.safetensors")
            if config["estimator"] != cls.__name__:
                raise ValueError(f"it holds a {config['estimator']}, not a {cls.__name__}")
            digest = file_digest(folder / "model.safetensors")
            if config.get("model", digest) != digest:
                raise ValueError(
                    "model.safetensors is damaged, or of another save than config.json"
                )
            estimator = cls(**config["parameters"])
            for key, value in config["fitted"].items():
                setattr(estimator, key, value)
            if hasattr(estimator, "feature_names_in_"):
                estimator.feature_names_in_ = np.array(estimator.feature_names_in_, dtype=object)
            estimator.labels_ = tensors.pop("labels").numpy()
            estimator.embedding_ = tensors.pop("embedding").numpy()
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"directory must hold the config.json and model.safetensors of a saved "
                f"{cls.__name__}, got {os.fspath(directory)!r}: {error}"
            ) from None
        estimator.parameters_ = {k.removeprefix("parameters/"): v for k, v in tensors.items()}
        return estimator


@dataclass(eq=False, repr=False, kw_only=True)
class _TrainedClusterer(_GraphClusterer):
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
        features, graph, device = self._prepare(X, adjacency)
        parse_interval(self.checkpoint_every)  # wrong without checkpoint_dir, too
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
            settings = _jsonable_params(self, self.seed_)
            identity = {
                "estimator": type(self).__name__,
                **{key: value for key, value in settings.items() if key not in _RUN_ONLY},
                **rule,
                "data": data_digest(features, graph),
            }
            ranks.check_same(identity)
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

    def _restore(self, model: torch.nn.Module) -> None:
        """Give a model the trained parameters that it has."""
        wanted = model.state_dict()
        model.load_state_dict({k: v for k, v in self.parameters_.items() if k in wanted})


@dataclass(eq=False, repr=False, kw_only=True)
class HSAN(_TrainedClusterer):
    """Hard Sample Aware Network (Liu et al., AAAI 2023).

    Contrastive clustering of two learned views of every node, with weights that stress hard pairs;
    k-means on the mean view gives the clusters.

    Parameters
    ----------
    n_clusters : int or "auto", default 8
        K; ``"auto"`` estimates it without labels, see
        :func:`fastclust.models.n_clusters.estimate_n_clusters`.
    epochs : int, optional
        Full-batch steps. Default: 150 with averaged gradients, otherwise 400, as published.
    lr : float, optional
        Learning rate. Default: with averaged gradients 0.4 / epochs, at most 3e-3; otherwise 1e-3.
    filter_steps : int, default 2
        t of the filter S^t X.
    n_input : int, None or "auto", default "auto"
        Principal components kept before the filter; None keeps all attributes, ``"auto"`` keeps
        500 where there are more than that.
    width : int, default 1500
        Embedding width d.
    activation : {"identity", "sigmoid"}, default "identity"
        Of the attribute encoders.
    tau : float in [0, 1], default 0.9
        Fraction of nodes taken as confidently clustered.
    beta : float, default 1.0
        Exponent of the hardness weights.
    structure : bool, default True
        Whether structure encoders take part.
    weights : {"auto", "hard", "none"}, default "auto"
        Hard-sample weights (Eq. 9), or all weights 1. ``"auto"``: hard with ``"paper-code"``; none
        with ``"standard"``, where they help for some epochs and then lead away (docs/results.md).
    refresh_every : int, default 10
        Epochs between refreshes of the weights.
    protocol : {"standard", "paper-code"}, default "standard"
        Sets the keywords below that are None. ``"paper-code"`` trains as the released code does:
        gradients accumulated over all epochs, stale weights, k-means from its own draw of centres.
        Published numbers were moreover those of the epoch with the best accuracy by the true
        labels, which no setting here reproduces: a label-blind ``selection`` takes its place.
    optimizer : {"adam", "averaged", "accumulated"}, optional
        ``"standard"`` takes ``"averaged"``: cleared gradients, stepping along the mean of all of
        them over the root of their mean square; alpha, the weight of the attributes' similarity, is
        kept in [0, 1], where it is free with the others. See docs/evaluation.md: with plain Adam
        and cleared gradients accuracy falls by 34 points on cora, 20 on bat and 2.5 on eat.
    stale_weights : bool, optional
        Whether pairs that leave the confident set keep their weight (paper-code) or go back to 1.
    weight_storage : {"auto", "snapshots", "stored"}, default "auto"
        How weights are held; results agree to rounding. ``"snapshots"``: the embeddings of every
        refresh that counts, O(N width) memory each; each snapshot adds one product to every
        step; stale weights keep up to one snapshot per refresh. ``"stored"``: the weights
        themselves, 8 N^2 bytes; a step takes as long as without weights; for one process on the
        CPU. ``"auto"`` stores stale weights there where that takes at most 1 GiB (N = 11,500).
    kmeans : {"consensus", "k-means++", "paper-code"}, optional
        How Z is clustered, see :class:`fastclust.models.hsan.HSANModel`; ``"consensus"`` unless
        ``protocol`` says otherwise.
    batch_size : int, optional
        Nodes per step, for graphs of more nodes than all pairs of them allow; an epoch is then one
        step on one batch. None, or N and more, takes all nodes: the exact method. See
        :mod:`fastclust.models.minibatch`.
    n_negatives : int, optional
        Random nodes that a batch is contrasted with; None takes the batch itself.
    batching : {"random", "partition"}, default "random"
        Batches at random, or of parts of the graph.
    random_state : int, RandomState or None, default 0
        Seed of weights and k-means.
    device : str, default "auto"
        "auto" takes CUDA where it can be used.
    precision : {"fp32", "tf32", "bf16x3", "bf16"}, default "fp32"
        Of the products inside the loss.
    selection : str, default "last"
        Which epoch is the result: "last", or the evaluated epoch with the best "inertia",
        "calinski-harabasz", "silhouette", "davies-bouldin", "modularity" or "loss".
    eval_every : int, default 10
        Epochs between evaluations; epoch 1 and the last are always evaluated.
    n_init : int, default 10
        k-means restarts; a consensus takes ten times as many.
    n_neighbors : int, default 10
        Of the graph made from X where no adjacency is given.
    callbacks : callable or list of callable, optional
        Each is given a :class:`fastclust.training.Event` after every epoch.
    checkpoint_dir : path, optional
        Folder for checkpoints.
    checkpoint_every : int or str, default "60s"
        Epochs or seconds between checkpoints.
    resume : bool, default False
        Go on from the checkpoint in ``checkpoint_dir`` if there is one.
    verbose : int, default 0
        Print evaluations to stderr.

    Attributes
    ----------
    labels_ : ndarray int64 [N]
    embedding_ : ndarray float32 [N, width]
    history_ : list of dict
        One per epoch: epoch, loss, seconds, and the scores of evaluated epochs.
    n_iter_ : int
        Epochs trained.
    selected_epoch_ : int
        The epoch that labels, embedding and parameters are from.
    n_clusters_ : int
        K as used.
    n_clusters_evidence_ : dict or None
        With ``n_clusters="auto"``: ``rule``, ``n_clusters`` (the numbers tried) and ``agreement``
        (the stability of each).
    parameters_ : dict of tensors
        Of the selected epoch, and what attributes are projected on first.
    resolved_ : dict
        What fit took for keywords that leave the choice to it (lr, optimizer, ...).

    Examples
    --------
    >>> import fastclust as fc
    >>> ds = fc.load_dataset("digits")
    >>> model = fc.HSAN(n_clusters=10, epochs=2, width=64).fit(ds.features, adjacency=ds.adjacency)
    >>> model.labels_.shape
    (1797,)
    """

    width: Count = 1500
    filter_steps: Steps = 2
    n_input: Count | Literal["auto"] | None = "auto"
    activation: Literal["identity", "sigmoid"] = "identity"
    tau: Share = 0.9
    beta: Weight = 1.0
    structure: bool = True
    weights: Literal["auto", "hard", "none"] = "auto"
    refresh_every: Count = 10
    stale_weights: bool | None = None
    weight_storage: WeightStorage = "auto"
    kmeans: Literal["consensus", "k-means++", "paper-code"] | None = None
    batch_size: Pair | None = None
    n_negatives: Pair | None = None
    batching: Batching = "random"

    _name = "hsan"

    @classmethod
    def for_dataset(cls, name: str, **overrides: Any) -> HSAN:
        """Settings published for a benchmark graph; see :mod:`fastclust.presets`.

        The published learning rate belongs to accumulated gradients and to plain Adam; with
        averaged gradients (the default) the rate follows from the number of epochs.
        """
        estimator = super().for_dataset(name, **overrides)
        if "lr" not in overrides and estimator._optimizer() == "averaged":
            estimator.lr = None
        return estimator

    def _memory_needed(self, n_nodes: int, n_features: int) -> int:
        inputs = self._n_components(n_nodes, n_features) or n_features
        sides = 2 if self.structure else 1  # attributes, and the graph: an encoder row per node
        parameters = 2 * self.width * (inputs + (n_nodes if self.structure else 0))
        constants = 4 * (n_nodes * inputs + 4 * parameters)
        if self._samples(n_nodes):
            return constants + 4 * n_nodes * self.width  # the embedding
        # value, gradient and two moments of each parameter; both views of every node with gradient
        return constants + 4 * (2 * sides * 2 * n_nodes * self.width)

    def _samples(self, n_nodes: int) -> bool:
        """Whether a step takes fewer than all pairs of rows."""
        sizes = (self.batch_size, self.n_negatives)
        return any(size is not None and size < n_nodes for size in sizes)

    def _optimizer(self) -> str:
        if self.optimizer is not None:
            return self.optimizer
        return "accumulated" if self.protocol == "paper-code" else "averaged"

    def _weights(self) -> Literal["hard", "none"]:
        if self.weights != "auto":
            return self.weights
        return "hard" if self.protocol == "paper-code" else "none"

    def _build(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[Trainable, dict[str, torch.Tensor]]:
        released = self.protocol == "paper-code"
        optimizer = self._optimizer()
        averaged = optimizer == "averaged"
        epochs = int(self.epochs or (AVERAGED_EPOCHS if averaged else PUBLISHED_EPOCHS))
        lr = self.lr
        if lr is None:
            lr = min(AVERAGED_PATH / epochs, AVERAGED_LR_MAX) if averaged else 1e-3
        n_input = self._n_components(*features.shape)
        self.resolved_ = {
            "n_clusters": self.n_clusters_,
            "epochs": epochs,
            "lr": float(lr),
            "optimizer": optimizer,
            "n_input": n_input,
            "weights": self._weights(),
            "stale_weights": released if self.stale_weights is None else self.stale_weights,
            "kmeans": self.kmeans or ("paper-code" if released else "consensus"),
        }
        n = int(features.shape[0])
        sampling: dict[str, Any] = {}
        if self._samples(n):
            if self.resolved_["stale_weights"]:
                raise ValueError(
                    "stale_weights must be False with batch_size or n_negatives: weights of single "
                    "pairs are not kept there; set stale_weights=False"
                )
            if self.weight_storage == "stored":
                raise ValueError(
                    "weight_storage must not be 'stored' with batch_size or n_negatives: a step "
                    "makes its own weights there; leave it at 'auto'"
                )
            sampling = {
                "batch_size": min(self.batch_size or n, n),
                "n_negatives": self.n_negatives,
                "batching": self.batching,
            }
        x = as_tensor(features, device)
        basis = {} if n_input is None else principal_axes(x, n_input)
        model = self._model(x, graph, basis, ranks=distributed.current(len(x)), **sampling)
        self.resolved_["weight_storage"] = model.weight_storage
        return model, basis

    def _model(
        self, x: torch.Tensor, graph: sp.csr_array, basis: dict[str, torch.Tensor], **keywords: Any
    ) -> HSANModel:
        kind: Any = SampledHSAN if "batch_size" in keywords else HSANModel
        return kind(
            filtered_attributes(
                x, graph, filter_steps=self.filter_steps, n_input=basis if basis else None
            ),
            Graph(graph, norm="none", self_loops=False).to(x.device),
            n_clusters=self.n_clusters_,
            width=self.width,
            activation=self.activation,
            tau=self.tau,
            beta=self.beta,
            weights=self.resolved_["weights"],
            stale_weights=self.resolved_["stale_weights"],
            refresh_every=self.refresh_every,
            clamp_alpha=self.resolved_["optimizer"] == "averaged",
            kmeans=self.resolved_["kmeans"],
            n_init=self.n_init,
            precision=self.precision,
            seed=self.seed_,
            **{"structure": self.structure, "weight_storage": self.weight_storage, **keywords},
        )

    def _predict(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        basis = {k: v.to(device) for k, v in self.parameters_.items() if k in AXES}
        model = self._model(
            as_tensor(features, device), graph, basis, structure=False, weight_storage="auto"
        )
        # The structure encoders have a parameter for every training node; Z does not need them.
        self._restore(model)
        return model.predict()

    def _n_components(self, n_nodes: int, n_features: int) -> int | None:
        limit = min(n_nodes, n_features)
        if self.n_input == "auto":
            return 500 if limit > 500 else None
        if self.n_input is not None and self.n_input > limit:
            raise ValueError(
                f"n_input must be at most min(N, D) = {limit} for X of shape "
                f"({n_nodes}, {n_features}), got {self.n_input}; use 'auto' or a smaller number"
            )
        return self.n_input


@dataclass(eq=False, repr=False, kw_only=True)
class ECNMF(_TrainedClusterer):
    """Efficient Clustering Network based on Matrix Factorization (Cheng et al., CMC 2024).

    Residual graph convolutions on the attributes and on their low-rank reconstruction, trained to
    agree; the softmax head of their mean gives the clusters.

    Parameters
    ----------
    n_clusters : int or "auto", default 8
        K; ``"auto"`` estimates it without labels, see
        :func:`fastclust.models.n_clusters.estimate_n_clusters`.
    epochs : int, default 1000
        Full-batch steps.
    lr : float, optional
        Learning rate of Adam; default 1e-4.
    rank : int, float in (0, 1) or "gavish-donoho", optional
        Rank r of the reconstruction. Default: 50, or less where the data allow less. A fraction
        takes the smallest rank that leaves less than this share of the norm of X about its
        mean, "gavish-donoho" the singular values above the noise, see ``fastclust.ops.low_rank``.
    batch_size : int, optional
        Rows per batch of the decomposition; None takes all rows at once.
    recombine : {"merge", "block", "per_batch", "literal"}, default "merge"
        How batches make up X_r, see ``fastclust.ops.low_rank``; all the same for one batch.
    add_mean : bool, default False
        Whether the column means are added back to X_r.
    second_view : {"low-rank", "attributes"}, default "low-rank"
        ``"attributes"`` gives the second encoder X itself: the method without its SVD.
    width : int, default 600
        Columns of every layer.
    n_layers : int, default 2
        L; layers after the first are residual.
    norm : {"auto", "rw", "sym", "none"}, default "auto"
        Propagation D^-1 (A + I), D^-1/2 (A + I) D^-1/2 or A + I. ``"auto"`` takes D^-1 (A + I), as
        published, unless the attributes encode nothing but degrees (one attribute per node that
        explains 90 % of the variance of log(1 + degree)) and A + I clusters them more evenly, see
        :func:`fastclust.models.ecnmf.choose_propagation`.
    weighting : {"auto", "none", "l2", "tf-idf"}, default "auto"
        Attribute rows as they are, of unit length, or of unit length after smooth tf-idf.
        ``"auto"`` takes ``"tf-idf"``, or ``"l2"`` where some attribute is negative; ``"none"`` with
        ``"paper-code"``.
    row_normalise : bool, optional
        Whether the head sees unit rows; by default where ``"auto"`` would take D^-1 (A + I).
    activation, bias, head, view_loss, kl, bce, members, alpha, beta, tau, \
update_every, target_every, pseudo_start
        Readings of what the paper leaves open, see :class:`fastclust.models.ecnmf.ECNMFModel`.
    protocol : {"standard", "paper-code"}, default "standard"
        No code was published for this method; ``"paper-code"`` takes the text at its word where it
        speaks: random head, no row normalisation, D^-1 (A + I), ReLU (the first activation named).
        It does not reach the published numbers.
    optimizer : {"adam", "averaged", "accumulated"}, optional
        Default ``"adam"``.
    train_batch_size : int, optional
        Nodes per step; an epoch is then one step on one batch (``batch_size`` is that of the
        decomposition). None, or N and more, takes all nodes: the exact method. See
        :mod:`fastclust.models.minibatch`.
    batching : {"random", "partition"}, default "random"
        Batches at random, or of parts of the graph; without ReLU rows are exact either way.
    random_state, device, precision, selection, eval_every, n_init, n_neighbors, callbacks, \
checkpoint_dir, checkpoint_every, resume, verbose
        As for :class:`HSAN`; ``n_init`` is for the head's start.

    Attributes
    ----------
    labels_ : ndarray int64 [N]
    embedding_ : ndarray float32 [N, width]
        What the head sees.
    history_, n_iter_, selected_epoch_, n_clusters_, n_clusters_evidence_, parameters_, resolved_
        As for :class:`HSAN`.

    Examples
    --------
    >>> import fastclust as fc
    >>> ds = fc.load_dataset("digits")
    >>> model = fc.ECNMF(n_clusters=10, epochs=2, width=64)
    >>> model.fit(ds.features, adjacency=ds.adjacency).labels_.shape
    (1797,)
    """

    epochs: Count = 1000
    rank: Count | Fraction | Literal["gavish-donoho"] | None = None
    batch_size: Count | None = None
    second_view: Literal["low-rank", "attributes"] = "low-rank"
    recombine: Literal["merge", "block", "per_batch", "literal"] = "merge"
    add_mean: bool = False
    n_layers: Count = 2
    norm: Literal["auto", "rw", "sym", "none"] = "auto"
    activation: Literal["identity", "relu"] | None = None
    bias: bool = True
    weighting: Literal["auto", "none", "l2", "tf-idf"] = "auto"
    row_normalise: bool | None = None
    head: Literal["spectral", "kmeans", "random"] | None = None
    view_loss: Literal["elements", "nodes"] = "elements"
    kl: Literal["batchmean", "sum", "literal"] = "batchmean"
    bce: Literal["one-hot", "positive"] = "one-hot"
    members: Literal["all", "argmax"] = "all"
    alpha: Weight = 1.0
    beta: Weight = 0.1
    tau: Weight = 0.1
    update_every: Count = 10
    target_every: Count = 1
    pseudo_start: Steps = 0
    train_batch_size: Pair | None = None
    batching: Batching = "random"

    _name = "ecnmf"

    def _memory_needed(self, n_nodes: int, n_features: int) -> int:
        parameters = 2 * self.width * (n_features + (self.n_layers - 1) * self.width)
        rows = 2 * n_nodes  # both views of every node
        if self._samples(n_nodes):
            rows = n_nodes + 2 * (self.train_batch_size or 0)
        # value, gradient and two moments of each parameter
        return 4 * (4 * parameters + rows * self.width)

    def _samples(self, n_nodes: int) -> bool:
        return self.train_batch_size is not None and self.train_batch_size < n_nodes

    def _build(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[Trainable, dict[str, torch.Tensor]]:
        literal = self.protocol == "paper-code"
        norm, unit = "rw", not literal
        if not literal and encodes_degree(features, graph):
            norm = choose_propagation(as_tensor(features, device), graph, self.n_clusters_)
            unit = norm == "rw"
        self.resolved_ = {
            "n_clusters": self.n_clusters_,
            "epochs": int(self.epochs),
            "lr": 1e-4 if self.lr is None else float(self.lr),
            "optimizer": self.optimizer or "adam",
            "rank": None if self.second_view == "attributes" else self._rank(*features.shape),
            "activation": self.activation or ("relu" if literal else "identity"),
            "norm": norm if self.norm == "auto" else self.norm,
            "row_normalise": unit if self.row_normalise is None else self.row_normalise,
            "head": self.head or ("random" if literal else "spectral"),
            "weighting": self._weighting(features),
        }
        idf = None
        if self.resolved_["weighting"] == "tf-idf":
            idf = inverse_document_frequency(features)
        if self.resolved_["weighting"] != "none":
            features = weighted_rows(features, idf)
        n, d = features.shape
        sampling: dict[str, Any] = {}
        if self._samples(n):
            sampling = {"batch_size": self.train_batch_size, "batching": self.batching}
            needed = 4 * n * d * (1 + self.n_layers)
            advice = "reduce the features first, or train on all nodes at once"
            require_memory(needed, f"the propagated attributes [{n}, {d}]", advice, device)
            if not isinstance(features, np.ndarray):
                features = features.toarray()
        x = as_tensor(_dense_unless_sparse(features), device)
        x_low_rank, basis = None, {}
        if self.second_view == "low-rank":
            x_low_rank = ops.low_rank(
                x,
                self.resolved_["rank"],
                batch_size=self.batch_size,
                recombine=self.recombine,
                add_mean=self.add_mean,
                seed=self.seed_,
            )
            self.resolved_["rank"] = x_low_rank.rank
            if x_low_rank.mean is not None and x_low_rank.mean.dim() == 1:
                # One projection for all rows: X_r = (X - mean) V^T V, V orthonormal.
                basis = {"components": unit_rows(x_low_rank.right), "mean": x_low_rank.mean}
        if idf is not None:
            basis["idf"] = torch.from_numpy(idf)
        ranks = distributed.current(len(x))
        return self._model(x, x_low_rank, graph, ranks, **sampling), basis

    def _model(
        self,
        x: torch.Tensor,
        x_low_rank: ops.LowRankMatrix | None,
        graph: sp.csr_array,
        ranks: distributed.Ranks = distributed.ONE,
        **sampling: Any,
    ) -> ECNMFModel:
        kind: Any = SampledECNMF if sampling else ECNMFModel
        return kind(
            x,
            x_low_rank,
            Graph(graph, norm=self.resolved_["norm"]).to(x.device),
            n_clusters=self.n_clusters_,
            width=self.width,
            n_layers=self.n_layers,
            activation=self.resolved_["activation"],
            bias=self.bias,
            row_normalise=self.resolved_["row_normalise"],
            head=self.resolved_["head"],
            view_loss=self.view_loss,
            kl=self.kl,
            bce=self.bce,
            members=self.members,
            alpha=self.alpha,
            beta=self.beta,
            tau=self.tau,
            update_every=self.update_every,
            target_every=self.target_every,
            pseudo_start=self.pseudo_start,
            n_init=self.n_init,
            precision=self.precision,
            seed=self.seed_,
            ranks=ranks,
            **sampling,
        )

    def _predict(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.resolved_["weighting"] != "none":
            idf = self.parameters_.get("idf")
            features = weighted_rows(features, None if idf is None else idf.numpy())
        x = as_tensor(_dense_unless_sparse(features), device)
        low_rank = None
        if self.second_view == "low-rank":
            low_rank = self._project(x)
        model = self._model(x, low_rank, graph)
        self._restore(model)
        return model.assign(0)

    def _weighting(self, features: Features) -> str:
        if self.weighting == "tf-idf":
            check_counts(features)
        if self.weighting != "auto":
            return self.weighting
        if self.protocol == "paper-code":
            return "none"
        return "tf-idf" if features.min() >= 0 else "l2"

    def _project(self, x: torch.Tensor) -> ops.LowRankMatrix:
        """X_r of other nodes, by the projection of the training data."""
        if "components" not in self.parameters_:
            raise ValueError(
                f"transform and predict must have one low-rank projection for all nodes; with "
                f"recombine={self.recombine!r} and batch_size={self.batch_size} every batch of the "
                f"training data has its own. Fit with recombine='merge' or batch_size=None"
            )
        basis = {k: self.parameters_[k].to(x.device) for k in AXES}
        return ops.LowRankMatrix(
            project(x, basis)[None],
            basis["components"][None],
            x.shape[0],
            basis["mean"][None],
            add_mean=self.add_mean,
        )

    def _rank(self, n_nodes: int, n_features: int) -> int | float | str:
        rows = n_nodes if self.batch_size is None else min(self.batch_size, n_nodes)
        limit = min(rows, n_features)
        if self.rank is None:
            return min(50, limit)
        if isinstance(self.rank, Integral) and self.rank > limit:
            raise ValueError(
                f"rank must be at most {limit}, the smaller of the rows of a batch ({rows}) and "
                f"the columns of X ({n_features}), got {self.rank}; leave it None to have it chosen"
            )
        return self.rank


@dataclass(eq=False, repr=False, kw_only=True)
class SSGC(_GraphClusterer):
    """Simple spectral graph clustering: smooth the attributes, truncate, k-means. No training.

    The attributes are averaged over the first T powers of the symmetric propagation
    (Zhu and Koniusz, ICLR 2021) and cut to leading singular vectors; unit rows of these are
    clustered. By default several views are joined and T is chosen without labels, see
    :func:`fastclust.models.ssgc.ssgc_embedding`, which ``fit`` calls.

    Parameters
    ----------
    n_clusters : int or "auto", default 8
        K; ``"auto"`` estimates it without labels, see
        :func:`fastclust.models.n_clusters.estimate_n_clusters`.
    recipe : {"multiview", "plain"}, default "multiview"
        Eight views of the attributes joined, or one.
    n_steps : int, optional
        T; by default 8, or fewer where ``"multiview"`` finds that they agree better.
    n_components : int, optional
        Singular vectors kept; default 2 K (``"multiview"``) or 20, or less where the data
        allow less.
    weighting : {"auto", "l2", "tf-idf"}, default "auto"
        How attribute rows are weighted.
    n_init : int, default 100
        k-means starts. Their better half votes, see
        :func:`fastclust.models.ssgc.consensus_kmeans`; with ``consensus=False`` the best is taken.
    consensus : bool, default True
        Whether starts vote, a third of them each on the embeddings with T / 2, T and 2 T steps
        (only T above 16384 nodes): where k-means has several minima of nearly one inertia, the
        best of few starts is chance (cora, amac).
    back_end : {"kmeans", "cut", "auto"}, default "kmeans"
        What clusters the embedding. ``"cut"``: the normalised cut of each node's 15 nearest in the
        embedding plus the edges, see :func:`fastclust.models.back_ends.cut_vectors`; at most 16384
        nodes. ``"auto"``: the cut where clusterings by it of disjoint halves of attributes
        and edges agree clearly better, see
        :func:`fastclust.models.back_ends.compare_back_ends`; it takes three to five
        times as long. k-means all the same of more than 16384 nodes (``"auto"``), and where
        attributes only encode degrees.
    random_state, device, n_neighbors
        As for :class:`HSAN`.

    Attributes
    ----------
    labels_ : ndarray int64 [N]
    embedding_ : ndarray float32 [N, n_components]
        Or [N, 3], ranks of degree, PageRank and eigenvector centrality, where the attributes
        encode nothing but degrees.
    recipe_ : str
        ``"multiview"``, ``"plain"`` or ``"degree"``.
    n_steps_ : int
        The T used.
    n_iter_ : int
        Always 0.
    back_end_evidence_ : dict or None
        What ``back_end="auto"`` judged by; None unless it was asked for. ``resolved_["back_end"]``
        is the one used.
    n_clusters_, n_clusters_evidence_, parameters_, resolved_
        As for :class:`HSAN`.

    Notes
    -----
    ``predict`` takes the nearest mean of the embedding's rows by cluster. A cut need not put
    every node with its nearest mean: after one, ``predict`` of the training nodes may differ from
    ``labels_``.
    """

    recipe: Recipe = "multiview"
    n_steps: Steps | None = None
    n_components: Count | None = None
    weighting: Weighting = "auto"
    n_init: Count = 100
    consensus: bool = True
    back_end: BackEnd = "kmeans"

    _name = "ssgc"

    def _memory_needed(self, n_nodes: int, n_features: int) -> int:
        # the attributes' sketch and its orthonormal basis
        return 2 * 4 * n_nodes * min(LEADING_PAIRS, n_nodes, n_features)

    @trains
    def fit(self, X: Any, y: Any = None, *, adjacency: Any = None) -> SSGC:
        """Cluster the nodes of an attributed graph; arguments as for :meth:`HSAN.fit`."""
        features, graph, device = self._prepare(X, adjacency)
        limit = min(features.shape)
        if self.n_components is not None and self.n_components > limit:
            raise ValueError(
                f"n_components must be at most min(N, D) = {limit}, got {self.n_components}"
            )
        n_nodes = features.shape[0]
        if self.back_end == "cut" and n_nodes > MOST_NODES:
            raise ValueError(
                f"back_end='cut' must be given at most {MOST_NODES} nodes, got {n_nodes}; use "
                f"back_end='kmeans', or take a subgraph"
            )
        z, info = self._embed(features, graph, self.n_steps, device)
        self.recipe_, self.n_steps_ = info["recipe"], info["n_steps"]
        result, back_end = self._result(features, graph, z, info["scales"], device)
        self.labels_ = kmeans_labels(result)
        self.embedding_ = z.cpu().numpy()
        self.resolved_ = {
            "n_clusters": self.n_clusters_,
            "recipe": self.recipe_,
            "n_steps": self.n_steps_,
            "back_end": back_end,
        }
        self.history_, self.n_iter_ = [], 0
        self.parameters_ = {"centers": result.centers.cpu(), **info["projection"]}
        self._tell_of_one_cluster()
        return self

    def _embed(
        self, features: Features, graph: sp.csr_array, n_steps: int | None, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return ssgc_embedding(
            features,
            graph,
            self.n_clusters_,
            recipe=self.recipe,
            n_steps=n_steps,
            n_components=self.n_components,
            weighting=self.weighting,
            seed=self.seed_,
            device=device,
            scales=self.consensus,
        )

    def _result(
        self,
        features: Features,
        graph: sp.csr_array,
        z: torch.Tensor,
        scales: list[torch.Tensor],
        device: torch.device,
    ) -> tuple[ops.KMeansResult, str]:
        """Clusters of the embedding, and the back end that gave them; sets its evidence."""
        self.back_end_evidence_ = None
        back_end: str = self.back_end
        if back_end == "auto" and self.recipe_ != "degree" and len(z) <= MOST_NODES:
            each = self._by_each_back_end(graph, z, scales)

            def cluster(part: Features, half: sp.csr_array) -> dict[str, npt.NDArray[np.int64]]:
                z, info = self._embed(part, half, self.n_steps_, device)
                results = self._by_each_back_end(half, z, info["scales"])
                return {name: kmeans_labels(result) for name, result in results.items()}

            self.back_end_evidence_ = compare_back_ends(
                features,
                graph,
                {name: kmeans_labels(result) for name, result in each.items()},
                cluster,
                seed=self.seed_,
            )
            back_end = self.back_end_evidence_["back_end"]
            return each[back_end], back_end
        if back_end == "auto":
            self.back_end_evidence_ = no_comparison(
                "attributes only encode degrees"
                if self.recipe_ == "degree"
                else f"more than {MOST_NODES} nodes"
            )
        if back_end == "cut" and self.recipe_ != "degree":
            return self._by_cut(graph, z), "cut"
        return self._by_kmeans(z, self.n_init, scales), "kmeans"

    def _by_each_back_end(
        self, graph: sp.csr_array, z: torch.Tensor, scales: list[torch.Tensor]
    ) -> dict[str, ops.KMeansResult]:
        return {"kmeans": self._by_kmeans(z, self.n_init, scales), "cut": self._by_cut(graph, z)}

    def _by_cut(self, graph: sp.csr_array, z: torch.Tensor) -> ops.KMeansResult:
        """Clusters of the cut; centres are the means of the embedding's rows."""
        rows = cut_vectors(z, graph, self.n_clusters_, seed=self.seed_)
        result = self._by_kmeans(rows, min(self.n_init, CUT_STARTS))
        means = cluster_means(z, result.labels, self.n_clusters_)
        means[torch.bincount(result.labels, minlength=len(means)) == 0] = FAR  # of none the nearest
        return replace(result, centers=means)

    def _by_kmeans(
        self, z: torch.Tensor, n_init: int, others: Sequence[torch.Tensor] = ()
    ) -> ops.KMeansResult:
        if self.consensus:
            return consensus_kmeans(
                z, self.n_clusters_, n_init=n_init, seed=self.seed_, others=others
            )
        return sampled_kmeans(z, self.n_clusters_, n_init=n_init, seed=self.seed_)

    def _predict(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.recipe_ == "degree":
            raise ValueError(
                "transform and predict must have attributes to project: those of the training data "
                "only encode degrees, whose ranks do not carry over to other nodes. Fit with "
                "recipe='plain' or a weighting to use the attributes all the same"
            )
        z = ssgc_projection(features, graph, self.parameters_, n_steps=self.n_steps_, device=device)
        return nearest_center(z, self.parameters_["centers"].to(device)), z


def _constraints(hint: Any) -> list[Any]:
    """scikit-learn's constraints for a type hint: any one of them must hold."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return [constraint for part in get_args(hint) for constraint in _constraints(part)]
    if get_origin(hint) is Annotated:
        return list(hint.__metadata__)
    if get_origin(hint) is Literal:
        return [StrOptions(set(get_args(hint)))]
    return [{bool: "boolean", int: Integral, NoneType: None}.get(hint, get_origin(hint) or hint)]


def _seed(random_state: Any) -> int:
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _dense_unless_sparse(features: Features) -> Features:
    """CSR features that are hardly sparse, as a dense array."""
    if isinstance(features, np.ndarray):
        return features
    n, d = features.shape
    return np.asarray(features.toarray()) if features.nnz > DENSE_FROM * n * d else features


def _jsonable_params(estimator: BaseEstimator, seed: int) -> dict[str, Any]:
    """Constructor keywords for a JSON file; a random state becomes the seed that it gave."""
    params: Mapping[str, Any] = estimator.get_params(deep=False)
    out: dict[str, Any] = {}
    for key, value in params.items():
        if key == "callbacks":
            continue
        if key == "random_state":
            out[key] = seed
        elif isinstance(value, (os.PathLike, torch.device)):
            out[key] = str(value)
        else:
            out[key] = value.item() if isinstance(value, np.generic) else value
    return out


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
