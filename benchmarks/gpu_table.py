"""Writes the tables of what a GPU measured from the JSON files that ``benchmarks/gpu.sh`` left.

::

    python benchmarks/gpu_table.py OUT ... # takes the files into benchmarks/results/gpu, rewrites
    python benchmarks/gpu_table.py         # rewrites from what is there
    python benchmarks/gpu_table.py --check # exit code 1 if a table is not what the files say

README.md gets the measurements at the sizes that count, benchmarks/results/gpu.md all of them. Of
several folders, the parts that a later one has replace those of an earlier one. Only files of a
real card count: dry runs and runs on the CPU are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
# What README.md shows: the card's own rates, Amazon Computers, the largest sizes, whole trainings.
HEADLINE_CASES = ("copy", "gemm-bf16", "gemm-tf32", "gemm-fp32", "amac", "100k", "100M")
BEGIN, END = "<!-- gpu table: begin -->", "<!-- gpu table: end -->"
NOTHING = (
    "No GPU has been measured yet. `benchmarks/gpu.sh OUT` on a machine with one builds, tests and "
    "measures everything in ten minutes, and `python benchmarks/gpu_table.py OUT` fills this place."
)


def read(*folders: Path) -> dict[str, dict[str, Any]]:
    """Results by subject."""
    found: dict[str, dict[str, Any]] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        content = json.loads(path.read_text())
        if content["tiny"] or content["device"] != "cuda":
            raise SystemExit(f"{path} is no measurement of a GPU (a dry run, or on the CPU)")
        before = found.get(content["subject"])
        if before is not None:
            if before["card"].get("name") != content["card"].get("name"):
                raise SystemExit(f"{path} is of another card than the files before it")
            replaced = {x.get("part") for x in content["rows"] + content["errors"]}
            for kept in ("rows", "errors"):
                older = [x for x in before[kept] if x.get("part") not in replaced]
                content[kept] = older + content[kept]
            content = before | content  # rows of the CPU, too
        found[content["subject"]] = content
    return found


def table(results: dict[str, dict[str, Any]], *, every: bool = False) -> str:
    """Markdown: the card, a line per measurement and its peers, and what failed."""
    if not results:
        return NOTHING
    first = next(iter(results.values()))
    card, versions = first["card"], first["versions"]
    commits = sorted({content["commit"] for content in results.values()})
    lines = [
        f"{card.get('name', 'GPU of unknown name')}, driver {card.get('driver_version', '?')}, "
        f"torch {versions.get('torch', '?')}, CUDA {versions.get('cuda', '?')}, "
        f"commit {', '.join(commits)}. Medians; a share is of the card's own rate, measured in the "
        "same run.",
        "",
        "| what | of | time | share of ceiling | memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for content in results.values():
        for row in content["rows"]:
            line = table_line(content["subject"], row)
            if line and (every or is_headline(row)):
                lines.append(line)
    errors = sum(len(content["errors"]) for content in results.values())
    if errors:
        lines += ["", f"{errors} cases failed: `errors` in `benchmarks/results/gpu/*.json`."]
    if not every:
        lines += [
            "",
            "All sizes, and what the loss takes with weights: [gpu.md](benchmarks/results/gpu.md).",
        ]
    return "\n".join(lines)


def is_headline(row: dict[str, Any]) -> bool:
    """Whether README.md shows a measurement, too."""
    if row.get("what") == "training":
        return True
    narrow = row.get("part") == "propagate" and row.get("d") != 500
    part_of_it = row.get("what") == "forward" or row.get("weights") == "snapshot"
    return row["case"].removesuffix("-like") in HEADLINE_CASES and not (narrow or part_of_it)


def table_line(subject: str, row: dict[str, Any]) -> str | None:
    """One measurement; None for rows that are no timing."""
    if "ms" in row:
        duration = f"{row['ms']:.3g} ms"
        if row.get("host_ms", 0.0) > row["ms"]:  # the host is slower than the kernels
            duration += f" ({row['host_ms']:.3g} ms to launch)"
    elif "seconds" in row:
        duration = f"{row['seconds']:.3g} s"
    else:
        return None
    kind = row.get("model") or subject
    details = [row[key] for key in ("case", "what", "precision") if row.get(key)]
    numbers = ("d", "rank", "batch_size", "epochs", "width")
    details += [f"{key} {row[key]}" for key in numbers if key in row]
    if row.get("weights") == "snapshot":
        details.append("weighted")
    rate = f"{row['rate']:.3g} {row['unit']}" if "rate" in row else ""
    if "share" in row:
        rate += f" = {100 * row['share']:.0f} %"
    if "acc" in row:
        rate = f"ACC {100 * row['acc']:.1f}, NMI {100 * row['nmi']:.1f}"
    memory = f"{row['peak_bytes'] / 2**20:.0f} MiB" if row.get("peak_bytes") else ""
    who = row.get("peer", "fastclust")
    return f"| {kind}: {', '.join(map(str, details))} | {who} | {duration} | {rate} | {memory} |"


def rewritten(text: str, content: str) -> str:
    """README with ``content`` between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md must hold the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(
    argv: list[str] | None = None, results: Path = RESULTS, readme: Path = ROOT / "README.md"
) -> int:
    """Parse the command line and rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", nargs="*", type=Path, help="folders that gpu.sh filled")
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args(argv)
    if arguments.out:
        found = read(*arguments.out)
        if not found:
            raise SystemExit(f"{', '.join(map(str, arguments.out))}: no JSON of gpu.sh")
        results.mkdir(parents=True, exist_ok=True)
        for old in results.glob("*.json"):
            old.unlink()
        for subject, content in found.items():
            (results / f"{subject}.json").write_text(json.dumps(content, indent=1) + "\n")
    found = read(results)
    page = results.with_suffix(".md")
    wanted = {readme: rewritten(readme.read_text(), table(found))}
    if found:
        wanted[page] = f"# Measured on a GPU\n\n{table(found, every=True)}\n"
    if arguments.check:
        right = [path.is_file() and path.read_text() == text for path, text in wanted.items()]
        return 0 if all(right) and page.is_file() == bool(found) else 1
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
