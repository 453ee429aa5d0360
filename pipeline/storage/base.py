"""Files of an output or a cache, on a local disk or in an object store, behind one small interface.

Files are published atomically: written under a temporary name, flushed, then renamed. Correctness rests on
``create_once`` alone: of several writers of a name exactly one succeeds, and its bytes are complete.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.storage.urls import explained

TEMPORARY = "_tmp-"
# Temporary files that this process is writing.
LIVE: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a storage: its size in bytes, and its time of writing, in seconds since the epoch."""

    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Staged:
    """A private file that is not published yet; write to ``path``, then call ``publish``."""

    path: Path
    storage: Storage

    def publish(self, name: str, *, replace: bool = False) -> None:
        """Give the file its name, whole and flushed; without ``replace``, a file of the same content stays."""
        self.storage.adopt(self.path, name, replace=replace)


class Storage(ABC):
    """A folder of files, addressed by names relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    @abstractmethod
    def remote(self) -> bool:
        """True if every access to a file is a network request."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """The number of files to read at a time."""

    @contextmanager
    def staged(self) -> Iterator[Staged]:
        """A temporary local file for one ``publish``; it is removed at the end, published or not."""
        path = self._temporary()
        LIVE.add(path)
        try:
            yield Staged(path=path, storage=self)
        finally:
            path.unlink(missing_ok=True)
            LIVE.discard(path)

    def write(self, name: str, data: bytes) -> None:
        """Publish ``data`` as ``name``, replacing a file of that name."""
        with explained(f"{self.url}/{name}", needed=len(data)), self.staged() as staged:
            staged.path.write_bytes(data)
            staged.publish(name, replace=True)

    @abstractmethod
    def _temporary(self) -> Path: ...

    @abstractmethod
    def adopt(self, path: Path, name: str, *, replace: bool) -> None:
        """Publish the local file ``path`` under ``name``.

        Without ``replace`` the name holds the content's digest, so an existing file is the same, or damaged, and then
        it is replaced.
        """

    @abstractmethod
    def create_once(self, name: str, data: bytes) -> bool:
        """Publish ``data`` unless ``name`` exists; True for the one writer that created it."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The bytes of ``name``, or None if there is no such file."""

    @abstractmethod
    def digest(self, name: str) -> str | None:
        """The SHA-256 of ``name`` in hex, read in blocks, or None if there is no such file."""

    @abstractmethod
    def proven(self, name: str) -> str | None:
        """The SHA-256 of ``name`` in hex, as the storage itself verified and kept it; the bytes are not read.

        None if there is no such file, or no such checksum: then use :meth:`digest`.
        """

    @abstractmethod
    def entries(self, folder: str = "") -> dict[str, Entry]:
        """The files directly in ``folder``, by name."""

    @abstractmethod
    def folders(self) -> list[str]:
        """The folders directly in the storage, by name."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Names and sizes in bytes of the files directly in ``folder``."""
        return {name: entry.size for name, entry in self.entries(folder).items()}

    @abstractmethod
    def size(self, name: str) -> int | None:
        """The bytes of a file, or None if there is no such file."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete ``name``, if it exists."""

    def sweep(self) -> None:
        """Delete the temporary files of writers that have ended."""
        return


def sha256(path: Path) -> str:
    """Hex digest of a local file."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Hex digest of the rest of an open file, read in blocks."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
