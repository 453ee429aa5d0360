"""Files of an object store, or of any other file system that fsspec knows.

It is tested with S3 and compatible stores. Requests are retried by :mod:`pipeline.storage.retry` alone: retries of
boto and s3fs would multiply the tries, and hide a lost reply.

An upload becomes visible only when it is complete. s3fs sends a file of up to 100 MB in one request, which S3 checks
against its length and checksum, and a larger one in chunks of 50 MB or more (a multipart upload), which becomes visible
with the last request. s3fs aborts an interrupted upload; the chunks of a killed process take up space, invisibly, until
the bucket's lifecycle rule (AbortIncompleteMultipartUpload) removes them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
import threading
import uuid
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.config import conf
from fsspec.core import url_to_fs

from pipeline.core.failpoints import failpoint
from pipeline.storage import retry
from pipeline.storage.base import TEMPORARY, Entry, Storage, sha256
from pipeline.storage.retry import exists_already, retried
from pipeline.storage.urls import explained, is_s3, scheme_of

_CREATING = threading.Lock()
# The name of the metadata that identifies the writer of an object.
WRITER = "writer"
# A digest is read in blocks of this many bytes, each of them one request.
BLOCK = 16 << 20
# s3fs sends up to 100 MB in one request.
SINGLE_BYTES = 95_000_000
# Concurrent requests. s3fs makes about 300 a second, so more would only take memory.
REQUESTS = 16
# A fork never closes the connections that it inherits: that would remove the parent's connections from the shared
# epoll, and the parent would wait for its answers until they time out.
_INHERITED: list[Any] = []


class ObjectStorage(Storage):
    """A prefix of an object store (or any other fsspec file system); uploads are atomic.

    Raises:
        StorageError: from every method, if the store cannot be reached or refuses the request.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url if url.endswith("://") else url.rstrip("/"))
        self._s3 = is_s3(url)
        # Read an object in one request, without a request for its size before.
        self._whole: dict[str, Any] = {"max_concurrency": 1} if self._s3 else {}
        self._connect()

    def _connect(self) -> None:
        self._process = os.getpid()
        with explained(self.url):
            self._fs, root = url_to_fs(self.url, **_options(self.url))
        if self._s3:
            self._fs.retries = 1
        self.root = root.rstrip("/")

    @property
    def remote(self) -> bool:
        """See :attr:`Storage.remote`."""
        return True

    @property
    def threads(self) -> int:
        """See :attr:`Storage.threads`; a store takes a while to answer, and answers many at a time."""
        return REQUESTS

    @property
    def fs(self) -> Any:
        """The fsspec file system; a process that was forked opens its own."""
        if self._process != os.getpid():
            _INHERITED.append(self._fs)
            self._connect()
        return self._fs

    def _temporary(self) -> Path:
        with explained("a temporary folder (TMPDIR)"):
            folder = Path(tempfile.gettempdir())
        return folder / f"{TEMPORARY}{uuid.uuid4().hex}"

    def adopt(self, path: Path, name: str, *, replace: bool) -> None:
        """See :meth:`Storage.adopt`; a second try of an upload writes the same bytes again."""
        place = f"{self.url}/{name}"

        with explained(str(path)):
            size, digest = path.stat().st_size, sha256(path)

        def put() -> None:
            failpoint("object.put", name)
            self.fs.put_file(str(path), f"{self.root}/{name}", **self._proof(digest, size))

        with explained(place, needed=size):
            # Only a file of the same size is worth reading for its digest.
            same_size = not replace and self.size(name) == size
            if not (same_size and self.digest(name) == digest):
                retried(place, put)

    def _proof(self, digest: str, size: int) -> dict[str, str]:
        """Options for S3 to check an upload against its SHA-256 and to keep that; for uploads of a single request only.

        A store without checksums is configured with AWS_REQUEST_CHECKSUM_CALCULATION=when_required.
        """
        if not self._s3 or size > SINGLE_BYTES:
            return {}
        if self.fs.s3.meta.config.request_checksum_calculation == "when_required":
            return {}
        return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": base64.b64encode(bytes.fromhex(digest)).decode()}

    def create_once(self, name: str, data: bytes) -> bool:
        """See :meth:`Storage.create_once`; a conditional put where the store has it (S3).

        If the reply to a successful put is lost, the retry finds its own object; the writer's mark identifies it.
        """
        place, mark, tries = f"{self.url}/{name}", uuid.uuid4().hex, 0

        def put() -> None:
            nonlocal tries
            tries += 1
            marked = {"Metadata": {WRITER: mark}} if self._s3 else {}
            self.fs.pipe_file(f"{self.root}/{name}", data, mode="create", **marked)
            failpoint("object.created", name)

        # Other stores check before they write; the lock serialises at least the threads of this process.
        with nullcontext() if self._s3 else _CREATING, explained(place, needed=len(data)):
            try:
                retried(place, put)
            except Exception as error:
                if not exists_already(error):
                    raise
                if self._s3:
                    return self._writer(name) == mark
                return tries > 1 and self.read(name) == data
            return True

    def _writer(self, name: str) -> str | None:
        """The mark of the writer that created an object of S3."""
        try:
            found: dict[str, str] = retried(f"{self.url}/{name}", lambda: self.fs.metadata(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None
        return found.get(WRITER)

    def read(self, name: str) -> bytes | None:
        """See :meth:`Storage.read`."""
        place = f"{self.url}/{name}"
        with explained(place):
            try:
                data: bytes = retried(place, lambda: self.fs.cat_file(f"{self.root}/{name}", **self._whole))
            except FileNotFoundError:
                return None
            return data

    def digest(self, name: str) -> str | None:
        """See :meth:`Storage.digest`."""
        size = self.size(name)
        if size is None:
            return None
        digest, place = hashlib.sha256(), f"{self.url}/{name}"
        for start in range(0, size, BLOCK):
            with explained(place):
                digest.update(retried(place, partial(self._range, name, start, min(start + BLOCK, size))))
        return digest.hexdigest()

    def _range(self, name: str, start: int, end: int) -> bytes:
        data: bytes = self.fs.cat_file(f"{self.root}/{name}", start=start, end=end)
        return data

    def proven(self, name: str) -> str | None:
        """See :meth:`Storage.proven`: the checksum that S3 verified at the upload.

        None for stores without checksums, and for objects of other writers.
        """
        if not self._s3:
            return None
        bucket, key, _ = self.fs.split_path(f"{self.root}/{name}")
        place = f"{self.url}/{name}"

        def ask() -> dict[str, Any]:
            found: dict[str, Any] = self.fs.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            return found

        with explained(place):
            try:
                found = retried(place, ask)
            except FileNotFoundError:
                return None
        # For a multipart upload it is a checksum of checksums.
        checksum, kind = found.get("ChecksumSHA256", ""), found.get("ChecksumType", "FULL_OBJECT")
        if kind != "FULL_OBJECT" or not checksum or "-" in checksum:
            return None
        return base64.b64decode(checksum).hex()

    def size(self, name: str) -> int | None:
        """See :meth:`Storage.size`."""
        place = f"{self.url}/{name}"
        with explained(place):
            try:
                found = retried(place, lambda: self.fs.info(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None
        return int(found["size"]) if found["type"] == "file" else None

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """See :meth:`Storage.entries`."""
        # Some tools create an empty object for a folder; its name within the folder is empty.
        files = {_last(entry): entry for entry in self._listed(folder) if entry["type"] == "file"}
        return {name: Entry(size=int(entry["size"]), modified=_seconds(entry)) for name, entry in files.items() if name}

    def folders(self) -> list[str]:
        """See :meth:`Storage.folders`."""
        return sorted(_last(entry) for entry in self._listed("") if entry["type"] == "directory")

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        path = f"{self.root}/{folder}".rstrip("/")
        place = f"{self.url}/{folder}".rstrip("/")

        def listed() -> list[dict[str, Any]]:
            self.fs.invalidate_cache(path)
            found: list[dict[str, Any]] = self.fs.ls(path, detail=True)
            return found

        with explained(place):
            try:
                return retried(place, listed)
            except FileNotFoundError:
                return []

    def remove(self, name: str) -> None:
        """See :meth:`Storage.remove`."""
        place = f"{self.url}/{name}"
        with explained(place):
            try:
                retried(place, lambda: self.fs.rm_file(f"{self.root}/{name}"))
            except FileNotFoundError:
                return


def _options(url: str) -> dict[str, Any]:
    """Options of the file system, merged over the user's fsspec config."""
    if not is_s3(url):
        return {}
    own = conf.get(scheme_of(url), {}).get("config_kwargs", {})
    config = {
        "connect_timeout": retry.CONNECT_SECONDS,
        "max_pool_connections": REQUESTS,
        "read_timeout": retry.READ_SECONDS,
        **own,
        "retries": {"total_max_attempts": 1},
    }
    return {"config_kwargs": config, "use_listings_cache": False}


def _last(entry: dict[str, Any]) -> str:
    """The last part of an object's name."""
    name: str = entry["name"]
    return name.rsplit("/", 1)[-1]


def _seconds(entry: dict[str, Any]) -> float:
    """The time of writing of an object, under the names that file systems use; 0 if unknown."""
    for key in ("LastModified", "mtime", "created", "modified", "updated"):
        value = entry.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
