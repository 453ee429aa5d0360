"""Room and speed of the disks that a job writes to: the output, temporary files, exported models, text features."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import StorageError
from pipeline.doctor.check import Check, Status, Subject, unless_said
from pipeline.doctor.output import PROBE, nearest_folder
from pipeline.storage.urls import explained, is_local, local_path

GROUP = "disks"
TEMPORARY_FILES = "temporary files"
OUTPUT = "output.dir"
MIB, GIB = 2**20, 2**30
# What goes amiss without each of them.
MISSED = {
    TEMPORARY_FILES: "",
    "backend.artifacts": ": backends that export a model can only use what lies there already",
    "prompts.cache": ": labels are embedded anew at every start",
}
# Less room than this is worth a word; with less than the second a job hardly gets to its end.
LITTLE, NONE = 2 * GIB, 128 * MIB
# What is written to measure: so much, or as much as a disk takes in so long.
MEASURED_BYTES, MEASURED_SECONDS = 128 * MIB, 3.0
BLOCK = 4 * MIB
# Slower than a network disk of today.
SLOW = 20 * MIB


def look(subject: Subject) -> Iterator[Check]:
    """Free space of each place, and once for each disk its speed."""
    seen: dict[int, str] = {}
    for name, place in places(subject.job, subject.temporary).items():
        try:
            folder = nearest_folder(place)
            with explained(str(folder)):
                found, device = os.statvfs(folder), folder.stat().st_dev
        except StorageError as error:
            if name == OUTPUT:
                # Told where its write access is looked at.
                yield Check(GROUP, name, Status.SKIP, "no folder of a disk")
            else:
                status = Status.FAIL if name == TEMPORARY_FILES else Status.WARN
                yield Check(GROUP, name, status, f"{error}{MISSED[name]}", unless_said(error, _other(name)))
            continue
        free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        files = found.f_favail
        figures = {"free_bytes": float(free), "size_bytes": float(size)}
        fact = f"{place}: {_size(free)} of {_size(size)} free"
        if name != OUTPUT and not os.access(folder, os.W_OK | os.X_OK):
            status = Status.FAIL if name == TEMPORARY_FILES else Status.WARN
            yield Check(GROUP, name, status, f"{fact}, but it cannot be written{MISSED[name]}", _other(name), figures)
            continue
        if device in seen:
            yield _room(name, f"{fact}, the disk of {seen[device]}", free, files, figures)
            continue
        seen[device] = name
        if subject.quick or free < NONE:
            yield _room(name, fact, free, files, figures)
            continue
        try:
            with explained(str(folder), needed=MEASURED_BYTES):
                write, read = measure(folder)
        except StorageError as error:
            status = Status.FAIL if name in (OUTPUT, TEMPORARY_FILES) else Status.WARN
            told = f"{error}{MISSED.get(name, '')}"
            yield Check(GROUP, name, status, told, unless_said(error, _other(name)), figures)
            continue
        figures |= {"write_bytes_per_second": write, "read_bytes_per_second": read}
        fact += f", written at {write / 1e6:,.0f} MB/s, read at {read / 1e6:,.0f} MB/s"
        check = _room(name, fact, free, files, figures)
        if check.status is Status.OK and write < SLOW:
            yield Check(GROUP, name, Status.WARN, fact, f"a slow disk: {_other(name)}", figures)
        else:
            yield check


def places(config: Config, temporary: str) -> dict[str, Path]:
    """The local folders that a job writes to, by the names of their settings; they may not be there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "clip-pipeline"
    found = {}
    if is_local(config.output.dir):
        found[OUTPUT] = Path(local_path(config.output.dir))
    found[TEMPORARY_FILES] = Path(temporary)
    found["backend.artifacts"] = Path(config.backend.artifacts) if config.backend.artifacts else cache / "artifacts"
    if config.prompts.cache is None or is_local(config.prompts.cache):
        found["prompts.cache"] = Path(local_path(config.prompts.cache)) if config.prompts.cache else cache / "text"
    return {name: place.expanduser().absolute() for name, place in found.items()}


def measure(folder: Path) -> tuple[float, float]:
    """Bytes a second written and flushed to the disk, and read back from it; a file without a name holds them."""
    path = folder / f"{PROBE}{uuid.uuid4().hex}"
    block = os.urandom(BLOCK)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Whatever ends this process, the file goes with it.
        path.unlink()
        written, began = 0, time.perf_counter()
        while written < MEASURED_BYTES and time.perf_counter() - began < MEASURED_SECONDS:
            written += os.write(descriptor, block)
            # Block by block, so that a slow disk ends this in time.
            os.fsync(descriptor)
        writing = time.perf_counter() - began
        # Read from the disk and not from memory, where the system takes the advice.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        got, began = 0, time.perf_counter()
        while (data := os.read(descriptor, BLOCK)) and time.perf_counter() - began < MEASURED_SECONDS:
            got += len(data)
        reading = time.perf_counter() - began
    finally:
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
    return written / max(writing, 1e-9), got / max(reading, 1e-9)


def _room(name: str, fact: str, free: int, files: int, figures: dict[str, float]) -> Check:
    # A job does without its caches.
    needed = name in (OUTPUT, TEMPORARY_FILES)
    status, missed = (Status.FAIL, " for a job") if needed else (Status.WARN, MISSED[name])
    # A file system without such a number says 0 of 0, or the most there can be.
    if free < NONE:
        return Check(GROUP, name, status, f"{fact}: too little{missed}", f"free some space, or {_other(name)}", figures)
    if 0 < files < 100:
        return Check(GROUP, name, status, f"{fact}, but only {files} more files (inodes)", _other(name), figures)
    if free < LITTLE:
        return Check(GROUP, name, Status.WARN, fact, f"free some space, or {_other(name)}", figures)
    return Check(GROUP, name, Status.OK, fact, figures=figures)


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def _other(name: str) -> str:
    return "set TMPDIR to another folder" if name == TEMPORARY_FILES else f"set {name} to a folder elsewhere"
