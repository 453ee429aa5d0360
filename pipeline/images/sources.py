"""From a reference to encoded bytes, or a failure that names why not.

Relative paths start at the manifest's root, and no path leaves it, symbolic links included. A path may
end in ``#bytes=START-STOP`` to name a range of a file: that is how members of a tar are addressed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from pipeline.addresses import is_local, local_path, scheme_of
from pipeline.errors import StorageError
from pipeline.records import Failure, ImageRef

# What says that the machine is broken, and nothing about the image.
_BROKEN = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
# No more digits than a file offset has.
_RANGE = re.compile(r"#bytes=(\d{1,18})-(\d{1,18})$")


@dataclass(frozen=True, slots=True)
class Source:
    """Where images are read from, and what is refused; safe to use from many threads."""

    root: str
    max_bytes: int
    schemes: tuple[str, ...] = ("file",)
    _real_root: str = field(init=False, default="")
    _systems: dict[str, Any] = field(init=False, default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if is_local(self.root):
            object.__setattr__(self, "_real_root", os.path.realpath(local_path(self.root)))

    def read(self, ref: ImageRef) -> bytes | Failure:
        """The encoded bytes of one image.

        Statuses of a failure: ``no_image`` (a null cell), ``empty``, ``not_found``, ``permission``,
        ``unreadable``, ``too_many_bytes``, ``outside_root``, ``scheme_not_allowed``.

        Raises:
            StorageError: the machine or the store failed, which says nothing about the image.
        """
        if ref.data is not None:
            return self._checked(ref.data, "the manifest's cell")
        if not ref.path:
            return Failure("no_image", "the manifest's cell holds neither bytes nor a path")
        path, start, stop = _split(ref.path)
        if stop is not None and stop < start:
            return Failure("unreadable", f"{ref.path}: the range ends before it starts")
        scheme = scheme_of(path) or scheme_of(self.root) or "file"
        if scheme not in self.schemes and scheme != (scheme_of(self.root) or "file"):
            return Failure("scheme_not_allowed", f"{ref.path}: {scheme} is not among images.schemes")
        try:
            if scheme in ("file", "local"):
                return self._read_local(path, start, stop)
            return self._read_remote(path, start, stop)
        except (FileNotFoundError, NotADirectoryError):
            return Failure("not_found", f"{ref.path}: no such file")
        except PermissionError as error:
            return Failure("permission", f"{ref.path}: {error.strerror or error}")
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, OSError) and (
                error.errno in _BROKEN or isinstance(error, ConnectionError | TimeoutError)
            ):
                raise StorageError(
                    f"{ref.path}: {error}; the machine or the store is at fault, not the image"
                ) from error
            return Failure("unreadable", f"{ref.path}: {error}")

    def _read_local(self, path: str, start: int, stop: int | None) -> bytes | Failure:
        real = os.path.realpath(Path(self._real_root or ".") / local_path(path))
        if not self._real_root or os.path.commonpath([real, self._real_root]) != self._real_root:
            return Failure("outside_root", f"{path}: leads out of manifest.root ({self.root})")
        with open(real, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return Failure("unreadable", f"{path}: not a regular file")
            length = (status.st_size if stop is None else stop) - start
            if length > self.max_bytes:
                return self._too_large(path, length)
            file.seek(start)
            return self._checked(file.read(length), path)

    def _read_remote(self, path: str, start: int, stop: int | None) -> bytes | Failure:
        if not scheme_of(path):
            path = f"{self.root}{path}" if self.root.endswith("/") else f"{self.root}/{path}"
        scheme = scheme_of(path)
        # One connection for each host or bucket.
        host = path.split("/")[2]
        fs = self._systems.get(f"{scheme}://{host}")
        if fs is None:
            fs = self._systems[f"{scheme}://{host}"] = url_to_fs(path)[0]
        name = fs._strip_protocol(path)
        if scheme == scheme_of(self.root):
            base = fs._strip_protocol(self.root).rstrip("/")
            if ".." in name.split("/") or not name.startswith(base + "/"):
                return Failure("outside_root", f"{path}: leads out of manifest.root ({self.root})")
        length = (int(fs.size(name) or 0) if stop is None else stop) - start
        if length > self.max_bytes:
            return self._too_large(path, length)
        return self._checked(fs.cat_file(name, start=start, end=stop), path)

    def _checked(self, data: bytes, place: str) -> bytes | Failure:
        if not data:
            return Failure("empty", f"{place}: 0 bytes")
        return self._too_large(place, len(data)) if len(data) > self.max_bytes else data

    def _too_large(self, place: str, size: int) -> Failure:
        return Failure("too_many_bytes", f"{place}: {size:,} bytes, over images.max_bytes={self.max_bytes:,}")


def _open_without_waiting(path: str, flags: int) -> int:
    """Open for :func:`open`, so that a named pipe among the photos cannot hang the run."""
    return os.open(path, flags | os.O_NONBLOCK)


def _split(path: str) -> tuple[str, int, int | None]:
    match = _RANGE.search(path)
    if match is None:
        return path, 0, None
    return path[: match.start()], int(match[1]), int(match[2])
