"""Addresses: plain paths and fsspec URLs, opening them, and error messages."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from fsspec.core import url_to_fs

from pipeline.core.errors import StorageError, install_hint

# Packages whose own errors are raised where a store cannot be reached.
DRIVERS = ("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "s3fs")
NO_LINKS = "the file system may lack hard links, which the commits need; choose another disk"
# The prefix of a local address; only an absolute path may have a host, which is this machine.
_FILE = re.compile(r"file:(//localhost(?=/)|//)?", re.IGNORECASE)
# The path of a URI: a raw path with other characters, or with a percent sign that begins no escape, is none.
_URI = re.compile(r"(?:[!#$&-;=?-Z\[\]_a-z~]|%[0-9A-Fa-f]{2})*")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def is_local(url: str) -> bool:
    """True if ``url`` is a path of this machine (``file:`` in all its forms included)."""
    return scheme_of(url) in ("", "file", "local")


def scheme_of(url: str) -> str:
    """The part before ``://``, ``file`` for ``file:``, or an empty string for a plain path."""
    if _FILE.match(url):
        return "file"
    return url.split("://", 1)[0].lower() if "://" in url else ""


def local_path(url: str) -> str:
    """A plain path for a local address.

    ``file:/a``, ``file:///a`` and ``file://localhost/a`` are one place. Percent escapes of an absolute address are
    decoded, as ``Path.as_uri`` writes them. Many tools put ``file://`` before a raw path instead: so is read what holds
    characters that a URI encodes, or what names a file only as it stands. In a plain path a percent sign stays one.
    """
    found = _FILE.match(url)
    if found is None:
        return url.split("://", 1)[1] if "://" in url else url
    raw = url[found.end() :]
    if "%" not in raw or not raw.startswith("/"):
        return raw
    decoded = os.fsdecode(unquote_to_bytes(os.fsencode(raw)))
    likely = (decoded, raw) if _URI.fullmatch(raw) and "\0" not in decoded else (raw, decoded)
    return next(filter(os.path.lexists, likely), likely[0])


def local_file(url: str) -> Path:
    """The path of a local address, with ``~`` for the home folder; of an unknown user it stays as it is."""
    return Path(os.path.expanduser(local_path(url)))


def is_s3(url: str) -> bool:
    """True if ``url`` is in S3 or a compatible store."""
    return scheme_of(url) in ("s3", "s3a")


def from_here(url: str) -> str:
    """The folder where a relative local path starts, as part of an error message."""
    relative = is_local(url) and not os.path.isabs(os.path.expanduser(local_path(url)))
    return f"; relative paths start at {os.getcwd()}" if relative else ""


def no_driver(url: str, error: ImportError) -> str:
    """The command that installs the missing fsspec driver of an address."""
    if is_s3(url):
        return f"S3 needs s3fs: {install_hint('s3')}"
    return f"{error}; install the fsspec driver for this address"


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the address's path in it."""
    if is_local(url):
        # fsspec decodes no percent escapes.
        url = local_path(url)
    # s3fs would take size and ETag from an earlier listing of this process.
    fs, path = url_to_fs(url, **({"use_listings_cache": False} if is_s3(url) else {}))
    return fs, path


def from_driver(error: Exception) -> bool:
    """True for an error of a store's driver: missing credentials, a host that does not answer."""
    return type(error).__module__.partition(".")[0] in DRIVERS


def open_file(url: str) -> Any:
    """A seekable binary file at a path or fsspec address."""
    with explained(url):
        if is_local(url):
            return Path(local_path(url)).open("rb")
        fs, path = filesystem(url)
        return fs.open(path, "rb")


def open_arrow(url: str) -> Any:
    """A file for Arrow to read, without a cache: Arrow asks for a part of a column at a time.

    A driver's cache reads on behind each part, and drops what it has read when another column comes, so that most bytes
    would be read twice. A local file is read without Python.
    """
    with explained(url):
        if is_local(url):
            import pyarrow as pa

            return pa.OSFile(local_path(url), "rb")
        fs, path = filesystem(url)
        # The drivers that keep files on disk choose the cache of the driver below.
        return fs.open(path, "rb", **({} if "::" in url else {"cache_type": "none"}))


@contextmanager
def explained(place: str, *, needed: int | None = None) -> Iterator[None]:
    """Turn errors of the operating system or a store into a StorageError with the place and the way out.

    ``needed`` is the approximate number of bytes to be written; the message of a full disk compares it with the free
    space.
    """
    try:
        yield
    except FileNotFoundError as error:
        # A missing bucket needs another remedy than a missing file.
        text = str(error) if "bucket does not exist" in str(error) else "no such file or folder"
        raise StorageError(f"{place}: {text}") from error
    except PermissionError as error:
        hint = "check the permissions, or choose another place"
        if error.errno == errno.EPERM:
            hint = NO_LINKS
        raise StorageError(f"{place}: {error.strerror or error}{_wanted(needed)}; {hint}") from error
    except ImportError as error:
        raise StorageError(f"{place}: {no_driver(place, error)}") from error
    except Exception as error:
        if isinstance(error, OSError):
            # Arrow words these errors differently.
            said = os.strerror(error.errno) if error.errno in _FULL else error.strerror or error or type(error).__name__
            text = f"{said}{_way_out(error.errno, place, needed)}"
        elif from_driver(error):
            text = f"{error}; check the address, the credentials and the network, and run the same command again"
        else:
            raise
        raise StorageError(f"{place}: {text}") from error


def _way_out(number: int | None, place: str, needed: int | None) -> str:
    """The remedy for an error of the operating system; for a full disk with the needed and the free space."""
    again = "and run the same command again, finished shards are kept"
    free = None
    if number == errno.EFBIG:
        hint = f"raise the limit on the size of files (ulimit -f) {again}"
    elif number in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(place) if is_local(place) else None
        hint = f"free some space {again}"
    elif number in (errno.ENOTDIR, errno.EEXIST):
        return "; a file stands where a folder is wanted: choose another place"
    elif number == errno.EROFS:
        hint = f"choose another place, or have it mounted for writing {again}"
    elif number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
        hint = NO_LINKS
    elif not is_local(place):
        return "; when the store is well, run the same command again: finished shards are kept"
    else:
        return ""
    return f"{_wanted(needed, free)}; {hint}"


def _wanted(needed: int | None, free: int | None = None) -> str:
    """The bytes to be written and the free space, as far as known."""
    figures = [f"about {_size(needed)} to be written"] if needed is not None else []
    figures += [f"{_size(free)} free"] if free is not None else []
    return f" ({', '.join(figures)})" if figures else ""


def free_bytes(place: str) -> int | None:
    """Free bytes for this user on the disk of a local place, which need not exist yet."""
    path = Path(local_path(place)).absolute()
    for folder in (path, *path.parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return None


def _size(count: int) -> str:
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1e6:,.2f} MB"


def within(place: str, folder: str) -> bool:
    """True if an address is a folder or within it, at any depth; links on this machine are followed.

    Readers of a dataset take every Parquet file below its folder for a part of it.
    """
    inner, outer = (os.path.realpath(local_path(each)) if is_local(each) else each for each in (place, folder))
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")
