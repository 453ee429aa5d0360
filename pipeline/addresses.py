"""Addresses: plain paths and fsspec URLs, how to open them, and what to say when that fails."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import StorageError


def is_local(url: str) -> bool:
    """Whether ``url`` is a path of this machine (``file://`` included)."""
    return scheme_of(url) in ("", "file", "local")


def scheme_of(url: str) -> str:
    """The part before ``://``, or an empty string for a plain path."""
    return url.split("://", 1)[0].lower() if "://" in url else ""


def local_path(url: str) -> str:
    """A plain path for a local address."""
    return url.split("://", 1)[1] if "://" in url else url


def open_file(url: str) -> Any:
    """A seekable binary file at a path or fsspec address."""
    with explained(url):
        return Path(local_path(url)).open("rb") if is_local(url) else fsspec.open(url, "rb").open()


def open_arrow(url: str) -> Any:
    """A file for Arrow to read: a local one without going through Python."""
    if not is_local(url):
        return open_file(url)
    import pyarrow as pa

    with explained(url):
        return pa.OSFile(local_path(url), "rb")


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what the operating system says into an error that names the place and the way out."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{place}: no such file or folder") from error
    except PermissionError as error:
        hint = "check the permissions, or choose another place"
        if error.errno == errno.EPERM:
            hint = "the file system may lack hard links, which the commits need; choose another disk"
        raise StorageError(f"{place}: {error.strerror or error}; {hint}") from error
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "; free some space and run the same command again, finished shards are kept"
        raise StorageError(f"{place}: {error.strerror or error}{hint}") from error
    except ImportError as error:
        raise StorageError(f"{place}: {error}; install the fsspec driver for this address") from error
