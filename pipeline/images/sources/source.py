"""Encoded bytes of an image reference, or a failure with the reason.

Relative paths start at the manifest's root, and no path leaves it, symbolic links included; a hard link looks like the
file itself. A path may end in ``#bytes=START-STOP`` to name a range of a file, such as a member of a tar. A row
never chooses the settings of a driver, and chained addresses are not read.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from pipeline.config.validate import WRAPPERS
from pipeline.core.errors import StorageError
from pipeline.core.records import Failure, ImageRef
from pipeline.images.sources.beneath import Folder
from pipeline.images.sources.cell_text import SHOWN, describe, too_long
from pipeline.images.sources.http import SCHEMES, Fetcher
from pipeline.storage.urls import filesystem, from_driver, is_local, local_path, no_driver, scheme_of

# Errors of the machine, not of the image.
_BROKEN = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
# No more digits than a file offset has.
_RANGE = re.compile(r"#bytes=(\d{1,18})-(\d{1,18})$")
# The key of the root among the opened systems; no scheme has a space.
_FOLDER = "the root"
# The folder in which Linux lists the file of each descriptor.
_DESCRIPTORS = "/proc/self/fd"


@dataclass(frozen=True, slots=True)
class Source:
    """Source of image bytes, with its limits; safe to use from many threads."""

    root: str
    max_bytes: int
    schemes: tuple[str, ...] = ("file",)
    private_hosts: tuple[str, ...] = ()
    read_seconds: float = 30.0
    _real_root: str = field(init=False, default="")
    _systems: dict[str, Any] = field(init=False, default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if is_local(self.root):
            object.__setattr__(self, "_real_root", os.path.realpath(local_path(self.root)))

    def read(self, ref: ImageRef) -> bytes | Failure:
        """The encoded bytes of one image.

        Statuses of a failure: ``no_image`` (a null cell), ``empty``, ``not_found``, ``permission``,
        ``unreadable``, ``too_many_bytes``, ``outside_root``, ``scheme_not_allowed``; of http and https also
        ``address_not_allowed`` and ``timeout``, see :class:`~pipeline.images.sources.http.Fetcher`.

        Raises:
            StorageError: the machine, the store or the network failed, which says nothing about the image.
        """
        if ref.failure is not None:
            return ref.failure
        if ref.data is not None:
            return self._checked(ref.data, "the manifest's cell")
        if not ref.path:
            return Failure("no_image", "the manifest's cell holds neither bytes nor a path")
        if held := describe(ref.path):
            return Failure("unreadable", held)
        path, start, stop = split_range(ref.path)
        if stop is not None and stop < start:
            return Failure("unreadable", f"{ref.path}: the range ends before it starts")
        own = scheme_of(self.root) or "file"
        scheme = scheme_of(path) or own
        if scheme != own and scheme not in self.schemes:
            return Failure("scheme_not_allowed", f"{ref.path}: {scheme} is not among images.schemes")
        if scheme in SCHEMES:
            return self._read_web(path, start, stop)
        try:
            if scheme in ("file", "local"):
                return self._read_local(path, start, stop)
            return self._read_remote(scheme, path, start, stop)
        except (FileNotFoundError, NotADirectoryError):
            return Failure("not_found", describe(ref.path, missing=True) or f"{ref.path}: no such file")
        except PermissionError as error:
            return Failure("permission", f"{ref.path}: {error.strerror or error}")
        except ImportError as error:
            # The machine lacks the driver for every row of this scheme.
            raise StorageError(f"{scheme}:// addresses cannot be read: {no_driver(path, error)}") from error
        except Exception as error:
            broken = isinstance(error, ConnectionError | TimeoutError) or from_driver(error)
            if broken or (isinstance(error, OSError) and error.errno in _BROKEN):
                raise StorageError(
                    f"{ref.path}: {error}; the machine or the store is at fault, not the image"
                ) from error
            if not isinstance(error, OSError | ValueError):
                raise
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                shown = f"{ref.path}: {error.strerror}" if len(ref.path) <= SHOWN else too_long(ref.path)
                return Failure("unreadable", shown)
            return Failure("unreadable", f"{ref.path}: {error}")

    def _read_web(self, path: str, start: int, stop: int | None) -> bytes | Failure:
        url = path if scheme_of(path) else f"{self.root.rstrip('/')}/{path}"
        # A root at an http address is allowed as any root is, and holds its rows as any root does.
        below = url.startswith(f"{self.root.rstrip('/')}/") and not _climbs(url.split("?", 1)[0])
        if not below and (not scheme_of(path) or scheme_of(path) not in self.schemes):
            return self._outside(path)
        fetcher = self._systems.get("http")
        if fetcher is None:
            made = Fetcher(
                max_bytes=self.max_bytes,
                seconds=self.read_seconds,
                schemes=tuple({*self.schemes, scheme_of(self.root)}),
                private_hosts=self.private_hosts,
            )
            fetcher = self._systems.setdefault("http", made)
        found: bytes | Failure = fetcher.fetch(url, start, stop)
        return found

    def _read_local(self, path: str, start: int, stop: int | None) -> bytes | Failure:
        folder = self._systems.get(_FOLDER)
        if folder is None:
            names = [local_path(self.root)] if self._real_root else []
            folder = self._systems.setdefault(_FOLDER, Folder(self._real_root, *names))
        data: bytes | None = folder.read(path, start, stop, self.max_bytes)
        return data if data is not None else self._read_anywhere(path, start, stop)

    def _read_anywhere(self, path: str, start: int, stop: int | None) -> bytes | Failure:
        root = Path(self._real_root or ".")
        # A relative path may begin with the letters of an address.
        name = path if path.startswith("file:") and (root / path).is_file() else local_path(path)
        real = os.path.realpath(root / name)
        if not self._holds(real):
            return self._outside(path)
        # A device is not even opened: that alone can do something.
        if not stat.S_ISREG(os.lstat(real).st_mode):
            return Failure("unreadable", f"{path}: not a regular file")
        with open(real, "rb", opener=_open_exactly) as file:
            # A folder on the way may have become a link since; the descriptor cannot.
            if not self._holds(_name_of(file.fileno(), real)):
                return self._outside(path)
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return Failure("unreadable", f"{path}: not a regular file")
            length = (status.st_size if stop is None else stop) - start
            if length > self.max_bytes:
                return self._too_large(path, length)
            file.seek(start)
            # No more than the size of the file: those in /proc report none, and some never end.
            return self._checked(file.read(max(0, min(length, status.st_size - start))) or b"", path)

    def _holds(self, real: str) -> bool:
        return bool(self._real_root) and os.path.commonpath([real, self._real_root]) == self._real_root

    def _outside(self, path: str) -> Failure:
        return Failure("outside_root", f"{path}: leads out of manifest.root ({self.root})")

    def _read_remote(self, scheme: str, path: str, start: int, stop: int | None) -> bytes | Failure:
        found = self._systems.get(scheme)
        if found is None:
            found = self._systems.setdefault(scheme, self._open_system(scheme))
        fs, base = found
        if scheme == scheme_of(self.root):
            name = fs._strip_protocol(path) if scheme_of(path) else f"{base.rstrip('/')}/{path}"
            # The host of a server is no part of the name.
            elsewhere = scheme_of(path) and _server(self.root) not in ("", _server(path))
            if elsewhere or _climbs(name) or not name.startswith(f"{base.rstrip('/')}/"):
                return self._outside(path)
        elif "::" in path:
            return Failure("scheme_not_allowed", f"{path}: chains of addresses are not read")
        else:
            name = fs._strip_protocol(path)
        length = (int(fs.size(name) or 0) if stop is None else stop) - start
        if length > self.max_bytes:
            return self._too_large(path, length)
        return self._checked(fs.cat_file(name, start=start, end=stop), path)

    def _open_system(self, scheme: str) -> tuple[Any, str]:
        """The driver and its path of the root, with the settings of the root; other schemes have no settings."""
        if scheme == scheme_of(self.root):
            return filesystem(self.root)
        if scheme in WRAPPERS:
            raise ValueError(f"{scheme} reads through other drivers, and a row does not choose those")
        try:
            return fsspec.filesystem(scheme), ""
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{scheme} is read as the scheme of manifest.root alone ({error})") from error

    def _checked(self, data: bytes, place: str) -> bytes | Failure:
        if not data:
            return Failure("empty", f"{place}: 0 bytes")
        return self._too_large(place, len(data)) if len(data) > self.max_bytes else data

    def _too_large(self, place: str, size: int) -> Failure:
        return Failure("too_many_bytes", f"{place}: {size:,} bytes, over images.max_bytes={self.max_bytes:,}")


def _open_exactly(path: str, flags: int) -> int:
    """Open for :func:`open`: no link in the last place, and a named pipe among the photos cannot hang the run."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def _name_of(descriptor: int, opened: str) -> str:
    """Real path of an open file; its resolved name where the system does not report one."""
    try:
        return os.readlink(f"{_DESCRIPTORS}/{descriptor}")
    except OSError:
        return os.path.realpath(opened)


def _climbs(name: str) -> bool:
    """True if ``..`` is a part of a name in any encoding: some stores read %2e as a dot."""
    return ".." in re.split(r"[/\\]", unquote(unquote(name)))


def _server(url: str) -> str:
    """The part between the scheme and the first slash."""
    return url.split("://", 1)[1].split("/", 1)[0].split("::", 1)[0]


def split_range(path: str) -> tuple[str, int, int | None]:
    """The path of the file, the first byte, and the byte behind the last one; None for the end of the file."""
    match = _RANGE.search(path)
    if match is None:
        return path, 0, None
    return path[: match.start()], int(match[1]), int(match[2])
