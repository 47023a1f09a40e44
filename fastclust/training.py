"""The training loop, one for all models: steps, evaluation, label-free selection, interruption.

A model brings its loss and its clustering (:class:`Trainable`), :mod:`fastclust.checkpoints` keeps
the :class:`State`; everything else is here. No label enters: evaluations are scored from the
embedding, the clusters and the graph alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from fastclust import metrics
from fastclust.checkpoints import (
    CheckpointError,
    Checkpoints,
    CheckpointWarning,
    require_checkpoint_dir,
)
from fastclust.distributed import ONE, Ranks
from fastclust.interop import without_autocast

__all__ = [
    "SELECTIONS",
    "CheckpointError",
    "CheckpointWarning",
    "Event",
    "Trainable",
    "TrainingDivergedError",
    "TrainingInterrupted",
    "TrainingResult",
    "internal_scores",
    "make_optimizer",
    "train",
]

Optimizer = Literal["adam", "averaged", "accumulated"]

Selection = Literal[
    "last", "inertia", "calinski-harabasz", "silhouette", "davies-bouldin", "modularity", "loss"
]

#: Rules that choose an epoch without labels, and whether more of their score is better.
SELECTIONS: dict[str, bool | None] = {
    "last": None,
    "inertia": False,
    "calinski-harabasz": True,
    "silhouette": True,
    "davies-bouldin": False,
    "modularity": True,
    "loss": False,
}


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came, the epoch was finished and a checkpoint written."""


class TrainingDivergedError(ArithmeticError):
    """The loss, or the embedding, is no longer made of finite numbers."""


class Trainable(Protocol):
    """What the loop needs of a model: a ``torch.nn.Module`` with these methods.

    Epochs count from 0. All methods must be functions of the parameters, ``extra_state`` and the
    epoch alone, so that a resumed run repeats an uninterrupted one.

    A model that several processes share by rows has two attributes more: ``ranks``, see
    :mod:`fastclust.distributed`, and ``by_rows``, the names of its parameters with a row per node.
    Losses, clusters, embeddings and ``extra_state`` are then those of the whole on every rank.
    """

    def begin(self) -> None:
        """Prepare the parameters before the first epoch; not called when resuming."""

    def loss(self) -> Tensor:
        """The loss, a differentiable scalar; the same one again if it is called again."""

    def after_step(self, epoch: int) -> None:
        """Called after the optimizer's step of every epoch."""

    def assign(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Clusters int64 [N] and embedding [N, d]; outside autograd."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers for the history."""

    def extra_state(self) -> dict[str, Tensor]:
        """State beside the parameters."""

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``extra_state``."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """As of ``torch.nn.Module``."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As of ``torch.nn.Module``."""

    def state_dict(self) -> dict[str, Tensor]:
        """As of ``torch.nn.Module``."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """As of ``torch.nn.Module``."""


@dataclass(frozen=True)
class Event:
    """What callbacks are told after every epoch.

    Attributes
    ----------
    epoch : int
        Epochs done, from 1.
    n_epochs : int
        Epochs asked for.
    loss : float
        Loss at the start of this epoch's step.
    seconds : float
        Wall time of this epoch, evaluation included.
    evaluation : dict or None
        In evaluated epochs: label-free scores (see :func:`internal_scores`), the model's
        diagnostics, and ``labels``, int64 [N].
    """

    epoch: int
    n_epochs: int
    loss: float
    seconds: float
    evaluation: dict[str, Any] | None


Callback = Callable[[Event], None]


@dataclass
class TrainingResult:
    """What a run leaves: clusters, embedding and parameters of the selected epoch.

    Attributes
    ----------
    labels : ndarray int64 [N]
    embedding : ndarray float32 [N, d]
    parameters : dict of CPU tensors
    epoch : int
        The selected epoch, from 1.
    history : list of dict
        One per epoch: ``epoch``, ``loss``, ``seconds``; in evaluated epochs also the scores.
    """

    labels: npt.NDArray[np.int64]
    embedding: npt.NDArray[np.float32]
    parameters: dict[str, Tensor]
    epoch: int
    history: list[dict[str, Any]]


@dataclass
class _Best:
    """The evaluation that the selection rule prefers so far."""

    epoch: int = 0
    score: float = float("nan")
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    embedding: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    parameters: dict[str, Tensor] = field(default_factory=dict)


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], optimizer: Optimizer, lr: float
) -> torch.optim.Adam:
    """The optimizer of a training rule.

    ``"adam"`` is plain Adam. ``"accumulated"`` is Adam fed with the running sum of all gradients,
    as the released HSAN code trains (the loop then never clears them). ``"averaged"`` divides the
    mean of all gradients so far by the root of the mean of their squares: Adam whose two averages
    forget nothing over any length of training in use (betas 0.99999).
    """
    betas = (0.99999, 0.99999) if optimizer == "averaged" else (0.9, 0.999)
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)


def internal_scores(
    embedding: Tensor, labels: npt.NDArray[np.int64], adjacency: sp.csr_array, selection: str
) -> dict[str, float]:
    """Scores of a clustering that need no label.

    ``inertia`` (as a share of the total variance, so that epochs compare), ``calinski-harabasz``,
    ``davies-bouldin`` and ``modularity``; ``silhouette`` costs far more and is taken only when it
    selects.
    """
    z = np.asarray(embedding.detach().float().cpu())
    scores = {
        "inertia": metrics.inertia(z, labels, relative=True),
        "calinski-harabasz": metrics.calinski_harabasz(z, labels),
        "davies-bouldin": metrics.davies_bouldin(z, labels),
        "modularity": metrics.modularity(adjacency, labels),
    }
    if selection == "silhouette":
        scores["silhouette"] = metrics.silhouette(z, labels)
    return scores


@without_autocast
def train(
    model: Trainable,
    *,
    epochs: int,
    lr: float,
    adjacency: sp.csr_array,
    optimizer: Optimizer = "adam",
    selection: str = "last",
    eval_every: int = 10,
    callbacks: Sequence[Callback] = (),
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | str = "60s",
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a model and return the clustering that the selection rule prefers.

    Parameters
    ----------
    model : Trainable
        The model, with freshly initialised parameters.
    epochs : int
        Full-batch steps.
    lr : float
        Learning rate.
    adjacency : CSR matrix [N, N]
        For modularity.
    optimizer : {"adam", "averaged", "accumulated"}
        See :func:`make_optimizer`.
    selection : str
        A key of :data:`SELECTIONS`: the last epoch, or the evaluated epoch with the best score.
    eval_every : int
        Epochs between evaluations. Evaluated are epochs 1, 1 + eval_every, ... and the last.
    callbacks : sequence of callable
        Each is given an :class:`Event` after every epoch.
    checkpoint_dir : path, optional
        Where ``checkpoint.safetensors`` and the one before it, ``previous.safetensors``, are kept;
        without it there are no checkpoints, and SIGINT acts as usual. An exception, too, leaves a
        checkpoint of the last finished step, unless it came while the parameters were changed (of
        several ranks, unless it came anywhere but in a callback or the scores).
    checkpoint_every : int or str
        Epochs (``25``) or seconds (``"60s"``) between checkpoints. One more is written at the end.
    resume : bool
        Go on from the checkpoint if there is one, from the one before where the newest is damaged.
        On the CPU the outcome is the same to the bit as that of an uninterrupted run.
    identity : mapping, optional
        Configuration and digest of the data, JSON-able. A checkpoint of another one is refused.

    Raises
    ------
    TrainingInterrupted
        After SIGINT or SIGTERM, once the epoch is done and the checkpoint is on disk.
    TrainingDivergedError
        The loss became NaN or infinite.
    CheckpointError
        Resuming where every checkpoint is damaged, or from one of another run.
    ValueError
        ``checkpoint_dir`` cannot be created, or is None where ``resume`` is asked for.
    """
    require_checkpoint_dir(resume, checkpoint_dir)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = make_optimizer(parameters, optimizer, lr)
    state = State(model, adam, parameters, optimizer == "accumulated", dict(identity or {}))
    checkpoints = None
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(checkpoint_dir, checkpoint_every, state.ranks)

    if not (resume and checkpoints and checkpoints.load(state)):
        model.begin()

    with (
        _deferred_signals(checkpoints is not None, once=state.ranks.size == 1) as caught,
        _kept_at_error(checkpoints, state, caught),
    ):
        for epoch in range(state.epochs_done, epochs):
            started = time.perf_counter()
            if state.stepped is None:  # else a run that failed in the scores goes on with them
                state.stepped, state.whole = _step(state, epoch), True
            loss, last = state.stepped, epoch == epochs - 1
            entry: dict[str, Any] = {"epoch": epoch + 1, "loss": loss}
            evaluation = None
            if epoch % eval_every == 0 or last:
                evaluation = _evaluate(state, epoch, loss, adjacency, selection, last)
                entry |= {key: score for key, score in evaluation.items() if key != "labels"}
            entry["seconds"] = time.perf_counter() - started
            state.history.append(entry)
            state.epochs_done, state.stepped = epoch + 1, None
            event = Event(epoch + 1, epochs, loss, entry["seconds"], evaluation)
            with state.ranks.together():
                for callback in callbacks:
                    callback(event)
            if checkpoints is not None:
                _keep(checkpoints, state, caught, last)

    best = state.best
    return TrainingResult(
        labels=np.asarray(best.labels.cpu(), dtype=np.int64),
        embedding=np.asarray(best.embedding.float().cpu(), dtype=np.float32),
        parameters=state.cpu_parameters() if selection == "last" else best.parameters,
        epoch=best.epoch,
        history=state.history,
    )


def _step(state: State, epoch: int) -> float:
    """One step of the optimizer; returns the loss that it started from."""
    if not state.accumulate:
        state.optimizer.zero_grad(set_to_none=True)
    loss = state.model.loss()
    state.whole = not state.accumulate  # where gradients are a part of it, backward changes it
    loss.backward()
    state.whole = False
    state.optimizer.step()
    state.model.after_step(epoch)
    value = float(loss.detach())
    if not np.isfinite(value):
        lr = state.optimizer.param_groups[0]["lr"]
        raise TrainingDivergedError(
            f"the loss became {value} in epoch {epoch + 1}; lower lr (now {lr:g})"
        )
    return value


def _evaluate(
    state: State, epoch: int, loss: float, adjacency: sp.csr_array, selection: str, final: bool
) -> dict[str, Any]:
    """Cluster, score, and keep the clustering if the selection rule prefers it."""
    with torch.no_grad():
        labels, embedding = state.model.assign(epoch)
    # The loss was that before the last step; the scores square what it left.
    largest = float(embedding.abs().max())
    if not largest**2 * embedding.shape[1] <= torch.finfo(torch.float32).max:
        state.whole = False  # nothing to go on from
        raise TrainingDivergedError(
            f"the embedding or its squares are not finite after epoch {epoch + 1}; lower lr"
        )
    host_labels = np.asarray(labels.cpu(), dtype=np.int64)
    scores = state.ranks.from_first(
        lambda: internal_scores(embedding, host_labels, adjacency, selection)
    )
    more_is_better = SELECTIONS[selection]
    best = state.best
    if more_is_better is None:
        score, preferred = float("nan"), final
    else:
        score = loss if selection == "loss" else scores[selection]
        ahead = score > best.score if more_is_better else score < best.score
        preferred = best.epoch == 0 or ahead or (np.isnan(best.score) and not np.isnan(score))
    if preferred:
        kept = {} if more_is_better is None else state.cpu_parameters()
        state.best = _Best(epoch + 1, score, labels.cpu(), embedding.cpu(), kept)
    return {**scores, **state.model.diagnostics(), "labels": host_labels}


def _keep(checkpoints: Checkpoints, state: State, caught: list[int], last: bool) -> None:
    """Write a checkpoint where one is due, and leave if a signal came to any rank."""
    epoch = state.epochs_done
    number, due = state.ranks.most(caught[0] if caught else 0, checkpoints.due(epoch))
    if number or due or last:
        written = checkpoints.save(state)
    if number:
        where = checkpoints.path if written else "nowhere: it could not be written"
        name = signal.Signals(number).name
        raise TrainingInterrupted(f"{name} after epoch {epoch}; checkpoint {where}")


@contextlib.contextmanager
def _kept_at_error(
    checkpoints: Checkpoints | None, state: State, caught: list[int]
) -> Iterator[None]:
    """Write a checkpoint of the last finished step before an exception goes on, if that is whole.

    It is at any moment but while a step changes it: in a callback, in the scores, out of memory for
    a loss. Several ranks write together, so all must have failed. A second signal wants no delay.
    """
    try:
        yield
    except BaseException as error:
        at_once = bool(caught) and isinstance(error, KeyboardInterrupt)
        whole = state.whole and state.ranks.all_raised(error) and not at_once
        if whole and checkpoints is not None and state.steps_done > checkpoints.tried:
            with contextlib.suppress(BaseException):  # the first one is the one to be told
                checkpoints.save(state)
        raise


# --- interruption --------------------------------------------------------------------------------


@contextlib.contextmanager
def _deferred_signals(enabled: bool, once: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of acting on them; with ``once`` a second acts at once.

    A launcher of several processes answers the user's SIGINT, which all of them get, with a SIGTERM
    to each: there a second signal is no second wish.

    Python allows handlers in the main thread only; elsewhere nothing is installed.
    """
    caught: list[int] = []
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if caught and once:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


# --- the state of a run --------------------------------------------------------------------------


@dataclass
class State:
    """All that a run consists of between two epochs, or between a step and its evaluation.

    There is no stream of random numbers to keep: draws are keyed by seed and epoch.
    """

    model: Trainable
    optimizer: torch.optim.Adam
    parameters: list[torch.nn.Parameter]
    accumulate: bool
    identity: dict[str, Any]
    epochs_done: int = 0
    best: _Best = field(default_factory=_Best)
    history: list[dict[str, Any]] = field(default_factory=list)
    stepped: float | None = None  # the loss of a step whose epoch is not done yet
    whole: bool = True  # not while a step changes it

    def __post_init__(self) -> None:
        self.ranks: Ranks = getattr(self.model, "ranks", ONE)
        self._by_rows: frozenset[str] = getattr(self.model, "by_rows", frozenset())
        named = self.model.named_parameters()
        by_rows = {id(parameter) for name, parameter in named if name in self._by_rows}
        self._parameter_by_rows = [id(parameter) in by_rows for parameter in self.parameters]

    @property
    def steps_done(self) -> int:
        """Steps of the optimizer."""
        return self.epochs_done + (self.stepped is not None)

    def whole_model(self) -> dict[str, Tensor]:
        """The model's state with all rows."""
        return {
            name: self.ranks.gather(value) if name in self._by_rows else value
            for name, value in self.model.state_dict().items()
        }

    def cpu_parameters(self) -> dict[str, Tensor]:
        """A copy of :meth:`whole_model`."""
        return {name: value.detach().cpu().clone() for name, value in self.whole_model().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run under a flat name, whole: any number of ranks can go on."""
        out = {f"model/{name}": value for name, value in self.whole_model().items()}
        out |= {f"extra/{name}": value for name, value in self.model.extra_state().items()}
        for i, parameter in enumerate(self.parameters):
            parts = {f"adam/{i}/{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
            if self.accumulate and parameter.grad is not None:
                parts[f"grad/{i}"] = parameter.grad
            for name, value in parts.items():
                of_rows = self._parameter_by_rows[i] and value.dim() > 0
                out[name] = self.ranks.gather(value) if of_rows else value
        if self.best.epoch:
            out["best/labels"], out["best/embedding"] = self.best.labels, self.best.embedding
            out |= {f"best/model/{name}": value for name, value in self.best.parameters.items()}
        return {name: value.detach().contiguous() for name, value in out.items()}

    def record(self) -> dict[str, Any]:
        """What else is to be kept, JSON-able."""
        return {
            "epochs_done": self.epochs_done,
            "stepped": self.stepped,
            "history": self.history,
            "best_epoch": self.best.epoch,
            "best_score": self.best.score,
        }

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Take the run from :meth:`tensors` and :meth:`record`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        def own(i: int, value: Tensor) -> Tensor:
            of_rows = self._parameter_by_rows[i] and value.dim() > 0
            return (self.ranks.rows(value) if of_rows else value).to(device)

        self.model.load_state_dict(
            {
                name: self.ranks.rows(value) if name in self._by_rows else value
                for name, value in part("model/").items()
            }
        )
        device = self.parameters[0].device
        self.model.load_extra_state({k: v.to(device) for k, v in part("extra/").items()})
        for name, value in part("grad/").items():
            self.parameters[int(name)].grad = own(int(name), value)
        for name, value in part("adam/").items():
            i, key = name.split("/")
            self.optimizer.state[self.parameters[int(i)]][key] = own(int(i), value)
        self.epochs_done, self.history = record["epochs_done"], record["history"]
        self.stepped = record.get("stepped")
        if record["best_epoch"]:
            self.best = _Best(
                record["best_epoch"],
                record["best_score"],
                tensors["best/labels"],
                tensors["best/embedding"],
                part("best/model/"),
            )
