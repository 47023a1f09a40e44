"""What the three estimators share: keywords, input checks, new nodes, presets, files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
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

from fastclust._version import __version__
from fastclust.datasets import nearest_neighbor_graph
from fastclust.files import as_json, file_digest, replacing, write_atomically
from fastclust.interop import without_autocast
from fastclust.memory import require_memory
from fastclust.models.n_clusters import estimate_n_clusters
from fastclust.presets import preset
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

Features: TypeAlias = npt.NDArray[np.float32] | sp.csr_array
Self = TypeVar("Self", bound="GraphClusterer")

# Types of keywords with what scikit-learn checks them by.
Count = Annotated[int, Interval(Integral, 1, None, closed="left")]
Pair = Annotated[int, Interval(Integral, 2, None, closed="left")]
Steps = Annotated[int, Interval(Integral, 0, None, closed="left")]
Weight = Annotated[float, Interval(Real, 0, None, closed="left")]
Rate = Annotated[float, Interval(Real, 0, None, closed="neither")]
Share = Annotated[float, Interval(Real, 0, 1, closed="both")]
Fraction = Annotated[float, Interval(Real, 0, 1, closed="neither")]

# Fitted attributes that go into config.json.
_FITTED = (
    "history_", "n_iter_", "n_features_in_", "seed_", "resolved_", "selected_epoch_",
    "n_clusters_", "n_clusters_evidence_", "recipe_", "n_steps_", "back_end_evidence_",
)  # fmt: skip

# Keywords of a run that is over: another fit would write over its checkpoints.
_OF_ONE_RUN = ("checkpoint_dir", "resume")


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
class GraphClusterer(
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
        self.check_shape(*features.shape)
        if graph is None:
            graph = nearest_neighbor_graph(features, self.n_neighbors)
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

    def check_shape(self, n_nodes: int, n_features: int) -> None:
        """Raise what :meth:`fit` raises for settings that do not go with data of this shape.

        Parameters
        ----------
        n_nodes, n_features : int
            Rows and columns of X.

        Raises
        ------
        ValueError
            Too few nodes, or a setting that is too large for them.
        InsufficientMemoryError
            It cannot fit into memory.
        """
        if n_nodes == 1:
            raise ValueError("X must have at least 2 rows, one per node, got n_samples=1")
        self._check_settings(n_nodes, n_features)
        advice = "reduce the features or take a subgraph"
        width = self.get_params().get("width")
        require_memory(
            self._memory_needed(n_nodes, n_features),
            f"{type(self).__name__} on {n_nodes} nodes with {n_features} features",
            advice if width is None else f"lower width (now {width}), {advice}",
            check_device(self.device),
        )

    def _check_settings(self, n_nodes: int, n_features: int) -> None:
        """Raise for settings of the method that do not go with data of this shape."""
        raise NotImplementedError

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
            "parameters": jsonable_params(self, self.seed_),
            "fitted": as_json(fitted),
            # Tells the tensors of another save, should this one end before this file is written.
            "model": file_digest(folder / "model.safetensors"),
        }
        write_atomically(folder / "config.json", json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls: type[Self], directory: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote, but for ``checkpoint_dir`` and ``resume``.

        Those are of the run that is over; give them anew with ``set_params``.

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
            parameters = config["parameters"]
            for key in _OF_ONE_RUN:
                parameters.pop(key, None)
            estimator = cls(**parameters)
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


def jsonable_params(estimator: BaseEstimator, seed: int) -> dict[str, Any]:
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
