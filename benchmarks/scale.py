"""Cost and quality by the size of the graph: SSGC, ECN-MF and HSAN beside Louvain, Leiden, k-means.

    python benchmarks/scale.py                      # every case that is not measured yet
    python benchmarks/scale.py --only ssgc/arxiv    # one case, again
    python benchmarks/scale.py --table              # the tables of docs/scale.md, and its plot

Every case is a process of its own, on a graph of fc.make_attributed_sbm that was written to a
folder once (--data) and is mapped. Results go to benchmarks/results/scale.json, case by case;
peak memory is the process's high-water mark, with what importing takes (0.5 GB) and with the pages
of the folder that it touched. --disturbed marks runs on a machine that had other work.
Louvain and Leiden need scikit-network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scale.json"
PLOT = HERE.parent / "docs" / "images" / "scale.png"

# Nodes, undirected edges, attributes, clusters. Sizes without a name have the degree of arxiv.
SHAPES = {
    "1e4": (10_000, 68_870, 128, 40),
    "3e4": (30_000, 206_610, 128, 40),
    "1e5": (100_000, 688_700, 128, 40),
    "arxiv": (169_343, 1_166_243, 128, 40),
    "5e5": (500_000, 3_443_500, 128, 40),
    "products": (2_449_029, 61_859_140, 100, 47),
}
SEQUENCE = ("1e4", "3e4", "1e5", "arxiv", "5e5")
NOISE, HOMOPHILY = 0.5, 0.6
PEERS = ("kmeans", "louvain", "leiden")
OURS = ("ssgc", "ecnmf", "hsan")
STEPS = {"ecnmf": 300, "hsan": 400}
CASES = [f"{m}/{s}" for s in SEQUENCE for m in (*OURS, *PEERS)]
CASES += [f"{m}/products" for m in (*OURS, "louvain", "kmeans")]


def make(shape: str, folder: Path) -> None:
    """Write the graph of a shape."""
    import fastclust as fc
    from fastclust.convert import write_directory

    n, m, d, k = SHAPES[shape]
    ds = fc.make_attributed_sbm(n, m, d, k, homophily=HOMOPHILY, feature_noise=NOISE)
    write_directory(ds, folder)


def smoothed(ds: Any) -> np.ndarray:
    """S^2 X, what k-means is given."""
    import torch

    import fastclust as fc

    x = torch.from_numpy(np.asarray(ds.features))
    return fc.ops.propagate(fc.Graph(ds.adjacency, norm="sym"), x, steps=2).numpy()


def cluster(method: str, ds: Any) -> np.ndarray:
    """Labels by one of the methods."""
    import fastclust as fc

    k = ds.n_clusters
    if method == "ssgc":
        model: Any = fc.SSGC(k)
    elif method == "ecnmf":
        steps = STEPS[method]
        model = fc.ECNMF(k, epochs=steps, eval_every=steps, width=256, train_batch_size=4096)
    elif method == "hsan":
        steps = STEPS[method]
        # A row of the structure encoders for each of products' nodes, with gradient and moments,
        # would take 20 GB.
        structure = ds.n_nodes < 1_000_000
        model = fc.HSAN(
            k, epochs=steps, eval_every=steps, width=256, batch_size=1024, structure=structure
        )
    elif method == "kmeans":
        from sklearn.cluster import MiniBatchKMeans

        return MiniBatchKMeans(k, n_init=10, random_state=0).fit_predict(smoothed(ds))
    else:
        from sknetwork.clustering import Leiden, Louvain

        peer = {"louvain": Louvain, "leiden": Leiden}[method](random_state=0)
        return peer.fit_predict(sp.csr_matrix(ds.adjacency))  # it takes no array
    return model.fit(ds.features, adjacency=ds.adjacency).labels_


def run(method: str, shape: str, folder: Path) -> dict[str, Any]:
    """Load, cluster, score; in this process."""
    import torch

    import fastclust as fc
    from fastclust.memory import peak_memory

    imported = time.process_time(), peak_memory()["peak_memory_bytes"]
    began = time.perf_counter()
    ds = fc.load_dataset(folder)
    loaded = time.perf_counter()
    labels = cluster(method, ds)
    done = time.perf_counter()
    scores = fc.metrics.clustering_scores(ds.labels, labels)
    return {
        "n_nodes": ds.n_nodes,
        "n_edges": ds.n_edges,
        "load_seconds": loaded - began,
        "seconds": done - loaded,
        "cpu_seconds": time.process_time(),
        "import_cpu_seconds": imported[0],
        "import_memory_bytes": imported[1],
        "peak_memory_bytes": peak_memory()["peak_memory_bytes"],
        "nmi": scores["nmi"],
        "found": int(np.unique(labels).size),
        "threads": torch.get_num_threads(),
    }


def exponents(
    rows: dict[str, Any], method: str, shapes: Sequence[str]
) -> tuple[float, float] | None:
    """Exponents in N of CPU time and of memory, by least squares on logarithms over some shapes.

    Both are what is beyond importing: 3 seconds and 0.4 GB where that was not measured. None where
    fewer than three shapes, or the largest not, were measured.
    """
    found = [rows[f"{method}/{s}"] for s in shapes if f"{method}/{s}" in rows]
    if len(found) < 3 or f"{method}/{shapes[-1]}" not in rows:
        return None
    n = np.log([row["n_nodes"] for row in found])
    seconds = np.log(
        [max(0.1, row["cpu_seconds"] - row.get("import_cpu_seconds", 3.0)) for row in found]
    )
    base = [row.get("import_memory_bytes", 0.4e9) for row in found]
    peaks = [row["peak_memory_bytes"] for row in found]
    memory = np.log([max(1e6, peak - b) for peak, b in zip(peaks, base, strict=True)])
    return float(np.polyfit(n, seconds, 1)[0]), float(np.polyfit(n, memory, 1)[0])


def table(rows: dict[str, Any]) -> str:
    """The tables of docs/scale.md."""
    lines = [
        "| shape | method | seconds | CPU seconds | peak GB | NMI | clusters |",
        "|" + " --- |" * 7,
    ]
    for shape in SHAPES:
        for method in (*OURS, *PEERS):
            row = rows.get(f"{method}/{shape}")
            if row is not None:
                mark = " *" if row["disturbed"] else ""
                mark += "" if "import_cpu_seconds" in row else " †"
                lines.append(
                    f"| {shape} | {method} | {row['seconds']:.1f}{mark} | {row['cpu_seconds']:.1f} "
                    f"| {row['peak_memory_bytes'] / 1e9:.2f} | {100 * row['nmi']:.1f} "
                    f"| {row['found']} |"
                )
    lines += ["", "| method | to 1e5 | to 5e5 | to products |", "| --- | --- | --- | --- |"]
    for method in (*OURS, *PEERS):
        cells = []
        for shapes in (SEQUENCE[:3], SEQUENCE, tuple(SHAPES)):
            fitted = exponents(rows, method, shapes)
            cells.append("" if fitted is None else f"{fitted[0]:.2f} / {fitted[1]:.2f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: dict[str, Any]) -> None:
    """CPU seconds and memory over N, all logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for method in (*OURS, *PEERS):
        found = [rows[f"{method}/{s}"] for s in SHAPES if f"{method}/{s}" in rows]
        found.sort(key=lambda row: row["n_nodes"])
        n = [row["n_nodes"] for row in found]
        left.loglog(n, [row["cpu_seconds"] for row in found], "o-", label=method)
        right.loglog(n, [row["peak_memory_bytes"] / 1e9 for row in found], "o-")
    left.set(xlabel="nodes", ylabel="CPU seconds")
    right.set(xlabel="nodes", ylabel="peak memory, GB")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="METHOD/SHAPE", nargs="*")
    parser.add_argument("--data", type=Path, default=Path("/tmp/fastclust-scale"))
    parser.add_argument("--disturbed", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make(args.make, args.data / args.make)
    if args.run:
        method, shape = args.run
        print(json.dumps(run(method, shape, args.data / shape)))
        return None
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.table:
        print(table(rows))
        return plot(rows)
    base = [sys.executable, __file__, "--data", str(args.data)]
    for case in args.only or [case for case in CASES if case not in rows]:
        method, shape = case.split("/")
        if not (args.data / shape).exists():
            subprocess.run([*base, "--make", shape], check=True)
        done = subprocess.run([*base, "--run", method, shape], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{case}: failed", file=sys.stderr)
            continue
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        rows[case] = json.loads(done.stdout) | {"disturbed": args.disturbed}
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        print(case, rows[case], file=sys.stderr, flush=True)
    return None


if __name__ == "__main__":
    main()
