"""Files of an object store, or of any other file system that fsspec knows."""

from __future__ import annotations

import tempfile
import threading
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from pipeline.addresses import explained
from pipeline.failpoints import failpoint
from pipeline.storage.base import TEMPORARY, Entry, Storage, sha256, sha256_of

_CREATING = threading.Lock()


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
                failpoint("object.put", name)
                self.fs.put_file(str(path), target)

    def create_once(self, name: str, data: bytes) -> bool:
        """See :meth:`Storage.create_once`; conditional put where the store has it (S3)."""
        # Other stores look first and write later; the lock keeps at least the threads of this process apart.
        with _CREATING, explained(f"{self.url}/{name}"):
            try:
                self.fs.pipe_file(f"{self.root}/{name}", data, mode="create")
            except FileExistsError:
                return False
            failpoint("object.created", name)
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
            return sha256_of(file)
        return None

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """See :meth:`Storage.entries`."""
        path = f"{self.root}/{folder}".rstrip("/")
        self.fs.invalidate_cache(path)
        with explained(path):
            try:
                found = self.fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        return {
            entry["name"].rsplit("/", 1)[-1]: Entry(size=int(entry["size"]), modified=_seconds(entry))
            for entry in found
            if entry["type"] == "file"
        }

    def remove(self, name: str) -> None:
        """See :meth:`Storage.remove`."""
        with explained(f"{self.url}/{name}"):
            try:
                self.fs.rm_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return


def _seconds(entry: dict[str, Any]) -> float:
    """When an object was written; file systems call it differently, and 0 stands for one that does not say."""
    for key in ("LastModified", "mtime", "created", "modified", "updated"):
        value = entry.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
