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
        ManifestError: nothing is there; the message names the nearest thing to try.
    """
    try:
        fs, root = filesystem(path)
        found = _listed(fs, root)
    except Exception as error:
        if not isinstance(error, OSError | ImportError | ValueError) and not from_driver(error):
            raise
        raise ManifestError(f"manifest.path={path}: {_why(path, error)}") from error
    if not found:
        if fs.exists(root):
            raise ManifestError(
                f"manifest.path={path}: a folder without *.parquet files; for a folder of images run: "
                f"python -m pipeline.manifest folder {path} manifest.parquet"
            )
        raise ManifestError(f"manifest.path={path}: no such file, folder or match{_beside(path)}{from_here(path)}")
    return [name if is_local(path) else fs.unstrip_protocol(name) for name in found]


def _listed(fs: Any, root: str) -> list[str]:
    if any(mark in root for mark in "*?[") and not fs.exists(root):
        return sorted(name for name in fs.glob(root) if fs.isfile(name))
    if fs.isdir(root):
        found = fs.find(root)
        relative = {name: name[len(root) :].lstrip("/") for name in found}
        # Names with a leading _ or . are another tool's books, as all readers of Parquet folders agree.
        return sorted(
            name
            for name, rest in relative.items()
            if rest.endswith((".parquet", ".pq")) and not any(part.startswith(("_", ".")) for part in rest.split("/"))
        )
    return [root] if fs.exists(root) else []


def _why(path: str, error: Exception) -> str:
    """What a driver, or the lack of one, says of an address, and what to do."""
    if isinstance(error, ImportError):
        return no_driver(path, error)
    if from_driver(error):
        return f"{error}; check the address, the credentials and the network"
    if isinstance(error, ValueError) and "://" in path:
        return f"{error}; known are paths, s3://, https:// and what else fsspec has a driver for"
    return str(error)


def _beside(path: str) -> str:
    """The manifest that was meant, where one of nearly that name lies in the same folder."""
    given = Path(local_path(path)).expanduser()
    if not is_local(path) or not given.parent.is_dir():
        return ""
    near = nearest(given.name, [name for name in os.listdir(given.parent) if not name.startswith((".", "_"))])
    return f" ({near})" if near else ""


def common_folder(urls: Sequence[str]) -> str:
    """The folder that all addresses lie in; empty where they share none, or the root of the disk alone."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    return "/".join(names[0] for names in takewhile(lambda names: len({*names}) == 1, levels))
