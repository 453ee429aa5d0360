"""Paths and addresses from the caller: their root, and the schemes among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import ManifestError
from pipeline.manifest.files import common_folder
from pipeline.storage.urls import is_local, local_path, scheme_of

WEB = ("http", "https")


def absolute(address: str) -> str:
    """A local address as an absolute path; any other address, and an empty one, unchanged."""
    return os.path.abspath(os.path.expanduser(local_path(address))) if address and is_local(address) else address


def check_paths(cells: Sequence[object]) -> None:
    """Refuse cells that are neither paths nor missing.

    Raises:
        ManifestError: with the position.
    """
    for position, each in enumerate(cells):
        if not isinstance(each, str | os.PathLike | None):
            raise ManifestError(f"images[{position}]: {type(each).__name__} among paths; give images of one type")


@dataclass(frozen=True, slots=True)
class Paths:
    """Paths as a manifest holds them, the root of relative ones, and the web schemes among them."""

    cells: list[str | None]
    root: str | None
    schemes: tuple[str, ...]


def paths_of(cells: list[Any], root: str | None) -> Paths:
    """Check paths; without a root, local ones are made absolute and their common folder is the root.

    Raises:
        ManifestError: a cell is not a path, or the addresses are in several stores.
    """
    check_paths(cells)
    paths = [None if each is None else os.fspath(each) for each in cells]
    known = [path for path in paths if path]
    schemes = tuple(sorted({scheme_of(path) for path in known} & {*WEB}))
    if root is not None:
        return Paths(paths, root, schemes)
    local = {path: absolute(path) for path in known if is_local(path)}
    if local:
        root = os.path.commonpath([os.path.dirname(path) for path in local.values()])
        # A root must exist; images of a missing folder get the status not_found.
        while not os.path.isdir(root) and root != os.path.dirname(root):
            root = os.path.dirname(root)
    elif remote := [path for path in known if scheme_of(path) not in WEB]:
        root = common_folder(remote)
        if not root.partition("://")[2]:
            raise ManifestError("images: addresses in several stores; make one call for each store")
    return Paths([local.get(path, path) if path else path for path in paths], root, schemes)
