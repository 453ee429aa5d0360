"""Checks of the space on the disks that a job writes to: output, temporary files, exported models, text features."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import StorageError
from pipeline.doctor.check import Check, Status, Subject, unless_in
from pipeline.doctor.output import nearest_folder
from pipeline.storage.urls import explained, is_local, local_path

GROUP = "disks"
TEMPORARY_FILES = "temporary files"
OUTPUT = "output.dir"
MIB, GIB = 2**20, 2**30
# The cost of a job without each cache.
LOST = {
    "backend.artifacts": ": backends that export a model can only use existing exports",
    "prompts.cache": ": labels are embedded again at every start",
}
# A warning below the first; below the second a job cannot finish.
LITTLE, TOO_LITTLE = 2 * GIB, 128 * MIB


def look(subject: Subject) -> Iterator[Check]:
    """Check the free space of each place."""
    seen: dict[int, str] = {}
    for name, place in places(subject.job, subject.temporary).items():
        # A job runs without its caches.
        lost, worst = LOST.get(name, ""), Status.WARN if name in LOST else Status.FAIL
        try:
            folder = nearest_folder(place)
            with explained(str(folder)):
                found, device = os.statvfs(folder), folder.stat().st_dev
        except StorageError as error:
            if name == OUTPUT:
                # The output's own check reports this.
                yield Check(GROUP, name, Status.SKIP, "no folder of a disk")
            else:
                yield Check(GROUP, name, worst, f"{error}{lost}", unless_in(error, _other(name)))
            continue
        free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        figures = {"free_bytes": float(free), "size_bytes": float(size)}
        fact = f"{place}: {_size(free)} of {_size(size)} free"
        if seen.setdefault(device, name) != name:
            fact += f", the disk of {seen[device]}"
        if name != OUTPUT and not os.access(folder, os.W_OK | os.X_OK):
            yield Check(GROUP, name, worst, f"{fact}, but it cannot be written{lost}", _other(name), figures)
        elif free < TOO_LITTLE:
            way_out = f"free some space, or {_other(name)}"
            yield Check(GROUP, name, worst, f"{fact}: too little{lost or ' for a job'}", way_out, figures)
        # A file system without a number of files reports 0.
        elif 0 < found.f_favail < 100:
            fact = f"{fact}, but only {found.f_favail} more files (inodes)"
            yield Check(GROUP, name, worst, fact, _other(name), figures)
        elif free < LITTLE:
            yield Check(GROUP, name, Status.WARN, fact, f"free some space, or {_other(name)}", figures)
        else:
            yield Check(GROUP, name, Status.OK, fact, figures=figures)


def places(config: Config, temporary: str) -> dict[str, Path]:
    """Return the local folders that a job writes to, by the names of their settings; they may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "clip-pipeline"
    found = {}
    if is_local(config.output.dir):
        found[OUTPUT] = Path(local_path(config.output.dir))
    found[TEMPORARY_FILES] = Path(temporary)
    found["backend.artifacts"] = Path(config.backend.artifacts) if config.backend.artifacts else cache / "artifacts"
    if config.prompts.cache is None or is_local(config.prompts.cache):
        found["prompts.cache"] = Path(local_path(config.prompts.cache)) if config.prompts.cache else cache / "text"
    return {name: Path(os.path.expanduser(place)).absolute() for name, place in found.items()}


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def _other(name: str) -> str:
    return "set TMPDIR to another folder" if name == TEMPORARY_FILES else f"set {name} to another folder"
