"""Attributes and labels of the nodes, checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.convert.edges import Progress, damage_told, open_parquet
from fastclust.datasets import DatasetFormatError
from fastclust.datasets.folder import load_array
from fastclust.tables import INDEX_NAMES
from fastclust.validation import check_features


def write_features(path: Path, folder: Path, memory: int, report: Progress) -> tuple[int, int]:
    """Copy the attributes in blocks of rows, checked, as float32; returns N and D."""
    name = path.name.lower()
    if name.endswith(".npz"):
        with damage_told(path, "matrix of scipy.sparse"):
            matrix: Any = check_features(sp.load_npz(path), name="the matrix")
        np.save(folder / "x_indptr.npy", matrix.indptr.astype(np.int64))
        np.save(folder / "x_indices.npy", matrix.indices.astype(np.int32))
        np.save(folder / "x_data.npy", matrix.data)
        return int(matrix.shape[0]), int(matrix.shape[1])
    if name.endswith(".npy"):
        with damage_told(path, "array of NumPy"):
            source = load_array(path, "r")
        if source.ndim != 2 or source.dtype.kind not in "biuf" or 0 in source.shape:
            raise DatasetFormatError(
                f"{path} must hold numbers [N, D], got {source.dtype} of shape {source.shape}"
            )
        n, d = source.shape
        step = max(1, memory // (32 * d))
        blocks: Iterator[Any] = (source[i : i + step] for i in range(0, n, step))
    elif name.endswith(".parquet"):
        file = open_parquet(path)
        names = [column for column in file.schema_arrow.names if column not in INDEX_NAMES]
        n, d = file.metadata.num_rows, len(names)
        blocks = (
            np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
            for batch in file.iter_batches(batch_size=max(1, memory // (32 * d)), columns=names)
        )
    else:
        raise DatasetFormatError(f"{path} must be .npy, .npz of scipy.sparse, or .parquet")
    out = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (n, d))
    done = 0
    for block in blocks:
        if block.dtype.kind not in "biuf":
            raise DatasetFormatError(f"{path} must hold numbers only, got {block.dtype}")
        rows = out[done : done + len(block)]
        rows[:] = block
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            row = done + int(finite.argmin())
            raise DatasetFormatError(f"{path} must hold finite values, row {row} does not")
        done += len(block)
        out.flush()
        report(f"copying {path.name}", done, n)
    return n, d


def read_labels(path: Path, n: int) -> npt.NDArray[np.int64]:
    try:
        if path.name.lower().endswith(".npy"):
            labels = load_array(path)
        else:
            labels = np.loadtxt(path, dtype=np.int64, ndmin=1)
    except Exception as error:  # of a damaged file it can be nearly anything
        raise DatasetFormatError(f"{path} must hold one whole number per node ({error})") from None
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DatasetFormatError(
            f"{path} must hold one whole number of 0 or more per node ({n}), got {labels.dtype} "
            f"of shape {list(labels.shape)}"
        )
    return labels.astype(np.int64)
