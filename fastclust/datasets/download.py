"""Where the benchmark graphs are looked for: folders, the cache, and at last the network."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fastclust.datasets.dataset import (
    Dataset,
    DatasetFormatError,
    DatasetNotFoundError,
    array_digest,
)
from fastclust.datasets.npz import read_npz, to_uniform
from fastclust.datasets.published import Source
from fastclust.files import replacing
from fastclust.validation import DataWarning

_log = logging.getLogger("fastclust")

#: Where downloads come from; the environment variable FASTCLUST_DATA_URL names a mirror that
#: serves the same paths.
BASE_URL = "https://raw.githubusercontent.com"

_TIMEOUT = (10.0, 60.0)  # seconds to connect, seconds of silence while reading
_ATTEMPTS = 3
_RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled before each later one


def search_folders(root: str | os.PathLike[str] | None) -> list[Path]:
    """The folders of the user's, in the order in which they are looked in."""
    folders = [root, os.environ.get("FASTCLUST_DATA")]
    return [Path(folder).expanduser() for folder in folders if folder]


def cache_dir() -> Path:
    """Where downloads are kept."""
    import platformdirs  # here: whoever reads files of their own needs neither this nor pooch

    return Path(platformdirs.user_cache_dir("fastclust"))


def find_in(folder: Path, key: str, source: Source) -> tuple[Path, Callable[[], Dataset]] | None:
    """What of a data set a folder holds, and how to read it."""
    npz = folder / f"{key}.npz"
    if npz.exists():
        return npz, lambda: read_npz(npz, key, binary=source.blob_id is not None)
    files = [folder / Path(file).name for file in source.files]
    if all(file.is_file() for file in files):
        return files[0], lambda: source.build({f.name: _read_bytes(f) for f in files}, key)
    return None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetFormatError(f"{path} cannot be read: {error.strerror}") from None


def read_verified(path: Path, key: str, source: Source) -> Dataset:
    """A cached file, provided that it is what was put there."""
    if source.blob_id is not None and path.exists():
        blob_id = git_blob_id(_read_bytes(path))
        if blob_id != source.blob_id:
            raise DatasetFormatError(f"its git blob id is {blob_id}, not {source.blob_id}")
    dataset = read_npz(path, key, binary=source.blob_id is not None)
    if source.blob_id is None and array_digest(dataset) != source.digest:
        raise DatasetFormatError(f"its arrays are not those of {key!r}")
    return dataset


def git_blob_id(content: bytes) -> str:
    """The id by which git knows a file of this content."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


class _DownloadError(Exception):
    """A download that did not succeed; the message is one line."""


def download_dataset(key: str, source: Source, cache: Path, tried: list[str]) -> Dataset:
    """Fetch, verify, cache."""
    base_url = os.environ.get("FASTCLUST_DATA_URL", BASE_URL).rstrip("/")
    contents = {}
    for file in source.files:
        url = f"{base_url}/{file}"
        try:
            contents[Path(file).name] = _fetch(url, source.blob_id)
        except _DownloadError as error:
            tried.append(f"{url} ({error})")
            names = " ".join(Path(f).name for f in source.files)
            raise DatasetNotFoundError(
                f"data set {key!r} was not found; tried: {'; '.join(tried)}. Connect to the "
                f"network, or put {key}.npz (or {names}) in a folder and name it as the data "
                f"root or in FASTCLUST_DATA"
            ) from None
    dataset = source.build(contents, key)
    if array_digest(dataset) != source.digest:
        if source.blob_id is None:
            raise DatasetFormatError(
                f"{base_url}/{source.files[0]} and its companions do not give the arrays known as "
                f"{key!r}: they were altered or truncated on the way; try again, or name another "
                f"mirror in FASTCLUST_DATA_URL"
            )
        _log.info("%s: published file verified; its arrays differ from the reference", key)
    _store(cache / f"{key}.npz", contents, source, dataset)
    return dataset


def _fetch(url: str, blob_id: str | None) -> bytes:
    """The content behind a URL, with the given git blob id where there is one."""
    import pooch
    import requests

    _log.info("downloading %s", url)
    download = pooch.HTTPDownloader(timeout=_TIMEOUT)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_RETRY_PAUSE * 2 ** (attempt - 1))
        buffer = io.BytesIO()
        try:
            download(url, buffer, None)
        except requests.exceptions.HTTPError as error:
            status = 0 if error.response is None else error.response.status_code
            failure = f"HTTP status {status}"
            if 400 <= status < 500 and status not in (408, 429):
                break
        except requests.exceptions.Timeout:
            failure = "timed out"
        except requests.exceptions.ChunkedEncodingError:
            failure = "the connection broke off before the end of the file"
        except requests.exceptions.ConnectionError:
            failure = "no connection"
        except (requests.exceptions.RequestException, OSError) as error:
            raise _DownloadError(" ".join(str(error).split())[:120]) from None
        else:
            content = buffer.getvalue()
            if blob_id is None or git_blob_id(content) == blob_id:
                return content
            failure = f"checksum does not match: git blob id {git_blob_id(content)}, not {blob_id}"
    raise _DownloadError(failure)


def _store(path: Path, contents: Mapping[str, bytes], source: Source, dataset: Dataset) -> None:
    """Put a verified data set into the cache: all of it, or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if source.blob_id is not None:
                file.write(contents[Path(source.files[0]).name])
            else:
                np.savez_compressed(file, **to_uniform(dataset))
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error.strerror}); the download is not cached",
            DataWarning,
            stacklevel=4,
        )
