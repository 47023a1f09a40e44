"""What is compared: models under their protocols, and variants of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastclust.settings import MODELS
from fastclust.training import SELECTIONS

ORACLE = "oracle"
# Rules that every evaluation of a run has the score of; the silhouette is taken only on demand.
LABEL_FREE = tuple(rule for rule in SELECTIONS if rule not in ("last", "silhouette"))

# What else than the protocols is worth comparing, by model: a name and what it sets.
ABLATIONS: dict[str, dict[str, dict[str, str]]] = {
    "hsan": {
        "hard weights": {"weights": "hard"},
        "stale hard weights": {"weights": "hard", "stale_weights": "true"},
        "no structure": {"structure": "false"},
        "hard weights, no structure": {"weights": "hard", "structure": "false"},
        "plain Adam": {"optimizer": "adam"},
        "plain Adam, hard weights": {"optimizer": "adam", "weights": "hard"},
    },
    "ecnmf": {
        "random head": {"head": "random"},
        "no SVD": {"second_view": "attributes"},
        "pseudo labels once": {"update_every": "1000000"},
        "adaptive rank": {"rank": "gavish-donoho"},
        "block, B 1024": {"recombine": "block", "batch_size": "1024"},
        "literal, B 1024": {"recombine": "literal", "batch_size": "1024"},
        "merge, B 1024": {"recombine": "merge", "batch_size": "1024"},
    },
    "ssgc": {
        "best of ten starts": {"consensus": "false", "n_init": "10"},
        "one view": {"recipe": "plain"},
        "back end by agreement": {"back_end": "auto"},
    },
}


@dataclass(frozen=True)
class Method:
    """One way to cluster that is compared: a model, its protocol and what else is set."""

    model: str
    protocol: str = "standard"
    variant: str = ""
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """As the tables name it."""
        parts = [p for p in (self.variant, self.protocol) if p and p != "standard"]
        return self.model + (f" ({', '.join(parts)})" if parts else "")

    @property
    def folder(self) -> str:
        """As its run directory is called."""
        parts = (self.model, self.protocol, self.variant)
        return "-".join("".join(c if c.isalnum() else "_" for c in p) for p in parts if p)


def methods(
    models: Sequence[str],
    protocols: Sequence[str],
    ablation: bool,
    settings: Mapping[str, str],
    sweeps: Sequence[tuple[str, str]] = (),
) -> list[Method]:
    """What is to be run; SSGC has one protocol only, and variants start from the standard one.

    ``sweeps`` are single settings, each of which makes a variant of every model that has it.
    """
    common = tuple(settings.items())
    found: dict[Method, None] = {}
    for model in models:
        for protocol in protocols if model != "ssgc" else ["standard"]:
            found[Method(model, protocol, settings=_accepted(model, common))] = None
        if ablation:
            for variant, changes in ABLATIONS[model].items():
                merged = _accepted(model, common) + tuple(changes.items())
                found[Method(model, variant=variant, settings=merged)] = None
        for key, value in _accepted(model, sweeps):
            merged = (*_accepted(model, common), (key, value))
            found[Method(model, variant=f"{key} {value}", settings=merged)] = None
    return list(found)


def _accepted(model: str, settings: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The settings that this model has; what no model has is refused by :func:`main`."""
    names = MODELS[model]().get_params()
    return tuple((key, value) for key, value in settings if key in names)


def title_of(model: str, protocol: str, variant: str) -> str:
    return model if protocol == "floor" else Method(model, protocol, variant).title


def with_preset(variant: str) -> bool:
    """Whether nothing but the precision differs from the preset."""
    return re.fullmatch(r"(precision \w+)?", variant) is not None
