"""What is fuzzed: every reader of foreign bytes, as a function that may fail in expected ways only.

A target takes bytes and returns nothing. It swallows the errors that its reader documents; whatever
else comes out of it is a finding, as are seconds of silence and a jump in memory (see campaign.py).
Where the raw file is guarded by checksums (zip), further targets mutate what lies behind them.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.io
import scipy.sparse as sp
import torch

from fastclust import cli, datasets, files, settings, tables, train
from fastclust.compare.command import build_parser
from fastclust.compare.methods import methods
from fastclust.compare.runs import train_command
from fastclust.convert import convert, write_directory
from fastclust.datasets import Dataset, DatasetFormatError, published
from fastclust.datasets import npz as npz_format
from fastclust.estimators import ECNMF, SSGC, base
from fastclust.memory import InsufficientMemoryError
from fastclust.rundir import RunDirectory, read_history, read_toml
from fastclust.training import CheckpointError
from fastclust.validation import check_adjacency, check_features

N, D, K = 12, 6, 3


@dataclass(frozen=True)
class Target:
    """A reader and bytes that it reads well, from which the mutations start."""

    run: Callable[[bytes], None]
    corpus: Callable[[], list[bytes]]
    share: int = 10  # of a campaign's cases, relative to the others: cheap targets get more


# --- good data -----------------------------------------------------------------------------------


@cache
def graph() -> Dataset:
    rng = np.random.default_rng(0)
    upper = np.triu(rng.random((N, N)) < 0.3, 1)
    adjacency = check_adjacency(sp.csr_array((upper | upper.T).astype(np.float32)))
    features = check_features(sp.csr_array(rng.integers(0, 3, (N, D)).astype(np.float32)), N)
    return Dataset("small", adjacency, features, np.arange(N) % K, K)


@cache
def uniform() -> dict[str, Any]:
    return npz_format.to_uniform(graph()) | {"adj_data": graph().adjacency.data}


@cache
def gnn_benchmark() -> dict[str, Any]:
    parts = {"labels": graph().labels}
    for name, matrix in (("adj", graph().adjacency), ("attr", sp.csr_array(graph().features))):
        for part in ("data", "indices", "indptr"):
            parts[f"{name}_{part}"] = getattr(matrix, part)
        parts[f"{name}_shape"] = np.array(matrix.shape)
    return parts


def npz(arrays: dict[str, Any], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def require_sound(dataset: Dataset) -> None:
    """What the rest of the package may take for granted of a loaded graph."""
    a, x, n = dataset.adjacency, dataset.features, dataset.n_nodes
    assert a.shape == (n, n) and x.shape[0] == n and n >= 1 and x.shape[1] >= 1
    assert a.indptr[0] == 0 and (np.diff(a.indptr) >= 0).all() and a.indptr[-1] == a.nnz
    assert a.nnz == 0 or (a.indices.min() >= 0 and a.indices.max() < n)
    assert np.isfinite(a.data).all() and (abs(a - a.T) > 0).nnz == 0
    assert not a.diagonal().any()
    values = x.data if sp.issparse(x) else x
    assert values.dtype == np.float32 and np.isfinite(values).all()
    if dataset.labels is not None:
        assert dataset.labels.shape == (n,) and dataset.labels.min() >= 0
        assert dataset.n_clusters == np.unique(dataset.labels).size


# --- npz files -----------------------------------------------------------------------------------


def read_npz(content: bytes) -> None:
    with contextlib.suppress(DatasetFormatError, InsufficientMemoryError):
        arrays = npz_format.unzip(io.BytesIO(content), "fuzz.npz")
        require_sound(npz_format.from_arrays(arrays, "fuzz", "fuzz.npz", False))


def npz_files() -> list[bytes]:
    return [
        npz(arrays, compressed=compressed)
        for arrays in (uniform(), gnn_benchmark())
        for compressed in (False, True)
    ]


def zipped(content: bytes) -> bytes:
    """Members framed as name, length, bytes: zipped here, so that the checksums are right."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # a name that comes twice
        while len(content) > 24:
            name = content[:16].rstrip(b"\0").decode("latin1")
            size = int.from_bytes(content[16:20], "little") % (1 << 16)
            archive.writestr(
                (name.partition("\0")[0] or "labels") + ".npy", content[20 : 20 + size]
            )
            content = content[20 + size :]
    return buffer.getvalue()


def read_members(content: bytes) -> None:
    read_npz(zipped(content))


def framed(arrays: Mapping[str, Any]) -> bytes:
    frame = b""
    for name, array in arrays.items():
        member = io.BytesIO()
        np.save(member, np.asarray(array))
        data = member.getvalue()
        frame += name.encode().ljust(16, b"\0") + len(data).to_bytes(4, "little") + data
    return frame


def member_frames() -> list[bytes]:
    return [framed(arrays) for arrays in (uniform(), gnn_benchmark())]


_ODD = (0, 1, -1, 2, N, N - 1, N + 1, 127, -128, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63))
_ODD_FLOATS = (0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e308, 3e38, 1e-45)
_NO_EDIT = (ValueError, TypeError, IndexError, OverflowError)
_DTYPES = (
    "i1",
    "u1",
    "i4",
    "u4",
    "i8",
    "u8",
    "f2",
    "f4",
    "f8",
    "c8",
    "?",
    "S3",
    "U2",
    "O",
    "M8[s]",
)


def edited(arrays: dict[str, Any], content: bytes) -> dict[str, Any]:
    """The arrays after edits of five bytes each: key, operation, place, value, more."""
    arrays = {key: np.array(value) for key, value in arrays.items()}
    for at in range(0, len(content) - 4, 5):
        which, operation, place, value, more = content[at : at + 5]
        keys = sorted(arrays)
        if not keys:
            break
        key = keys[which % len(keys)]
        array = arrays[key]
        with contextlib.suppress(*_NO_EDIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            match operation % 10:
                case 0 if array.size:
                    odd = _ODD_FLOATS if array.dtype.kind == "f" else _ODD
                    array.reshape(-1)[place % array.size] = odd[value % len(odd)]
                case 1:
                    arrays[key] = array[: place % (array.size + 1)] if array.ndim else array
                case 2:
                    arrays[key] = np.concatenate([array, array[: place % 9]])
                case 3:
                    arrays[key] = array.astype(_DTYPES[value % len(_DTYPES)])
                case 4:
                    arrays[key] = array.reshape((1, -1) if value % 2 else (-1, 1))
                case 5:
                    del arrays[key]
                case 6:
                    arrays[key] = arrays[keys[value % len(keys)]]
                case 7:
                    arrays[key] = np.array(_ODD[value % len(_ODD)])
                case 8 if array.size:
                    arrays[key] = array + np.asarray(more - 128).astype(array.dtype)
                case 9:
                    arrays[key] = array[::-1]
    return arrays


def read_arrays(content: bytes) -> None:
    base = (uniform, gnn_benchmark)[content[0] % 2]() if content else uniform()
    with contextlib.suppress(DatasetFormatError):
        require_sound(npz_format.from_arrays(edited(base, content[1:]), "fuzz", "fuzz.npz", False))


def array_edits() -> list[bytes]:
    rng = np.random.default_rng(1)
    return [rng.bytes(1 + 5 * n) for n in (0, 1, 1, 1, 2, 2, 3, 5)]


# --- tables of one's own -------------------------------------------------------------------------

_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".mtx", ".npy", ".npz", ".parquet")


def read_tables(content: bytes) -> None:
    """Three bytes for suffixes and options, then edges, attributes and labels apart by NULs."""
    if len(content) < 3:
        return
    kinds, content = content[:3], content[3:]
    # Binary files hold NULs: one of them alone is mutated, beside good tables.
    suffix = _SUFFIXES[kinds[0] % 8]
    parts = content.split(b"\0\0\0", 2) if kinds[0] % 8 < 4 else [content]
    if suffix == ".npz" and kinds[1] & 2:
        parts = [zipped(content)]
    files = dict(zip(("edges", "features", "labels"), _TABLES, strict=True))
    if len(parts) == 1:
        files[("features", "edges")[kinds[1] % 2]] = parts[0]
        mutated = {("features", "edges")[kinds[1] % 2]: suffix}
    else:
        files |= dict(zip(files, parts, strict=False))
        mutated = dict.fromkeys(files, suffix)
    paths = {}
    for role, data in files.items():
        end = mutated.get(role, ".csv")
        paths[role] = _scratch() / (role + end)
        paths[role].write_bytes(gzip.compress(data, 1) if end.endswith(".gz") else data)
    labels: Any = (None, paths["labels"], "h", "class")[kinds[2] % 4]
    ids = (None, None, "h", "name")[kinds[2] // 4 % 4]
    edges = None if kinds[2] // 16 % 8 == 7 else paths["edges"]
    expected = (DatasetFormatError, datasets.DatasetNotFoundError, InsufficientMemoryError)
    with contextlib.suppress(*expected), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require_sound(tables.load_files(edges, paths["features"], labels, ids=ids))


_TABLES = (
    b"source,target,weight\n0,1,1\n1,2,0.5\n3,1,2\n",
    b"h,w,class\n1,2,0\n0.5,-1,1\n3e2,4,0\n1,1,1\n",
    b"node,class\n0,a\n1,b\n2,a\n3,b\n",
)


def own_tables() -> list[bytes]:
    named = (
        b"src;dst\nann;bob\n'ann';di\n",
        b'id;h;w\nann;1;2\nbob;2;3\n"c;y";0;1\ndi;1;1\n',
        b"a\nb\na\nb\n",
    )
    blanks = (b"% edges\n0 1\n1 2\n", b"# x\n1 2\n3 4\n5 6\n", b"0\n1\n0\n")
    corpus = [
        bytes([kind, 0, option]) + b"\0\0\0".join(files)
        for kind, option, files in (
            *((0, 1, _TABLES), (3, 3, _TABLES), (1, 1, named), (2, 1, blanks)),
            *((2, 0, blanks), (0, 0x70, _TABLES), (0, 2, _TABLES)),
        )
    ]
    dense = np.arange(8.0).reshape(4, 2)
    square = sp.coo_array(np.eye(4)[[1, 0, 3, 2]])
    for role, matrix in ((0, dense), (1, square)):
        text, binary, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
        scipy.io.mmwrite(text, matrix)
        scipy.io.mmwrite(general := io.BytesIO(), matrix, symmetry="general")
        np.save(binary, matrix if role == 0 else matrix.toarray())
        sp.save_npz(archive, sp.csr_array(matrix))
        for kind, file in ((4, text), (5, binary), (6, archive)):
            corpus.append(bytes([kind, role, 0]) + file.getvalue())
        corpus.append(bytes([4, role, 0]) + general.getvalue())
        for form in ("csr", "csc", "coo", "bsr", "dia"):
            sp.save_npz(archive := io.BytesIO(), sp.coo_array(matrix).asformat(form))
            archive.seek(0)
            corpus.append(bytes([6, role | 2, 0]) + framed(np.load(archive)))
    return corpus


# --- edge lists of any length, folders of arrays -------------------------------------------------

_EDGE_FILES = (".txt", ".csv", ".txt.gz", ".npy", ".npz", ".parquet")


def read_edge_list(content: bytes) -> None:
    """A byte for role and suffix, then the file: edges, attributes or labels for ``convert``."""
    kind, content = (content[0], content[1:]) if content else (0, b"")
    role, end = ("edges", _EDGE_FILES[kind % 6])
    if kind >= 128:
        role, end = (("features", ".npy"), ("features", ".npz"), ("labels", ".txt"))[kind % 3]
        content = zipped(content) if kind >= 192 and end == ".npz" else content
    files = {"edges": ("edges.txt", b"0 1\n1 2\n3,1\n")}
    files[role] = (role + end, gzip.compress(content, 1) if end.endswith(".gz") else content)
    paths = {key: _scratch() / "convert" / name for key, (name, _) in files.items()}
    shutil.rmtree(_scratch() / "convert", ignore_errors=True)
    (_scratch() / "convert").mkdir()
    for key, (_, data) in files.items():
        paths[key].write_bytes(data)
    with contextlib.suppress(DatasetFormatError, InsufficientMemoryError):
        folder = convert(_scratch() / "convert" / "out", **paths, memory=1 << 24)
        require_sound(datasets.load_dataset(folder))


def edge_lists() -> list[bytes]:
    edges = np.array([[0, 1], [1, 2], [2, 3]])
    np.save(array := io.BytesIO(), edges)
    np.savez(archive := io.BytesIO(), edges=edges)
    np.save(dense := io.BytesIO(), np.arange(8.0).reshape(4, 2))
    corpus = [
        b"\0source target\n0 1\n1 2 \n",
        b"\1% by hand\n0,1,0.5\n1,2,2e0\n",
        b"\0020 1\n3 2\n",
    ]
    corpus += [b"\3" + array.getvalue(), b"\4" + archive.getvalue(), b"\x82" + b"0\n1\n0\n1\n"]
    corpus += [b"\x81" + dense.getvalue()]  # 129 % 3 == 0
    for form in ("csr", "csc", "coo"):
        sp.save_npz(sparse := io.BytesIO(), sp.coo_array(np.eye(4)).asformat(form))
        sparse.seek(0)
        corpus.append(b"\xc1" + framed(np.load(sparse)))  # 193 % 3 == 1
    return corpus


def read_directory(content: bytes) -> None:
    """A byte for the file of a folder that ``convert`` wrote, then its content."""
    kind, content = (content[0], content[1:]) if content else (0, b"")
    folder = _scratch() / "directory"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written_directory(), folder)
    names = sorted(file.name for file in folder.iterdir())
    (folder / names[kind % len(names)]).write_bytes(content)
    with contextlib.suppress(DatasetFormatError, InsufficientMemoryError):
        require_sound(datasets.load_dataset(folder))


@cache
def written_directory() -> Path:
    return write_directory(graph(), _scratch() / "written")


def directories() -> list[bytes]:
    files = sorted(written_directory().iterdir(), key=lambda file: file.name)
    return [bytes([i]) + file.read_bytes() for i, file in enumerate(files)]


# --- the published files -----------------------------------------------------------------------


@cache
def planetoid() -> dict[str, bytes]:
    d = graph()
    x, one_hot = sp.csr_matrix(sp.csr_array(d.features)), np.eye(K)[d.labels]
    neighbors = {i: d.adjacency.indices[d.adjacency.indptr[i] : d.adjacency.indptr[i + 1]].tolist()
                 for i in range(N)}  # fmt: skip
    parts = {"allx": x[:8], "tx": x[8:], "ally": one_hot[:8], "ty": one_hot[8:], "graph": neighbors}
    files = {f"ind.cora.{key}": pickle.dumps(value, 2) for key, value in parts.items()}
    return files | {"ind.cora.test.index": b"8\n9\n10\n11\n"}


def read_planetoid(content: bytes) -> None:
    """The first byte names the file that the rest replaces."""
    names = sorted(planetoid())
    files = planetoid() | ({names[content[0] % len(names)]: content[1:]} if content else {})
    with contextlib.suppress(DatasetFormatError):
        require_sound(published.build_planetoid(files, "cora"))


def planetoid_files() -> list[bytes]:
    return [bytes([i]) + planetoid()[name] for i, name in enumerate(sorted(planetoid()))]


def read_airports(content: bytes) -> None:
    edges, _, labels = content.partition(b"\0")
    files = {"x-airports.edgelist": edges, "labels-x-airports.txt": labels}
    with contextlib.suppress(DatasetFormatError):
        require_sound(published.build_airports(files, "eat"))


def airport_files() -> list[bytes]:
    return [b"10 11\n11 12\n10 12\n\0node label\n10 0\n11 1\n12 0\n", b"1 2\r\n\01 0\n2 1\n"]


# --- what fastclust writes and reads again ------------------------------------------------------


@cache
def _scratch() -> Path:
    """A folder in memory where there is one; kept until the process ends."""
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = tempfile.TemporaryDirectory(prefix="fastclust-fuzz-", dir=shm)
    _scratch.keep = folder  # type: ignore[attr-defined]
    return Path(folder.name)


@cache
def fitted() -> Path:
    """A folder with the checkpoint and the saved model of a fitted estimator."""
    folder = _scratch() / "fitted"
    with _signed():
        model = _estimator(folder).fit(graph().features, adjacency=graph().adjacency)
        model.save(folder)
        SSGC(K).fit(graph().features, adjacency=graph().adjacency).save(folder / "ssgc")
    return folder


def _estimator(folder: Path, **keywords: Any) -> ECNMF:
    return ECNMF(
        K, epochs=1, width=4, rank=2, n_init=1, checkpoint_dir=folder, device="cpu", **keywords
    )


@contextlib.contextmanager
def _signed() -> Iterator[None]:
    """Every content has the same digest: mutations are to reach what lies behind that check."""
    with (
        mock.patch("fastclust.checkpoints._digest", lambda *content: "signed"),
        mock.patch.object(base, "file_digest", lambda path: "signed"),
    ):
        yield


def read_checkpoint(content: bytes) -> None:
    fitted()
    folder = _scratch() / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint.safetensors").write_bytes(content)
    (folder / "previous.safetensors").unlink(missing_ok=True)
    with _signed(), contextlib.suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # one epoch in all: a checkpoint that is taken ends the run
        _estimator(folder, resume=True).fit(graph().features, adjacency=graph().adjacency)


def checkpoints() -> list[bytes]:
    return [(fitted() / "checkpoint.safetensors").read_bytes()]


def read_model(content: bytes) -> None:
    """A byte for estimator and file, then the file."""
    kind, content = (content[0], content[1:]) if content else (0, b"")
    model, source = (ECNMF, fitted()) if kind & 1 else (SSGC, fitted() / "ssgc")
    folder = _scratch() / "model"
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(("config.json", "model.safetensors")):
        mine = i == kind >> 1 & 1
        (folder / name).write_bytes(content if mine else (source / name).read_bytes())
    with _signed(), contextlib.suppress(ValueError):
        model.load(folder)  # type: ignore[attr-defined]


def models() -> list[bytes]:
    return [
        bytes([kind]) + (source / name).read_bytes()
        for kind, source, name in (
            (0, fitted() / "ssgc", "config.json"),
            (1, fitted(), "config.json"),
            (2, fitted() / "ssgc", "model.safetensors"),
            (3, fitted(), "model.safetensors"),
        )
    ]


def read_run_directory(content: bytes) -> None:
    folder = _scratch() / "run"
    directory = RunDirectory(folder)
    result, _, history = content.partition(b"\0")
    (folder / "result.json").write_bytes(result)
    (folder / "history.jsonl").write_bytes(history)
    with contextlib.suppress(cli.UsageError):
        before = directory.read_result()
        if before is not None:
            assert all(isinstance(run["seed"], int) for run in before["runs"])
    for row in read_history(folder / "history.jsonl"):
        assert isinstance(row["epoch"], int)


def run_directories() -> list[bytes]:
    result = {
        "dataset": "digits",
        "runs": [{"seed": 0, "metrics": {"acc": 0.5}, "resolved": {}}],
        "mean": {},
    }
    row = {"epoch": 1, "loss": 0.5, "seconds": 0.1}
    return [json.dumps(result).encode() + b"\0" + json.dumps(row).encode() + b"\n"]


# --- the command line --------------------------------------------------------------------------


def _outcome(function: Callable[[], object]) -> None:
    """Run a part of the command as the command would; only its own messages may come out."""
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            function()
    except SystemExit as leaving:
        assert leaving.code in (0, 2), leaving.code
    except Exception as error:
        code, message = cli.explain(error)
        if code != 2 or not message.strip() or "\n" in message:
            raise


def _load_offline(name: Any, root: Any = None) -> Dataset:
    """A data set of its own for every name."""
    if str(name) not in datasets.DATASET_NAMES:
        raise datasets.DatasetNotFoundError(f"no data set {name!r}")
    return Dataset(str(name), graph().adjacency, graph().features, graph().labels, K)


def _plan(arguments: list[str], saved: dict[str, Any] | None = None) -> None:
    parsed = train.build_parser().parse_args(arguments)
    with mock.patch.object(settings, "load_dataset", _load_offline):
        plan, _ = settings.resolve(settings.gather_settings(parsed, saved))
    # what is accepted must survive the way through config.toml
    config = plan.config()
    json.dumps(files.as_json(config))


def _shell_words(content: bytes) -> list[str]:
    """Arguments as a shell hands them over: text without NUL, undecodable bytes as surrogates."""
    return [part.decode("utf-8", "surrogateescape") for part in content.split(b"\0")]


def read_arguments(content: bytes) -> None:
    _outcome(lambda: _plan(_shell_words(content)))


def argument_lists() -> list[bytes]:
    lines = [
        "--dataset digits --model hsan --epochs 3 --seeds 0-9",
        "--seed 1,3,5-7 --n-clusters 4 --device cpu --precision bf16",
        "--set rank=3 --set lr=1e-3 --set recombine=merge --set bias=true --set batch_size=none",
        "--selection silhouette --protocol paper-code --out x --resume --quiet --json",
        "--config nothing.toml --data-root /nowhere",
        "--help",
        "--set help --model ssgc",
        "--model ssgc --set n_steps=4",
    ]
    return [line.encode().replace(b" ", b"\0") for line in lines]


def read_comparison(content: bytes) -> None:
    """The arguments of ``compare``, up to the commands of the runs that it would start."""

    def commands() -> None:
        arguments = build_parser().parse_args(_shell_words(content))
        chosen = (arguments.models, arguments.protocol, arguments.ablation)
        for method in methods(*chosen, {"epochs": "3"}):
            for dataset in arguments.datasets:
                command = train_command(method, dataset, Path("out"), arguments)
                _plan([word for word in command[3:] if word != "--resume"])

    _outcome(commands)


def comparisons() -> list[bytes]:
    lines = [
        "--datasets cora,bat --models hsan,ecnmf,ssgc --protocol standard,paper-code --seeds 0-9",
        "--datasets all --models ssgc --epochs 3 --device cpu --precision bf16 --set width=8",
        "--models hsan --ablation --jobs 2 --quiet --data-root /nowhere",
    ]
    return [f"{line} --out x".encode().replace(b" ", b"\0") for line in lines]


def read_config(content: bytes) -> None:
    path = _scratch() / "config.toml"
    path.write_bytes(content)
    _outcome(lambda: _plan(["--config", str(path)]))
    with contextlib.suppress(cli.UsageError):
        saved = read_toml(path)
        _outcome(lambda: _plan(["--resume"], saved))


def configs() -> list[bytes]:
    return [
        b'dataset = "cora"\nmodel = "ecnmf"\nseeds = [0, 1]\nlr = 1e-3\nbatch_size = "none"\n',
        b'model = "hsan"\nseed = "0-3"\nn_input = "auto"\nstructure = true\nbeta = inf\n',
        b"[table]\na = 1\nb = [1.5, 'x', 1979-05-27]\n",
    ]


# --- arrays in memory --------------------------------------------------------------------------


def read_adjacency(content: bytes) -> None:
    """Anything array-like as adjacency and as features: form, dtype, sizes, then the values."""
    if len(content) < 5:
        return
    form, kind, rows, columns, n = content[:5]
    dtype = np.dtype(("i8", "i4", "f4", "f8", "u1", "i2", "?")[kind % 7])
    raw = content[5:]
    flat = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form % 2 and flat.dtype.kind in "iu":
            flat = flat % 64 - 2
        shape = (rows % 17, columns % 17)
        if flat.size < shape[0] * shape[1]:
            return
        value: Any = flat[: shape[0] * shape[1]].reshape(shape)
        if form % 8 == 2:
            value = torch.from_numpy(value.copy())
        elif form % 8 == 4:
            value = sp.coo_array(value)
        elif form % 8 == 6:
            value = sp.csc_array(value)
        for check in (check_adjacency, check_features):
            with contextlib.suppress(ValueError, TypeError, InsufficientMemoryError):
                check(value, n % 20 if n else None)


def raw_arrays() -> list[bytes]:
    edges = np.array([[0, 1, 2, 3], [1, 2, 3, 0]], np.int64)
    dense = graph().adjacency.toarray()
    return [
        bytes([1, 0, 2, 4, 4]) + edges.tobytes(),
        bytes([0, 2, N, N, N]) + dense.astype(np.float32).tobytes(),
        bytes([4, 3, N, N, N]) + dense.astype(np.float64).tobytes(),
    ]


def read_seeds(content: bytes) -> None:
    _outcome(lambda: settings._seeds(content.decode("utf-8", "replace")))


TARGETS = {
    "npz": Target(read_npz, npz_files),
    "npz-members": Target(read_members, member_frames),
    "npz-arrays": Target(read_arrays, array_edits, share=30),
    "tables": Target(read_tables, own_tables),
    "edge-lists": Target(read_edge_list, edge_lists, share=5),
    "directory": Target(read_directory, directories, share=5),
    "planetoid": Target(read_planetoid, planetoid_files),
    "airports": Target(read_airports, airport_files, share=20),
    "checkpoint": Target(read_checkpoint, checkpoints, share=2),
    "model": Target(read_model, models, share=15),
    "run-directory": Target(read_run_directory, run_directories, share=20),
    "arguments": Target(read_arguments, argument_lists, share=5),
    "comparison": Target(read_comparison, comparisons, share=3),
    "config": Target(read_config, configs, share=5),
    "arrays": Target(read_adjacency, raw_arrays, share=30),
    "seeds": Target(read_seeds, lambda: [b"0-9", b"0,3,7-9", b"4294967295"], share=30),
}
