"""Files of a local disk: durable by fsync, and exclusive by hard links."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.failpoints import failpoint
from pipeline.core.processes import cores, has_process
from pipeline.storage.base import LIVE, TEMPORARY, Entry, Storage, sha256
from pipeline.storage.urls import explained

# Temporary files of another machine are deleted after a day.
GIVEN_UP_SECONDS = 86_400


@contextmanager
def temporary_folder(what: str = "a temporary folder") -> Iterator[Path]:
    """Yield a new folder in TMPDIR, which is removed afterwards; ``what`` names it in the message of an error.

    Raises:
        StorageError: it cannot be made.
    """
    with explained(f"{what} (TMPDIR)"):
        made = tempfile.TemporaryDirectory(prefix="clip-pipeline-")
    with made as folder:
        yield Path(folder)


class LocalStorage(Storage):
    """A folder on a local disk; hard links make ``create_once`` atomic."""

    def __init__(self, url: str) -> None:
        super().__init__(str(Path(os.path.expanduser(url))))
        self.root = Path(self.url).absolute()

    @property
    def remote(self) -> bool:
        """See :attr:`Storage.remote`."""
        return False

    @property
    def threads(self) -> int:
        """See :attr:`Storage.threads`; digests are bound by the cores."""
        return cores()

    def make(self) -> None:
        """Create the folder if it does not exist."""
        with explained(self.url):
            self.root.mkdir(parents=True, exist_ok=True)

    def _temporary(self) -> Path:
        self.make()
        return self.root / f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"

    def adopt(self, path: Path, name: str, *, replace: bool) -> None:
        """See :meth:`Storage.adopt`."""
        target = self.root / name
        with explained(str(path)):
            size = path.stat().st_size
        with explained(str(target), needed=size):
            self._flush(path, target)
            if not replace and (self._link(path, target) or sha256(target) == sha256(path)):
                return
            path.replace(target)
            failpoint("storage.replaced", name)
            sync(target.parent)
            failpoint("storage.durable", name)

    def create_once(self, name: str, data: bytes) -> bool:
        """See :meth:`Storage.create_once`."""
        target = self.root / name
        with explained(str(target), needed=len(data)), self.staged() as staged:
            staged.path.write_bytes(data)
            self._flush(staged.path, target)
            return self._link(staged.path, target)

    def _flush(self, path: Path, target: Path) -> None:
        """Make the bytes durable, and the folder of the target."""
        name = str(target.relative_to(self.root))
        failpoint("storage.staged", name)
        sync(path)
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            sync(self.root)
        failpoint("storage.synced", name)

    def _link(self, path: Path, target: Path) -> bool:
        """Give the file its name, unless the name exists."""
        try:
            os.link(path, target)
        except FileExistsError:
            # A network file system may have lost the reply to a link that it made.
            if not os.path.samefile(path, target):
                return False
        failpoint("storage.linked", str(target.relative_to(self.root)))
        sync(target.parent)
        failpoint("storage.durable", str(target.relative_to(self.root)))
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

    def proven(self, name: str) -> str | None:
        """See :meth:`Storage.proven`; a local disk keeps no checksums."""
        return None

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """See :meth:`Storage.entries`."""
        with explained(str(self.root / folder)):
            return dict(self._entries(self.root / folder))

    def _entries(self, folder: Path) -> Iterator[tuple[str, Entry]]:
        try:
            found = list(os.scandir(folder))
        except FileNotFoundError:
            return
        for entry in found:
            # Temporary files of other threads may have disappeared since the listing.
            with suppress(FileNotFoundError):
                if entry.is_file():
                    status = entry.stat()
                    yield entry.name, Entry(size=status.st_size, modified=status.st_mtime)

    def folders(self) -> list[str]:
        """See :meth:`Storage.folders`."""
        with explained(self.url):
            return sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []

    def size(self, name: str) -> int | None:
        """See :meth:`Storage.size`."""
        path = self.root / name
        with explained(str(path)), suppress(FileNotFoundError):
            return path.stat().st_size if path.is_file() else None
        return None

    def remove(self, name: str) -> None:
        """See :meth:`Storage.remove`."""
        with explained(str(self.root / name)):
            (self.root / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """See :meth:`Storage.sweep`; files of another machine are deleted after a day."""
        for path in self.root.glob(f"{TEMPORARY}*"):
            host, _, number = path.name.removeprefix(TEMPORARY).rpartition("-")[0].rpartition("-")
            here = host == socket.gethostname() and number.isdigit()
            with suppress(FileNotFoundError):
                if path in LIVE or (here and int(number) != os.getpid() and has_process(int(number))):
                    continue
                if here or time.time() - path.stat().st_mtime > GIVEN_UP_SECONDS:
                    path.unlink()


def sync(path: Path) -> None:
    """Make a file's bytes durable, or a new name in a folder, which on POSIX needs an fsync of the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder and all its content durable."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``out`` once its content is flushed; after an error it is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    folder.mkdir()
    try:
        yield folder
        sync_tree(folder)
        # Replaces an empty folder only.
        os.rename(folder, out)
        sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
