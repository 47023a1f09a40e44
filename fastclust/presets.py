"""Hyper-parameters per data set, in one table.

HSAN: the settings published with the method; those for ``amac`` are ours (the method was never
reported there), and so is ``lr`` for it. ECN-MF: rank, width and lr as published (for ``bat``,
which the paper lacks, those of ``eat``); what it leaves open is settled by the constructor's
defaults, one rule for every graph. A data set without an entry gets the constructor's defaults.

``lr`` is the published learning rate. HSAN's default rule (averaged gradients) does not use it: its
rate follows from the number of epochs, see :class:`fastclust.HSAN`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS", "preset"]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "hsan": {
        "cora": {"n_clusters": 7, "lr": 1e-3, "filter_steps": 2, "n_input": 500, "width": 1500,
                 "activation": "identity", "tau": 0.9, "beta": 1.0},
        "citeseer": {"n_clusters": 6, "lr": 1e-3, "filter_steps": 2, "n_input": 500, "width": 1500,
                     "activation": "sigmoid", "tau": 0.3, "beta": 2.0},
        "amap": {"n_clusters": 8, "lr": 1e-5, "filter_steps": 3, "n_input": None, "width": 500,
                 "activation": "identity", "tau": 0.9, "beta": 3.0},
        "bat": {"n_clusters": 4, "lr": 1e-3, "filter_steps": 6, "n_input": None, "width": 1500,
                "activation": "identity", "tau": 0.3, "beta": 5.0},
        "eat": {"n_clusters": 4, "lr": 1e-4, "filter_steps": 6, "n_input": None, "width": 1500,
                "activation": "identity", "tau": 0.7, "beta": 5.0},
        "uat": {"n_clusters": 4, "lr": 1e-4, "filter_steps": 6, "n_input": None, "width": 500,
                "activation": "sigmoid", "tau": 0.7, "beta": 5.0},
        "amac": {"n_clusters": 10, "lr": 1e-3, "filter_steps": 3, "n_input": None, "width": 500,
                 "activation": "identity", "tau": 0.9, "beta": 3.0},
        "digits": {"n_clusters": 10},
    },
    "ecnmf": {
        "cora": {"n_clusters": 7, "lr": 1e-4, "rank": 40, "width": 600},
        "citeseer": {"n_clusters": 6, "lr": 1e-4, "rank": 50, "width": 900},
        "eat": {"n_clusters": 4, "lr": 1e-4, "rank": 50, "width": 600},
        "uat": {"n_clusters": 4, "lr": 1e-3, "rank": 95, "width": 600},
        "bat": {"n_clusters": 4, "lr": 1e-4, "rank": 50, "width": 600},
        "amap": {"n_clusters": 8, "lr": 1e-4, "rank": 20, "width": 800},
        "amac": {"n_clusters": 10, "lr": 1e-4, "rank": 70, "width": 600},
        "digits": {"n_clusters": 10},
    },
    "ssgc": {
        "cora": {"n_clusters": 7},
        "citeseer": {"n_clusters": 6},
        "amap": {"n_clusters": 8},
        "amac": {"n_clusters": 10},
        "bat": {"n_clusters": 4},
        "eat": {"n_clusters": 4},
        "uat": {"n_clusters": 4},
        "digits": {"n_clusters": 10},
    },
}  # fmt: skip


def preset(model: str, dataset: str) -> dict[str, Any]:
    """The keywords that ``model`` takes for ``dataset``; raises ValueError for an unknown name.

    Names are read as by :func:`fastclust.load_dataset`, whatever their case.
    """
    table = PRESETS[model]
    key = dataset.strip().lower() if isinstance(dataset, str) else dataset
    if key not in table:
        raise ValueError(f"dataset must be one of {', '.join(sorted(table))}, got {dataset!r}")
    return dict(table[key])
