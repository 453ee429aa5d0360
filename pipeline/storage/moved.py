"""Local addresses whose folder was renamed, copied, or mounted elsewhere together with what lies around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from glob import has_magic, iglob
from pathlib import Path

from pipeline.storage.urls import is_local, local_file, local_path

# Folders above a dataset or a manifest that are searched: further up lie other projects.
LEVELS = 4


def is_gone(address: str) -> bool:
    """True for an absolute local path, or a glob, that leads to nothing."""
    path = local_path(address)
    return is_local(address) and os.path.isabs(path) and not _exists(path)


def same_place(one: str, other: str) -> bool:
    """True if two addresses are equal, or lead to one local file or folder, as through a link."""
    if not is_local(one) or not is_local(other):
        return one == other
    return os.path.realpath(local_path(one)) == os.path.realpath(local_path(other))


def has_moved(old: str, new: str) -> bool:
    """True if ``new`` is the place of the folder ``old`` by now: a link to it, or a place beside nothing."""
    return same_place(old, new) or is_gone(old)


def find_again(address: str, near: str) -> Iterator[str]:
    """Existing paths that end like ``address`` and begin with a folder above ``near``, the longest ending first.

    A project folder keeps its inner layout when it is renamed: ``/old/project/data/photos.parquet`` is found from
    ``/new/place/outputs/run`` as ``/new/place/data/photos.parquet``. The caller checks that the content is the same.
    """
    if not is_local(address) or not is_local(near):
        return
    names = Path(local_path(address)).parts[1:]
    here = local_file(near).absolute()
    folders = [*here.parents[:LEVELS], *here.resolve().parents[:LEVELS]]
    for start in range(len(names)):
        for folder in dict.fromkeys(folders):
            path = str(folder.joinpath(*names[start:]))
            if _exists(path):
                yield path


def moved_with(address: str, old: str, new: str) -> str | None:
    """The place of ``address`` after the move that brought ``old`` to ``new``; None if it is not part of that move.

    The move is that of the deepest folder whose inner path both share.
    """
    before, after, path = (Path(local_path(each)) for each in (old, new, address))
    while before.name and before.name == after.name:
        before, after = before.parent, after.parent
    return str(after / path.relative_to(before)) if path.is_relative_to(before) else None


def _exists(path: str) -> bool:
    return os.path.exists(path) or (has_magic(path) and next(iglob(path, recursive=True), None) is not None)
