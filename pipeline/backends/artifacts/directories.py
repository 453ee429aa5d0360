"""Local disk operations of the store: locks between processes, listings, temporary folders, deletion."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import StorageError
from pipeline.storage.local import GIVEN_UP_SECONDS
from pipeline.storage.urls import explained

# Errors of file systems without locks (Lustre without -o flock, some NFS mounts).
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NAME = re.compile(r"([0-9a-f]{64})(\.lock|\.tmp-.*)?")
log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path`` and remove it afterwards; yields False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is false.
        StorageError: the file cannot be created or locked.
    """
    descriptor, held = _acquire(path, wait)
    try:
        yield held
    finally:
        # Removed while the lock is held: a waiting process detects that its file was removed, and creates a new one.
        with suppress(OSError):
            if _has_name(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, wait: bool) -> tuple[int, bool]:
    while True:
        with explained(str(path)):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            held = _flock(descriptor, path, wait)
            if not held or _has_name(descriptor, path):
                return descriptor, held
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, path: Path, wait: bool) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            log.info("%s: another process exports this artefact; waiting for it", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in LOCKLESS:
            return False
        if isinstance(error, BlockingIOError):
            raise
        hint = "check its permissions, or name another folder with backend.artifacts"
        raise StorageError(f"{path}: cannot be locked ({error.strerror}); {hint}") from error
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def contents(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Return the plain files below ``folder`` with their sizes, and a line for every entry of another kind.

    Links are not followed. Names are relative, with ``/``.

    Raises:
        OSError: a folder cannot be listed.
    """
    sizes: dict[str, int] = {}
    odd: list[str] = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_symlink():
                    odd.append(f"{name}: a link to {os.readlink(entry.path)}; an artefact holds plain files only")
                elif entry.is_dir():
                    pending.append(Path(entry.path))
                elif entry.is_file():
                    sizes[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    odd.append(f"{name}: neither a file nor a folder")
    return sizes, sorted(odd)


def discard(path: Path) -> None:
    """Delete a file, a link or a folder; log a warning where that fails."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be removed: %s", path, error)


def fingerprints(root: Path) -> list[str]:
    """Return the fingerprints in the names of ``root``'s entries; other names do not belong to the store.

    Raises:
        StorageError: the folder cannot be listed.
    """
    with explained(str(root)):
        names = os.listdir(root) if root.exists() else []
    return sorted({match[1] for match in map(NAME.fullmatch, names) if match})


def temporary_path(root: Path, fingerprint: str) -> Path:
    """Return a unique path on the disk of the store."""
    return root / f"{fingerprint}.tmp-{socket.gethostname()}-{uuid.uuid4().hex}"


@contextmanager
def fresh(root: Path, fingerprint: str) -> Iterator[Path]:
    """Create a temporary folder, and delete it afterwards unless it was renamed.

    Raises:
        StorageError: it cannot be created, or the disk is full; other errors of the body pass unchanged.
    """
    path = temporary_path(root, fingerprint)
    with explained(str(path)):
        path.mkdir()
    try:
        yield path
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{root}: {error.strerror}; free some space, or use a store on another disk") from error
        raise
    finally:
        discard(path)


def sweep(root: Path, fingerprint: str, *, held: bool) -> None:
    """Delete temporary folders of dead writers: those of this machine if the lock is ``held``.

    Those of other machines, and all on a file system without locks, are deleted after a day.
    """
    for path in root.glob(f"{fingerprint}.tmp-*"):
        here = path.name.removeprefix(f"{fingerprint}.tmp-").rpartition("-")[0] == socket.gethostname()
        with suppress(FileNotFoundError):
            if (held and here) or time.time() - path.lstat().st_mtime > GIVEN_UP_SECONDS:
                discard(path)
