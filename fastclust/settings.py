"""The settings of a run: from files, presets and the command line to a :class:`Plan`.

Settings come from, each overriding the one before: the preset of the data set, the TOML file of
``--config``, ``--set KEY=VALUE``, the options with a name of their own.
"""

from __future__ import annotations

import argparse
import inspect
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastclust import cli
from fastclust.cli import UsageError
from fastclust.datasets import Dataset, is_dataset_path, load_dataset
from fastclust.estimators import ECNMF, HSAN, SSGC
from fastclust.rundir import read_toml
from fastclust.tables import load_files
from fastclust.validation import check_device, check_n_clusters

MODELS: dict[str, Any] = {"ecnmf": ECNMF, "hsan": HSAN, "ssgc": SSGC}
# Options that are parameters of the estimators under the same name.
PARAMETER_OPTIONS = ("n_clusters", "device", "precision", "epochs", "selection", "protocol")
# Settings of the run that are no parameters of the estimators.
RUN_SETTINGS = ("dataset", "data_root", "edges", "features", "labels", "ids", "model", "seeds")
# Of these, the files of a graph of one's own, see fastclust.tables.
FILE_SETTINGS = ("edges", "features", "labels", "ids")
# Parameters of the estimators that the run itself fills in.
RUN_OWNED = ("random_state", "callbacks", "checkpoint_dir", "resume", "verbose")


@dataclass(frozen=True)
class Plan:
    """A run with every setting resolved."""

    dataset: str
    files: dict[str, str]  # of one's own, in place of a data set
    data_root: str | None
    model: str
    seeds: list[int]
    parameters: dict[str, Any]

    def config(self) -> dict[str, Any]:
        """What ``config.toml`` holds."""
        data: dict[str, Any] = dict(self.files) or {"dataset": self.dataset}
        run = data | {"model": self.model, "seeds": self.seeds}
        if self.data_root is not None:
            run["data_root"] = self.data_root
        return run | self.parameters


def gather_settings(
    arguments: argparse.Namespace, saved: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Settings of a resumed run, --config, --set and options, the later winning."""
    settings: dict[str, Any] = dict(saved or {})
    if arguments.config is not None:
        for key, value in read_toml(Path(arguments.config)).items():
            if isinstance(value, dict):
                raise UsageError(
                    f"{arguments.config!r} must hold lines KEY = VALUE only, got a table [{key}]"
                )
            settings["seeds" if key == "seed" else key.replace("-", "_")] = value
    for text in arguments.settings:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"--set must be KEY=VALUE, got {text!r}")
        if key in (*RUN_SETTINGS, "seed"):
            raise UsageError(
                f"--set is for hyper-parameters; use --{key.replace('_', '-')} instead"
            )
        settings[key] = value
    for key in (*RUN_SETTINGS, *PARAMETER_OPTIONS):
        value = getattr(arguments, key)
        if value is not None:
            settings[key] = value
    return settings


def resolve(settings: dict[str, Any]) -> tuple[Plan, Dataset]:
    """Check and complete the settings; loads the data, since K may come from its labels."""
    settings = dict(settings)
    files = {
        key: _text(settings.pop(key), key)
        for key in FILE_SETTINGS
        if settings.get(key, "none") != "none"
    }
    if files and "dataset" in settings:
        raise UsageError(
            f"--dataset and --{next(iter(files))} are two sources of data: give one of them"
        )
    dataset_name = _text(settings.pop("dataset", "digits"), "dataset")
    data_root = settings.pop("data_root", None)
    if data_root is not None:
        data_root = os.path.abspath(_text(data_root, "data_root"))
    model = _text(settings.pop("model", "ecnmf"), "model")
    seeds = _seeds(settings.pop("seeds", [0]))
    plan = Plan(dataset_name, files, data_root, model, seeds, _checked(model, settings))
    plan, dataset = _loaded(plan)
    return replace(plan, parameters=_completed(plan, dataset)), dataset


def _checked(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Parameters in their types, before the data are read and anything is printed or moved."""
    if model not in MODELS:
        raise UsageError(
            f"model must be one of {', '.join(MODELS)}, got {model!r}"
            + cli.did_you_mean(model, MODELS)
        )
    hints = parameter_types(MODELS[model])
    for key, value in settings.items():
        if key not in hints:
            raise UsageError(
                f"{model} has no hyper-parameter {key!r}{cli.did_you_mean(key, hints)}; it has "
                f"{', '.join(hints)}"
            )
        settings[key] = cli.convert(key, value, hints[key])
    MODELS[model](**settings)._validate_params()  # fit would refuse them as well
    check_device(settings.get("device", "auto"))
    return settings


def _loaded(plan: Plan) -> tuple[Plan, Dataset]:
    """The data, and the plan with the name or the absolute paths to find them again by."""
    if plan.files:
        files = {key: _absolute(key, value) for key, value in plan.files.items()}
        method = MODELS[plan.model](**plan.parameters)
        read: dict[str, Any] = {**files, "n_neighbors": method.n_neighbors}
        dataset = load_files(**read)
        return replace(plan, files=files, dataset=dataset.name), dataset
    if is_dataset_path(plan.dataset):
        path = os.path.abspath(os.path.expanduser(plan.dataset))
        return replace(plan, dataset=path), load_dataset(Path(path))
    dataset = load_dataset(plan.dataset, root=plan.data_root)
    return replace(plan, dataset=dataset.name), dataset


def _completed(plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """Every parameter: those given, over those of the data set's preset or the defaults."""
    model, given = MODELS[plan.model], plan.parameters
    if plan.files or is_dataset_path(plan.dataset):
        preset = model()
    else:
        # The preset may depend on what is asked for: HSAN's published rates go with its protocol.
        preset = model.for_dataset(plan.dataset, **given)
    hints = parameter_types(model)
    parameters = {key: value for key, value in preset.get_params().items() if key in hints}
    # K is never the default of the class: it is given, or the number of classes.
    parameters |= {"n_clusters": dataset.n_clusters} | given
    if parameters["n_clusters"] is None:
        raise UsageError(
            f"{plan.dataset} has no labels to take the number of clusters from; give "
            f"--n-clusters K, or --n-clusters auto to have it estimated"
        )
    if parameters["n_clusters"] != "auto":
        check_n_clusters(parameters["n_clusters"], dataset.n_nodes, minimum=1)
    model(**parameters).check_shape(dataset.n_nodes, dataset.n_features)
    return parameters


def parameter_types(model: Any) -> dict[str, Any]:
    """The hyper-parameters of an estimator class that a user may set, with their types."""
    hints = typing.get_type_hints(model)
    names = [name for name in inspect.signature(model).parameters if name not in RUN_OWNED]
    return {name: hints[name] for name in names}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name} must be a name or path, got {value!r}")
    return value.strip()


def _absolute(key: str, value: str) -> str:
    """A file's absolute path, so that the run can be repeated from anywhere; columns stay."""
    path = os.path.abspath(os.path.expanduser(value))
    return path if key in ("edges", "features") or os.path.exists(path) else value


def _seeds(value: Any) -> list[int]:
    if isinstance(value, list) and all(isinstance(v, int) for v in value):
        value = ",".join(map(str, value))
    try:
        return cli.parse_seeds(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"seeds {error}") from None


def check_same_run(plan: Plan, saved: Mapping[str, Any], root: Path) -> None:
    """A resumed run must be the one that was begun; only further seeds may be added."""
    config = plan.config()
    for key in sorted(config.keys() | saved.keys()):
        old, new = saved.get(key), config.get(key)
        if key == "data_root":
            continue
        if key == "seeds" and isinstance(old, list) and old[:1] == plan.seeds[:1]:
            continue
        require_same(key, old, new, root)


def require_same(key: str, old: Any, new: Any, root: Path) -> None:
    """Raise ``UsageError`` unless a setting is the one that the run in ``root`` was begun with."""
    if new != (None if old == "none" else old):
        raise UsageError(
            f"--resume must go on with the same settings: {key} was {old!r} in {root}, got "
            f"{new!r}; leave the option out, or begin anew in another directory"
        )


def hyper_parameters(model: str) -> str:
    """What ``--set`` can change, with types and defaults, as lines."""
    hints = parameter_types(MODELS[model])
    defaults = MODELS[model]().get_params()
    lines = [f"hyper-parameters of {model} with their defaults; a data set's preset may differ:"]
    for name, hint in hints.items():
        value = "none" if defaults[name] is None else defaults[name]
        if name == "n_clusters":
            value = "from labels"
        lines.append(f"  {name:<18} {value!s:<12} {cli.type_text(hint)}")
    return "\n".join(lines)
