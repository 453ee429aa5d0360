"""Paths and addresses that a caller hands over: where they start, and which kinds are among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pipeline.core.errors import ManifestError
from pipeline.manifest.files import common_folder
from pipeline.storage.urls import is_local, local_path, scheme_of

WEB = ("http", "https")


def absolute(address: str) -> str:
    """A local address from wherever the process stands later; any other as it is, and an empty one too."""
    return os.path.abspath(os.path.expanduser(local_path(address))) if address and is_local(address) else address


def check_paths(cells: Sequence[object]) -> None:
    """Refuse what is neither a path nor missing.

    Raises:
        ManifestError: names the place.
    """
    for place, each in enumerate(cells):
        if not isinstance(each, str | os.PathLike | None):
            raise ManifestError(f"images[{place}]: {type(each).__name__} among paths; hand over one kind")


def paths_of(cells: list[Any], root: str | None) -> tuple[list[Any], str | None, tuple[str, ...]]:
    """Paths as a manifest has them, where they start, and which kinds of web addresses are among them.

    Without a root, local paths are made absolute and start at the folder that holds them all.

    Raises:
        ManifestError: something else is among them, or they lie in several stores.
    """
    check_paths(cells)
    paths = [None if each is None else os.fspath(each) for each in cells]
    known = [path for path in paths if path]
    schemes = tuple(sorted({scheme_of(path) for path in known} & {*WEB}))
    if root is not None:
        return paths, root, schemes
    local = {path: absolute(path) for path in known if is_local(path)}
    if local:
        root = os.path.commonpath([os.path.dirname(path) for path in local.values()])
        # Of a folder that is not there, every image is not found.
        while not os.path.isdir(root) and root != os.path.dirname(root):
            root = os.path.dirname(root)
    elif remote := [path for path in known if scheme_of(path) not in WEB]:
        root = common_folder(remote)
        if not root.partition("://")[2]:
            raise ManifestError("images: addresses in several stores; give those of each to a call of their own")
    return [local.get(path, path) if path else path for path in paths], root, schemes


def root_of(root: str | None) -> str:
    """Where relative paths start, from wherever the manifest is read."""
    return absolute(root or ".")
