"""python -m fastclust.compare: what is run, which epoch each rule takes, tables, resuming."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastclust import cli, compare
from fastclust.compare.figures import plot_sweep, swept
from fastclust.compare.floors import FLOORS, floor_rows
from fastclust.compare.methods import LABEL_FREE, Method, methods
from fastclust.compare.results import select
from fastclust.compare.tables import overview
from fastclust.datasets import load_dataset
from fastclust.training import SELECTIONS

SMALL = ("--datasets", "digits", "--seeds", "0,3", "--epochs", "3", "--set", "width=8",
         "--set", "n_init=2", "--set", "eval_every=1")  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.guarded(lambda: compare.main(arguments))
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    return code, *capsys.readouterr()


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# --- rules ---------------------------------------------------------------------------------------


def test_rules_prefer_the_best_epoch_and_the_first_of_equals() -> None:
    history = [
        {"epoch": 1, "acc": 0.5, "loss": 3.0, "inertia": 0.7, "modularity": 0.1},
        {"epoch": 11, "acc": 0.9, "loss": 2.0, "inertia": 0.4, "modularity": 0.3},
        {"epoch": 21, "acc": 0.9, "loss": 1.0, "inertia": None, "modularity": 0.3},
    ]
    assert select(history, "oracle")["epoch"] == 11
    assert select(history, "loss")["epoch"] == 21
    assert select(history, "inertia")["epoch"] == 11, "an epoch without the score is passed over"
    assert select(history, "modularity")["epoch"] == 11
    assert select(history, "davies-bouldin") is None
    assert select([], "oracle") is None


def test_no_rule_but_the_oracle_reads_a_label() -> None:
    """The scores against the labels are replaced: every other rule takes the same epoch."""
    rng = np.random.default_rng(0)
    history = [
        {"epoch": e, "acc": rng.random(), **{r: rng.random() for r in LABEL_FREE}}
        for e in range(30)
    ]
    swapped = [entry | {"acc": 1 - entry["acc"]} for entry in history]
    for rule in LABEL_FREE:
        assert select(history, rule)["epoch"] == select(swapped, rule)["epoch"]
    assert select(history, "oracle")["epoch"] != select(swapped, "oracle")["epoch"]
    assert set(LABEL_FREE) < set(SELECTIONS), "the oracle is no selection of the estimators"


def test_methods_are_each_run_once() -> None:
    found = methods(["hsan", "ssgc"], ["standard", "paper-code"], False, {"width": "8"})
    assert [m.title for m in found] == ["hsan", "hsan (paper-code)", "ssgc"]
    assert found[0].settings == (("width", "8"),) and found[2].settings == ()
    found = methods(["hsan"], ["standard"], True, {})
    assert Method("hsan", variant="plain Adam", settings=(("optimizer", "adam"),)) in found
    assert len({m.folder for m in found}) == len(found)


def test_degree_bins_are_equal_and_ordered() -> None:
    digits = load_dataset("digits")
    bins = FLOORS["nodes ranked by degree, K equal bins"](digits, 0)
    sizes = np.bincount(bins)
    assert sizes.size == 10 and sizes.max() - sizes.min() <= 1
    degree = np.asarray(digits.adjacency.sum(axis=1)).reshape(-1)
    for lower, upper in zip(range(9), range(1, 10), strict=True):
        assert degree[bins == lower].max() <= degree[bins == upper].min()


def test_floors_of_other_data_under_the_same_name_are_forgotten(tmp_path: Path) -> None:
    digits = load_dataset("digits")
    path = tmp_path / "floors" / "digits.json"
    rows = floor_rows(digits, path, [0])
    written = path.stat().st_mtime_ns, path.read_bytes()
    assert floor_rows(digits, path, [0]) == rows, "the seconds would differ"
    assert floor_rows(digits, path, None) == rows
    kept = json.loads(written[1])
    path.write_text(json.dumps(kept["rows"]))  # as it was before the data were noted down
    assert floor_rows(digits, path, [0]) == rows

    assert digits.labels is not None
    other = replace(digits, labels=np.roll(digits.labels, 7))
    assert floor_rows(other, path, None) == []
    again = floor_rows(other, path, [0])
    assert all(a["acc"] != b["acc"] for a, b in zip(rows, again, strict=True))
    for damaged in (b"\xff", b"{}", b"null"):
        path.write_bytes(damaged)
        assert floor_rows(digits, path, None) == []


def test_published_numbers_are_marked() -> None:
    text = overview([], ["cora", "amac"], "inertia", "acc")
    assert (
        "| *published:* HSAN (AAAI 2023) | best epoch by the labels, ten runs | 77.07 |  |" in text
    )
    assert "| *published:* ECN-MF (CMC 2024) | last epoch, ten runs | 71.57 | 54.12 |" in text


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare")
    arguments = (*SMALL, "--models", "hsan,ssgc", "--out", str(out), "--quiet")
    assert cli.guarded(lambda: compare.main(arguments)) == 0
    return out


def test_one_row_per_run_and_selection(comparison: Path) -> None:
    rows = read(comparison / "results.csv")
    assert list(rows[0])[:11] == [
        "dataset", "model", "protocol", "selection", "seed", "acc", "nmi", "ari", "f1", "epochs",
        "seconds",
    ]  # fmt: skip
    hsan = [row for row in rows if row["model"] == "hsan"]
    assert {(row["selection"], row["seed"]) for row in hsan} == {
        (rule, seed) for rule in ("last", "oracle", *LABEL_FREE) for seed in ("0", "3")
    }
    ssgc = [row for row in rows if row["model"] == "ssgc"]
    assert [(row["selection"], row["seed"]) for row in ssgc] == [("last", "0"), ("last", "3")]
    assert {row["model"] for row in rows} == {"hsan", "ssgc", *FLOORS}
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("acc", "nmi", "f1"))
    for seed in ("0", "3"):
        by_rule = {row["selection"]: float(row["acc"]) for row in hsan if row["seed"] == seed}
        assert by_rule["oracle"] == max(by_rule.values())


def test_rows_are_what_the_run_directories_hold(comparison: Path) -> None:
    result = json.loads(
        (comparison / "runs" / "digits" / "hsan-standard" / "result.json").read_text()
    )
    rows = read(comparison / "results.csv")
    for run in result["runs"]:
        (row,) = (
            r for r in rows
            if (r["model"], r["selection"], r["seed"]) == ("hsan", "last", str(run["seed"]))
        )  # fmt: skip
        assert float(row["acc"]) == run["metrics"]["acc"]
        assert int(row["peak_memory_bytes"]) == run["peak_memory_bytes"] > 0
        assert row["epochs"] == row["selected_epoch"] == "3"


def test_the_page_says_what_everything_is(comparison: Path) -> None:
    text = (comparison / "results.md").read_text()
    assert "python -m fastclust.compare --datasets digits" in text and "torch 2" in text
    assert "**oracle**" in text and "true labels" in text and "no training" in text
    assert "±" in text and "## digits" in text
    pytest.importorskip("matplotlib")
    assert (comparison / "curves-digits.svg").stat().st_size > 1000
    assert "![curves-digits](curves-digits.svg)" in text
    assert (comparison / "t-sne-digits.png").stat().st_size > 1000


def test_a_finished_comparison_is_not_run_again(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = comparison / "runs" / "digits" / "hsan-standard"
    before = (folder / "history.jsonl").stat().st_mtime_ns
    rows = read(comparison / "results.csv")
    code, out, err = call(capsys, *SMALL, "--models", "hsan,ssgc", "--out", str(comparison))
    assert code == 0 and "| hsan | last |" in out, err
    assert "no user can choose it" in err
    assert (folder / "history.jsonl").stat().st_mtime_ns == before
    assert read(comparison / "results.csv") == rows


def test_collecting_runs_nothing_and_names_what_differs_from_the_preset(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    digits = ("--datasets", "digits")
    given = (
        *digits,
        "--collect",
        str(comparison),
        "--out",
        str(tmp_path / "made"),
        "--page",
        str(page),
    )
    code, out, err = call(capsys, *given)
    assert code == 0, err
    assert not (tmp_path / "made" / "runs").exists()
    changed = "epochs 3, eval_every 1, n_init 2, width 8"
    assert f"| hsan ({changed}) | last |" in out and "| ssgc (n_init 2) | last |" in out
    text = page.read_text()
    made = (comparison / "commands.txt").read_text()
    assert "fastclust.compare --datasets digits --seeds 0,3" in made and "  # " in made
    assert made.strip() in text
    assert "| hsan |  |" in text, "no seed with the preset is finished"

    def scores(path: Path) -> list[tuple[str, ...]]:
        return sorted(
            (r["model"], r["selection"], r["seed"], r["acc"], r["selected_epoch"])
            for r in read(path / "results.csv")
        )

    assert scores(tmp_path / "made") == scores(comparison)
    pytest.importorskip("matplotlib")
    assert "](../made/curves-digits.svg)" in text
    code, _, err = call(capsys, *digits, "--collect", str(tmp_path), "--out", str(tmp_path))
    assert code == 2 and "--collect must be directories with runs" in err

    # What was collected can be collected again when its runs are gone.
    again = ("--collect", str(tmp_path / "made"), "--out", str(tmp_path / "again"))
    code, _, err = call(capsys, *digits, *again)
    assert code == 0, err
    text = (tmp_path / "again" / "results.csv").read_text()
    assert text == (tmp_path / "made" / "results.csv").read_text()
    figures = (tmp_path / folder / "methods-digits.svg" for folder in ("made", "again"))
    assert len({figure.read_bytes() for figure in figures}) == 1, "equal results, another figure"
    assert made.strip() in (tmp_path / "again" / "results.md").read_text()


def test_a_seed_that_was_killed_while_it_wrote_its_history_can_be_collected(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(comparison, tmp_path / "made")
    folder = tmp_path / "made" / "runs" / "digits" / "hsan-standard"
    (folder / "seed-7").mkdir()
    whole = (folder / "history.jsonl").read_text()
    (folder / "seed-7" / "history.jsonl").write_text(whole[: len(whole) // 2])
    given = ("--datasets", "digits", "--collect", str(tmp_path / "made"))
    code, _, err = call(capsys, *given, "--out", str(tmp_path / "again"))
    assert code == 0, err
    rows = read(tmp_path / "again" / "results.csv")
    assert {row["seed"] for row in rows if row["model"] == "hsan"} == {"0", "3"}


def test_another_number_of_clusters_differs_from_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--datasets", "digits", "--seeds", "0", "--models", "ssgc", "--out", str(tmp_path))
    code, _, err = call(capsys, *given, "--set", "n_clusters=4", "--set", "n_init=2", "--quiet")
    assert code == 0, err
    assert "those that the command above gives to all" in (tmp_path / "results.md").read_text()
    collect = ("--datasets", "digits", "--collect", str(tmp_path), "--out", str(tmp_path / "made"))
    code, printed, err = call(capsys, *collect)
    assert code == 0 and "| ssgc (n_clusters 4, n_init 2) | last |" in printed, err


def test_a_sweep_makes_a_variant_and_a_point_of_each_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--datasets", "digits", "--seeds", "0", "--epochs", "2", "--models", "ecnmf,ssgc")
    out = tmp_path / "sweep"
    given = (*small, "--sweep", "rank=3,12", "--sweep", "beta=0.5", "--set", "width=8")
    code, printed, err = call(capsys, *given, "--out", str(out))
    assert code == 0, err
    rows = [row for row in read(out / "results.csv") if row["selection"] == "last"]
    found = {row["variant"] for row in rows if row["model"] == "ecnmf"}
    assert found == {"", "rank 3", "rank 12", "beta 0.5"}
    assert {row["variant"] for row in rows if row["model"] == "ssgc"} == {""}
    assert "| ecnmf (rank 12) | last |" in printed
    collect = ("--datasets", "digits", "--collect", str(out), "--out", str(tmp_path / "made"))
    code, printed, err = call(capsys, *collect)
    assert code == 0 and "| ecnmf (epochs 2, rank 12, width 8) | last |" in printed, err
    pytest.importorskip("matplotlib")
    assert (out / "sweep-digits-ecnmf-rank.svg").stat().st_size > 1000
    points = {row["variant"] for row in swept(read(out / "results.csv"))["digits", "ecnmf", "beta"]}
    assert points == {"beta 0.5", "beta 0.1"}, "the preset's value is a point too"


def test_a_sweep_over_the_preset_s_value_has_it_once(tmp_path: Path) -> None:
    """1 as it was typed and 1.0 of the preset are one number."""
    common = {"dataset": "digits", "model": "ecnmf", "protocol": "standard", "selection": "last"}
    rows = [
        {**common, "variant": variant, "acc": 0.5, "nmi": 0.4}
        for variant in ("", "alpha 1", "alpha 0.3")
    ]
    ((_, _, key), members) = swept(rows).popitem()
    assert [row["variant"] for row in members] == ["alpha 1", "alpha 0.3"]
    pytest.importorskip("matplotlib")
    plot_sweep(members, "digits", key, tmp_path / "alpha.svg")
    assert (tmp_path / "alpha.svg").stat().st_size > 1000


def test_a_method_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--datasets", "digits", "--seeds", "0", "--epochs", "1", "--models", "ecnmf,ssgc")
    code, _, err = call(capsys, *arguments, "--set", "rank=5000", "--out", str(tmp_path))
    assert code == 2
    assert "ecnmf on digits failed" in err and "rank must be at most" in err
    assert "ecnmf on digits: error: rank" in (tmp_path / "results.md").read_text()
    assert {row["model"] for row in read(tmp_path / "results.csv")} == {"ssgc", *FLOORS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--datasets", "corra"), "did you mean cora?"),
        (("--models", "hsam"), "did you mean hsan?"),
        (("--set", "widht=3"), "--set must be KEY=VALUE with a hyper-parameter, got 'widht=3'"),
        (("--set", "selection=inertia"), "--set selection is not for comparisons"),
        (("--sweep", "protocol=paper-code"), "use --protocol instead of --sweep protocol"),
        (("--set", "precision=bf16"), "use --precision instead of --set precision"),
        (("--sweep", "rank"), "--sweep must be KEY=VALUE with a hyper-parameter, got 'rank'"),
        (("--out", "/dev/null/x"), "--out must be a directory"),
        (("--out", ""), "--out: must be a path, got ''"),
        (("--page", " "), "--page: must be a path, got ' '"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = ["--datasets", "digits", "--out", str(tmp_path), *arguments]
    code, _, err = call(capsys, *given)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
