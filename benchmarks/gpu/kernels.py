"""The parts that time kernels, each beside its peers and as a share of what the card can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gpu.graphs import SHAPES, load, randn, sibling
from gpu.processes import environment
from gpu.report import Report
from gpu.timing import captured, measure, tf32


def ceilings(report: Report) -> None:
    """Copy bandwidth and matrix rates of this card."""
    device = report.device
    size = 2**16 if report.tiny else 2**28  # floats: 1 GiB read, 1 GiB written
    source, target = randn(size, device=device), torch.empty(size, device=device)

    def copy() -> dict[str, Any]:
        found = measure(lambda: target.copy_(source), device, kernels=True)
        return found | {"rate": 8 * size / found["ms"] / 1e6, "unit": "GB/s"}

    report.case("copy", copy, peer="torch")
    n = 128 if report.tiny else 8192

    def product(dtype: torch.dtype, allow: bool) -> dict[str, Any]:
        a, b = (randn(n, n, device=device, seed=s).to(dtype) for s in range(2))
        with tf32(allow):
            found = measure(lambda: a @ b, device, kernels=True)
        return found | {"rate": 2 * n**3 / found["ms"] / 1e9, "unit": "TFLOP/s"}

    report.case("gemm-bf16", lambda: product(torch.bfloat16, False), peer="torch")
    report.case("gemm-tf32", lambda: product(torch.float32, True), peer="torch")
    report.case("gemm-fp32", lambda: product(torch.float32, False), peer="torch")


def infonce(report: Report, path: str = "") -> None:
    """The loss, forward and backward, at every size, in every precision, beside eager torch."""
    from fastclust import ops

    device, tiny = report.device, report.tiny
    dense_loss = sibling("test_infonce").dense_loss
    sizes = {"tiny": 60} if tiny else {name: SHAPES[name][0] for name in ("cora", "amap", "amac")}
    sizes |= {} if tiny else {"50k": 50_000, "100k": 100_000}
    d = 12 if tiny else 500
    for case, n in sizes.items():
        z, e = (normalize(randn(2 * n, d, device=device, seed=s)).requires_grad_() for s in (0, 1))
        alpha = torch.tensor(0.7, device=device, requires_grad=True)
        labels = torch.randint(0, 7, (n,), generator=torch.Generator().manual_seed(2)).to(device)
        confident = (torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.7).to(device)
        weights = ops.hardness(z, e, alpha, labels, confident, 1.0)
        leaves = (z, e, alpha)

        def row(
            step: Callable[[], Tensor], arithmetic: str, both: bool, n: int = n
        ) -> dict[str, Any]:
            found = measure(step, device, 0.3 if n > 20_000 else 1.0, kernels=True)
            work = (4 if both else 1) * (2 * n) ** 2 * 2 * d
            rate = work / found["ms"] / 1e9
            products, ceiling = (3, "bf16") if arithmetic == "bf16x3" else (1, arithmetic)
            found |= {"rate": rate, "unit": "TFLOP/s"}
            found |= report.share(rate * products, f"gemm-{ceiling}")
            if "peak_bytes" in found:  # the step's own results are not extra
                found["extra_bytes"] = found["peak_bytes"] - (2 * 2 * n * d * 4 if both else 0)
            return found

        def ours(precision: str, w: Any, both: bool, leaves: Any = leaves) -> Callable[[], Any]:
            def step() -> Any:
                loss = ops.hard_infonce(*leaves, weights=w, precision=precision)
                return torch.autograd.grad(loss, leaves) if both else loss.detach()

            return step

        precisions = ("bf16", "bf16x3") if path else ("bf16", "bf16x3", "tf32")
        for precision, weighted in [(p, w) for p in precisions for w in (False, True)]:
            if n > 20_000 and (precision == "tf32" or (n > 50_000 and weighted)):
                continue
            for both in (False, True):
                w = weights if weighted else None
                report.case(
                    case,
                    lambda p=precision, w=w, b=both: row(ours(p, w, b), p, b),
                    peer=f"fastclust {path}".strip(), precision=precision,
                    weights="snapshot" if weighted else "none",
                    what="forward+backward" if both else "forward",
                )  # fmt: skip
        if path or n > 14_000:
            continue
        dense = ops.dense_weights(weights)
        for allow in (False, True):

            def eager(leaves: Any = leaves, dense: Any = dense) -> Any:
                return torch.autograd.grad(dense_loss(*leaves, dense), leaves)

            with tf32(allow):
                arithmetic = "tf32" if allow else "fp32"
                report.case(
                    case, lambda step=eager, a=arithmetic: row(step, a, True), peer="eager torch",
                    precision=arithmetic, weights="given dense",
                    what="forward+backward",
                )  # fmt: skip
        del dense


def infonce_hopper(report: Report) -> None:
    """The loss on its path of its own for Hopper, on request until a card has confirmed it."""
    if report.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        return
    with environment(FASTCLUST_SM90="1"):
        infonce(report, path="sm90")


def propagate(report: Report) -> None:
    """One residual propagation at AMAC's shape against cuSPARSE."""
    dataset = load("tiny" if report.tiny else "amac", report.out)
    for d in (8,) if report.tiny else (64, 500):
        propagate_case(report, dataset.name, dataset.adjacency, d)


def propagate_large(report: Report) -> None:
    """The same at five million nodes and a hundred million entries."""
    import scipy.sparse as sp

    n, per_node, d = (300, 4, 8) if report.tiny else (5_000_000, 10, 256)
    g = torch.Generator(report.device).manual_seed(0)
    ends = torch.randint(0, n, (2, n * per_node), device=report.device, generator=g)
    keys = torch.cat([ends[0] * n + ends[1], ends[1] * n + ends[0]])[
        torch.cat([ends[0] != ends[1]] * 2)
    ]
    keys = torch.unique(keys)
    indptr = torch.searchsorted(keys, torch.arange(n + 1, device=report.device) * n)
    columns = (keys % n).int().cpu().numpy()
    data = np.ones(len(columns), np.float32)
    adjacency = sp.csr_array((data, columns, indptr.int().cpu().numpy()), shape=(n, n))
    del ends, keys, indptr
    propagate_case(report, "100M" if not report.tiny else "tiny", adjacency, d)


def propagate_case(report: Report, case: str, adjacency: Any, d: int) -> None:
    """ours, torch's CSR product and cuSPARSE's two algorithms on one graph."""
    from fastclust import Graph, ops

    device, n, entries = report.device, adjacency.shape[0], adjacency.nnz
    # In turn, 256 MiB together: five times what the second-level cache of an H100 holds.
    copies = 2 if report.tiny else -(-(2**28) // (4 * n * d))
    inputs = [randn(n, d, device=device, seed=s) for s in range(copies)]
    turn = iter(range(10**9))

    def next_input() -> Tensor:
        return inputs[next(turn) % copies]

    # Each operand once, indices once: what no cache can save. Gathers that miss come on top.
    least_bytes = 4 * entries + 8 * n + 4 * 2 * n * d
    gathered = 4 * (entries * (d + 1) + 2 * n * d)

    def row(step: Callable[[], Any], passes: int = 1) -> dict[str, Any]:
        found = measure(step, device, kernels=True)
        rate = passes * least_bytes / found["ms"] / 1e6
        found |= {"rate": rate, "unit": "GB/s"} | report.share(rate, "copy")
        return found | {"gathered_gb_s": passes * gathered / found["ms"] / 1e6, "d": d}

    graph = Graph(adjacency).to(device)

    def fused() -> Tensor:
        h = next_input()
        return ops.propagate(graph, h, residual=h, activation="relu")

    report.case(case, lambda: row(fused), peer="fastclust", what="relu(Abar H + H)")
    plain = Graph(adjacency, norm="none", self_loops=False).to(device)
    report.case(
        case, lambda: row(lambda: ops.propagate(plain, next_input())), peer="fastclust", what="A H"
    )
    ones = torch.ones_like(inputs[0])

    def both() -> Any:
        leaf = next_input().detach().requires_grad_()
        out = ops.propagate(graph, leaf, residual=leaf, activation="relu")
        return torch.autograd.grad(out, leaf, ones)

    report.case(case, lambda: row(both, 2), peer="fastclust", what="forward+backward")

    index = torch.int32 if entries < 2**31 else torch.int64
    matrix = torch.sparse_csr_tensor(
        torch.from_numpy(adjacency.indptr).to(index), torch.from_numpy(adjacency.indices).to(index),
        torch.from_numpy(adjacency.data).float(), adjacency.shape, check_invariants=False,
    ).to(device)  # fmt: skip
    report.case(case, lambda: row(lambda: matrix @ next_input()), peer="torch CSR", what="A H")
    if device != "cuda":
        return
    for algorithm in ("CSR_ALG2", "CSR_ALG3"):

        def peer(algorithm: str = algorithm) -> dict[str, Any]:
            product = cusparse(adjacency, algorithm)
            got = torch.from_dlpack(product(inputs[0]))[:1000]
            torch.testing.assert_close(got, (matrix @ inputs[0])[:1000], rtol=1e-3, atol=1e-3)
            return row(lambda: product(next_input()))

        report.case(case, peer, peer=f"cuSPARSE {algorithm}", what="A H")


def cusparse(adjacency: Any, algorithm: str) -> Callable[[Tensor], Any]:
    """A H by one named algorithm of cusparseSpMM, through CuPy; CSR_ALG3 is deterministic."""
    import cupy
    import cupyx.scipy.sparse
    from cupy_backends.cuda.libs import cusparse as library
    from cupyx.cusparse import SpMatDescriptor

    code = {"CSR_ALG2": 6, "CSR_ALG3": 12}[algorithm]  # as in cusparse.h; CuPy does not name them
    a = cupyx.scipy.sparse.csr_matrix(adjacency.astype(np.float32))
    sparse = SpMatDescriptor.create(a)
    one, zero = np.array(1.0, np.float32), np.array(0.0, np.float32)
    handle = cupy.cuda.device.get_cusparse_handle()
    kept: dict[str, Any] = {}

    def product(h: Tensor) -> Any:
        if "out" not in kept:
            kept["out"] = cupy.empty(tuple(h.shape), cupy.float32)
            kept["result"] = row_major(kept["out"])
        dense = row_major(cupy.from_dlpack(h.detach()))
        arguments = (
            handle, 0, 0, one.ctypes.data, sparse.desc, dense.desc, zero.ctypes.data,
            kept["result"].desc, 0, code,
        )  # fmt: skip
        if "buffer" not in kept:
            size = max(1, library.spMM_bufferSize(*arguments))
            kept["buffer"] = cupy.empty(size, cupy.int8)
        library.spMM(*arguments, kept["buffer"].data.ptr)
        return kept["out"]

    return product


def row_major(array: Any) -> Any:
    """A descriptor of a row-major CuPy array; CuPy's own wrapper takes column-major ones only."""
    from cupy_backends.cuda.libs import cusparse as library
    from cupyx.cusparse import DnMatDescriptor

    rows, columns = array.shape
    real32, order_row = 0, 2  # CUDA_R_32F, CUSPARSE_ORDER_ROW
    desc = library.createDnMat(rows, columns, columns, array.data.ptr, real32, order_row)
    return DnMatDescriptor(desc, None, library.destroyDnMat)


def lowrank(report: Report) -> None:
    """All row batches of AMAC at its rank, eager and as a CUDA graph, against svd_lowrank."""
    from fastclust import ops

    device = report.device
    name = "tiny" if report.tiny else "amac"
    dataset = load(name, report.out)
    rank = SHAPES[name][5]
    x = torch.from_numpy(np.asarray(dataset.features.todense(), dtype=np.float32)).to(device)
    for batch in (None,) if report.tiny else (1024, 2048, None):
        labels: dict[str, Any] = {"rank": rank, "batch_size": batch or len(x)}

        def ours(batch: int | None = batch) -> Any:
            return ops.batched_svd(x, rank, batch_size=batch)

        def peer(batch: int | None = batch) -> Any:
            return [
                torch.svd_lowrank(b - b.mean(0), min(rank + 10, *b.shape), niter=2)
                for b in x.split(batch or len(x))
            ]

        report.case(dataset.name, lambda f=ours: measure(f, device), peer="fastclust", **labels)
        if device == "cuda":
            report.case(
                dataset.name,
                lambda f=ours: measure(captured(f), device),
                peer="fastclust, CUDA graph",
                **labels,
            )
        report.case(
            dataset.name, lambda f=peer: measure(f, device), peer="torch.svd_lowrank", **labels
        )


def kmeans(report: Report) -> None:
    """Ten restarts at AMAC's shape, against Lloyd's iterations in plain torch of as many steps."""
    from fastclust import ops

    device = report.device
    n, k = (200, 3) if report.tiny else (SHAPES["amac"][0], SHAPES["amac"][4])
    for d in (6,) if report.tiny else (20, 500, 1500):  # 20: the models cluster in 2 K directions
        means = 0.15 * randn(k, d, device=device)
        x = means[torch.arange(n, device=device) % k] + randn(n, d, device=device, seed=1)

        def ours(x: Tensor = x) -> dict[str, Any]:
            found = measure(lambda: ops.kmeans(x, k, n_init=10), device)
            best = ops.kmeans(x, k, n_init=10)
            return found | {"inertia": float(best.inertia), "iterations": best.n_iter}

        def peer(x: Tensor = x) -> dict[str, Any]:
            steps = ops.kmeans(x, k, n_init=10).n_iter

            def lloyd() -> Tensor:
                best = torch.full((), torch.inf, device=x.device)
                for restart in range(10):
                    g = torch.Generator(device).manual_seed(restart)
                    centers = x[torch.randperm(len(x), device=device, generator=g)[:k]]
                    for _ in range(steps):
                        distance, labels = torch.cdist(x, centers).min(1)
                        sums = torch.zeros_like(centers).index_add_(0, labels, x)
                        count = torch.bincount(labels, minlength=k).clamp_min(1)
                        centers = sums / count[:, None]
                    best = torch.minimum(best, distance.square().sum())
                return best

            return measure(lloyd, device) | {"inertia": float(lloyd()), "iterations": steps}

        report.case("amac" if not report.tiny else "tiny", ours, peer="fastclust", d=d)
        report.case("amac" if not report.tiny else "tiny", peer, peer="torch Lloyd", d=d)
