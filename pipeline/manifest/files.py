"""The Parquet files that ``manifest.path`` names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.config.schema import nearest
from pipeline.core.errors import ManifestError
from pipeline.storage.urls import filesystem, from_driver, from_here, is_local, local_path, no_driver


def find_files(path: str) -> list[str]:
    """The Parquet files at a file, folder or glob address, sorted by name.

    Raises:
        ManifestError: no such file; the message names a similar one.
    """
    try:
        fs, root = filesystem(path)
        found = _listed(fs, root)
    except Exception as error:
        if not isinstance(error, OSError | ImportError | ValueError) and not from_driver(error):
            raise
        raise ManifestError(f"manifest.path={path}: {_reason(path, error)}") from error
    if not found:
        if fs.exists(root):
            raise ManifestError(
                f"manifest.path={path}: a folder without *.parquet files; for a folder of images run: "
                f"python -m pipeline.manifest folder {path} manifest.parquet"
            )
        raise ManifestError(f"manifest.path={path}: no such file, folder or match{_similar(path)}{from_here(path)}")
    return [name if is_local(path) else fs.unstrip_protocol(name) for name in found]


def _listed(fs: Any, root: str) -> list[str]:
    if any(mark in root for mark in "*?[") and not fs.exists(root):
        return sorted(name for name in fs.glob(root) if fs.isfile(name))
    if fs.isdir(root):
        found = fs.find(root)
        relative = {name: name[len(root) :].lstrip("/") for name in found}
        # Names with a leading _ or . are metadata of other tools, as in all readers of Parquet folders.
        return sorted(
            name
            for name, rest in relative.items()
            if rest.endswith((".parquet", ".pq")) and not any(part.startswith(("_", ".")) for part in rest.split("/"))
        )
    return [root] if fs.exists(root) else []


def _reason(path: str, error: Exception) -> str:
    """The reason of a failed listing, and the remedy."""
    if isinstance(error, ImportError):
        return no_driver(path, error)
    if from_driver(error):
        return f"{error}; check the address, the credentials and the network"
    if isinstance(error, ValueError) and "://" in path:
        return f"{error}; known are paths, s3://, https:// and what else fsspec has a driver for"
    return str(error)


def _similar(path: str) -> str:
    """A hint at a file of a similar name in the same folder."""
    given = Path(local_path(path)).expanduser()
    if not is_local(path) or not given.parent.is_dir():
        return ""
    near = nearest(given.name, [name for name in os.listdir(given.parent) if not name.startswith((".", "_"))])
    return f" ({near})" if near else ""


def common_folder(urls: Sequence[str]) -> str:
    """The deepest common folder of the addresses; empty if there is none, or only the root of the disk."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    return "/".join(names[0] for names in takewhile(lambda names: len({*names}) == 1, levels))
