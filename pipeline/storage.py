"""Files of an output or a cache, on a local disk or in an object store, behind one small interface.

Everything that counts is published whole or not at all: written under a temporary name, flushed, then
given its real name. ``create_once`` is the one primitive on which correctness rests: of several
writers of a name exactly one succeeds, and its bytes are complete.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from pipeline.addresses import explained, is_local, local_path

TEMPORARY = "_tmp-"
_CREATING = threading.Lock()
GIVEN_UP_SECONDS = 86_400
# What this process is writing just now.
_LIVE: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Staged:
    """A private file that is not published yet; write to ``path``, then call ``publish``."""

    path: Path
    storage: Storage

    def publish(self, name: str, *, replace: bool = False) -> None:
        """Give the file its name, whole and flushed; without ``replace``, a file of the same content stays."""
        with explained(str(self.path)), self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.storage.adopt(self.path, name, replace=replace)


class Storage(ABC):
    """A folder of files, addressed by names relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    @contextmanager
    def staged(self) -> Iterator[Staged]:
        """A temporary local file for one ``publish``; it is gone afterwards, published or not."""
        path = self._temporary()
        _LIVE.add(path)
        try:
            yield Staged(path=path, storage=self)
        finally:
            path.unlink(missing_ok=True)
            _LIVE.discard(path)

    def write(self, name: str, data: bytes) -> None:
        """Publish ``data`` as ``name``, replacing what was there."""
        with explained(f"{self.url}/{name}"), self.staged() as staged:
            staged.path.write_bytes(data)
            staged.publish(name, replace=True)

    @abstractmethod
    def _temporary(self) -> Path: ...

    @abstractmethod
    def adopt(self, path: Path, name: str, *, replace: bool) -> None:
        """Publish the flushed local file ``path`` under ``name``.

        Without ``replace`` the name holds the content's digest, so a file that is there already is the same,
        or damaged, and then it is replaced.
        """

    @abstractmethod
    def create_once(self, name: str, data: bytes) -> bool:
        """Publish ``data`` unless ``name`` exists; True for the one writer that made it."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The bytes of ``name``, or None if there is no such file."""

    @abstractmethod
    def digest(self, name: str) -> str | None:
        """The SHA-256 of ``name`` in hex, read in blocks, or None if there is no such file."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Names and sizes in bytes of the files directly in ``folder``."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete ``name``; nothing happens if it is gone already."""

    def sweep(self) -> None:
        """Delete what writers that are no more left under temporary names."""
        return


class LocalStorage(Storage):
    """A folder on a local disk; hard links make ``create_once`` atomic."""

    def __init__(self, url: str) -> None:
        super().__init__(str(Path(url).expanduser()))
        self.root = Path(self.url).absolute()

    def make(self) -> None:
        """Create the folder if it is not there."""
        with explained(self.url):
            self.root.mkdir(parents=True, exist_ok=True)

    def _temporary(self) -> Path:
        self.make()
        return self.root / f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"

    def adopt(self, path: Path, name: str, *, replace: bool) -> None:
        """See :meth:`Storage.adopt`."""
        target = self.root / name
        with explained(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not replace:
                with suppress(FileExistsError):
                    os.link(path, target)
                    sync(target.parent)
                    return
                if sha256(target) == sha256(path):
                    return
            path.replace(target)
            sync(target.parent)

    def create_once(self, name: str, data: bytes) -> bool:
        """See :meth:`Storage.create_once`."""
        target = self.root / name
        with explained(str(target)), self.staged() as staged:
            with staged.path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(staged.path, target)
            except FileExistsError:
                return False
            sync(target.parent)
            return True

    def read(self, name: str) -> bytes | None:
        """See :meth:`Storage.read`."""
        with explained(str(self.root / name)):
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                return None

    def digest(self, name: str) -> str | None:
        """See :meth:`Storage.digest`."""
        with explained(str(self.root / name)), suppress(FileNotFoundError):
            return sha256(self.root / name)
        return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """See :meth:`Storage.sizes`."""
        with explained(str(self.root / folder)):
            try:
                with os.scandir(self.root / folder) as entries:
                    return {e.name: e.stat().st_size for e in entries if e.is_file()}
            except FileNotFoundError:
                return {}

    def remove(self, name: str) -> None:
        """See :meth:`Storage.remove`."""
        with explained(str(self.root / name)):
            (self.root / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """See :meth:`Storage.sweep`; a writer on another machine is given up after a day."""
        for path in self.root.glob(f"{TEMPORARY}*"):
            host, _, number = path.name.removeprefix(TEMPORARY).rpartition("-")[0].rpartition("-")
            here = host == socket.gethostname() and number.isdigit()
            with suppress(FileNotFoundError):
                if path in _LIVE or (here and _alive(int(number))):
                    continue
                if here or time.time() - path.stat().st_mtime > GIVEN_UP_SECONDS:
                    path.unlink()


class ObjectStorage(Storage):
    """A prefix of an object store (or any other fsspec file system); uploads are whole by nature."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fs: Any
        self.fs, root = url_to_fs(url)
        self.root = root.rstrip("/")

    def _temporary(self) -> Path:
        return Path(tempfile.gettempdir()) / f"{TEMPORARY}{uuid.uuid4().hex}"

    def adopt(self, path: Path, name: str, *, replace: bool) -> None:
        """See :meth:`Storage.adopt`."""
        target = f"{self.root}/{name}"
        with explained(f"{self.url}/{name}"):
            if replace or self.digest(name) != sha256(path):
                self.fs.put_file(str(path), target)

    def create_once(self, name: str, data: bytes) -> bool:
        """See :meth:`Storage.create_once`; conditional put where the store has it (S3)."""
        # Other stores look first and write later; the lock keeps at least the threads of this process apart.
        with _CREATING, explained(f"{self.url}/{name}"):
            try:
                self.fs.pipe_file(f"{self.root}/{name}", data, mode="create")
            except FileExistsError:
                return False
            return True

    def read(self, name: str) -> bytes | None:
        """See :meth:`Storage.read`."""
        with explained(f"{self.url}/{name}"):
            try:
                data: bytes = self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None
            return data

    def digest(self, name: str) -> str | None:
        """See :meth:`Storage.digest`."""
        with (
            explained(f"{self.url}/{name}"),
            suppress(FileNotFoundError),
            self.fs.open(f"{self.root}/{name}", "rb") as file,
        ):
            return _sha256(file)
        return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """See :meth:`Storage.sizes`."""
        path = f"{self.root}/{folder}".rstrip("/")
        self.fs.invalidate_cache(path)
        with explained(path):
            try:
                entries = self.fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        return {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}

    def remove(self, name: str) -> None:
        """See :meth:`Storage.remove`."""
        with explained(f"{self.url}/{name}"):
            try:
                self.fs.rm_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return


def open_storage(url: str) -> Storage:
    """The storage at a local path or an fsspec address such as ``s3://bucket/prefix``."""
    return LocalStorage(local_path(url)) if is_local(url) else ObjectStorage(url)


def sha256(path: Path) -> str:
    """Hex digest of a local file."""
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _alive(process: int) -> bool:
    """Whether another process of this machine has the number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Make a file's bytes, or a new name in a folder, durable: on POSIX the second takes an fsync of the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
