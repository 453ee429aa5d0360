"""Check that the output can be written as a job writes it; the file that this takes is removed again."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import StorageError
from pipeline.doctor.check import Check, Status, Subject, unless_in
from pipeline.storage.base import TEMPORARY, Storage
from pipeline.storage.urls import explained, is_local, local_file

GROUP = "output"
# The next run removes files of such a name that an interrupted check leaves in a dataset.
PROBE = f"{TEMPORARY}doctor-"
SENT_BYTES = 1 << 20
NO_CREATE = (
    "choose a store with conditional writes (S3 has them), and until then let one run at a time write to an output"
)


def look(subject: Subject) -> Iterator[Check]:
    """Create a file once, read it, try to create it again, which must be refused, and remove it."""
    url = subject.job.output.dir
    try:
        with _place(url) as (storage, where):
            seconds, exclusive = _exchange(storage)
    except StorageError as error:
        way_out = unless_in(error, "choose another output.dir, or repair this one")
        # The name of the removed file would not help.
        text = re.sub(rf"/{PROBE}[0-9a-f]{{32}}", "", str(error))
        yield Check(GROUP, "write access", Status.FAIL, text, way_out)
        return
    figures = {f"{name}_seconds": value for name, value in seconds.items()}
    times = ", ".join(f"{name} {value * 1000:,.1f} ms" for name, value in seconds.items())
    yield Check(GROUP, "write access", Status.OK, f"{where} ({times})", figures=figures)
    if not exclusive:
        fact = f"{storage.url}: a second writer of a name was not refused; two runs could both commit a shard"
        yield Check(GROUP, "create once", Status.FAIL, fact, NO_CREATE)


def nearest_folder(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists.

    Raises:
        StorageError: something else is in its place, or it cannot be read.
    """
    for folder in (path, *path.parents):
        with explained(str(folder)), suppress(FileNotFoundError):
            if not folder.stat().st_mode & 0o040000:
                raise NotADirectoryError(None, "is a file, not a folder")
            return folder
    return path


@contextmanager
def _place(url: str) -> Iterator[tuple[Storage, str]]:
    """Return the storage to try, and a sentence about the output; a missing output folder is not created."""
    from pipeline.storage.factory import open_storage
    from pipeline.storage.local import LocalStorage

    if not is_local(url):
        storage = open_storage(url)
        yield storage, f"{storage.url} can be written"
        return
    wanted = local_file(url).absolute()
    folder = nearest_folder(wanted)
    if folder == wanted:
        yield LocalStorage(str(folder)), f"{wanted} exists and can be written"
        return
    # The job itself may begin meanwhile, so the output's own name is not used.
    made = folder / f"{PROBE}{uuid.uuid4().hex}"
    try:
        with explained(str(folder)):
            made.mkdir()
        yield LocalStorage(str(made)), f"{wanted} does not exist yet, and can be created"
    finally:
        with suppress(OSError):
            made.rmdir()


def _exchange(storage: Storage) -> tuple[dict[str, float], bool]:
    """Return the seconds of each step, and True if a second writer was refused."""
    name, data = f"{PROBE}{uuid.uuid4().hex}", os.urandom(SENT_BYTES)
    seconds: dict[str, float] = {}
    try:
        began = time.perf_counter()
        storage.create_once(name, data)
        seconds["write"] = time.perf_counter() - began
        began = time.perf_counter()
        back = storage.read(name)
        seconds["read"] = time.perf_counter() - began
        if back != data:
            raise StorageError(f"{storage.url}/{name}: the bytes that were read differ from those that were written")
        exclusive = not storage.create_once(name, data)
    finally:
        began = time.perf_counter()
        with suppress(StorageError):
            storage.remove(name)
        seconds["delete"] = time.perf_counter() - began
    return seconds, exclusive
