"""The Parquet files, or the tars, that ``manifest.path`` names."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pipeline.config.schema import nearest
from pipeline.core.errors import ManifestError
from pipeline.manifest.folder import is_image
from pipeline.manifest.tables import refuse_parts_of_tables, refuse_skipped, refuse_tables
from pipeline.manifest.tars import expanded, is_range, is_tar
from pipeline.storage.urls import filesystem, from_driver, from_here, is_local, local_file, no_driver

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """The files at an address, sorted by name.

    ``skipped`` are Parquet files of a folder whose names, or folders, begin with ``_`` or ``.``, and ``images`` its
    images by their names; both are relative to the folder. ``tars`` are those of a folder.
    """

    fs: Any
    root: str
    parquet: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    tars: tuple[str, ...] = ()


def find_files(path: str) -> list[str]:
    """The files at a file, folder or glob address, sorted by name: Parquet, or tars where a folder has no Parquet.

    Raises:
        ManifestError: no such file (the message names a similar one), a folder of images, or a table whose own log
            says which files count.
    """
    if is_range(path):
        return expanded(path)
    found = look(path)
    if found.tars and not (found.parquet or found.images):
        return [name if is_local(path) else found.fs.unstrip_protocol(name) for name in found.tars]
    if not found.parquet:
        raise ManifestError(f"manifest.path={path}: {_nothing(path, found)}")
    if found.images:
        log.info(
            "manifest.path=%s: its Parquet files are the manifest (%d, such as %s); of the images beside them (%d, "
            "such as %s), only those are taken that it names",
            *(path, len(found.parquet), _relative(found.parquet[0], found.root), len(found.images), found.images[0]),
        )
    if found.skipped:
        shown = f"{', '.join(found.skipped[:3])}{', ...' if len(found.skipped) > 3 else ''}"
        log.warning(
            "manifest.path=%s: Parquet files whose names or folders begin with _ or . are left out (%d): %s",
            *(path, len(found.skipped), shown),
        )
    return [name if is_local(path) else found.fs.unstrip_protocol(name) for name in found.parquet]


def holds_images(path: str) -> bool:
    """True if an address is a folder of images, without a Parquet file in it.

    Raises:
        ManifestError: see :func:`look`.
    """
    # A folder is listed; an address that tells by itself that it is none need not be.
    if path.endswith((".parquet", ".pq")) or any(mark in path for mark in "*?["):
        return False
    found = look(path)
    return bool(found.images) and not found.parquet


def look(path: str) -> Found:
    """List what is at an address; without a file, nothing was found.

    Raises:
        ManifestError: it cannot be listed, or is a table with a log of its own.
    """
    try:
        fs, root = filesystem(path)
        found = _listed(path, fs, root)
        if found.parquet:
            refuse_parts_of_tables(path, fs, found.parquet)
    except Exception as error:
        if not isinstance(error, OSError | ImportError | ValueError) and not from_driver(error):
            raise
        raise ManifestError(f"manifest.path={path}: {_reason(path, error)}") from error
    return found


def _nothing(path: str, found: Found) -> str:
    """The reason why no Parquet file was found, and the remedy."""
    way_out = f"python -m pipeline.manifest folder {path} manifest.parquet"
    if found.images:
        return (
            f"a folder without *.parquet files, but with images ({len(found.images):,}, such as {found.images[0]}); "
            f"python -m pipeline.run makes a manifest of it by itself; other commands take one made by: {way_out}"
        )
    if found.skipped:
        return f"the names or folders of all its Parquet files begin with _ or . ({found.skipped[0]}); name one of them"
    if found.fs.exists(found.root):
        return f"a folder without *.parquet files; for a folder of images run: {way_out}"
    return f"no such file, folder or match{_similar(path)}{from_here(path)}"


def _relative(name: str, root: str) -> str:
    return name[len(root) :].lstrip("/")


def _listed(path: str, fs: Any, root: str) -> Found:
    if any(mark in root for mark in "*?[") and not fs.exists(root):
        there = sorted(fs.glob(root, detail=True).items())
        # A store is asked again about what is neither file nor folder alone.
        files = (name for name, info in there if info["type"] == "file" or (_is_other(info) and fs.isfile(name)))
        return Found(fs, root, tuple(files))
    if not fs.isdir(root):
        return Found(fs, root, (root,) if fs.exists(root) else ())
    names = {name: _relative(name, root) for name in sorted(fs.find(root))}
    refuse_tables(path, root, names.values())
    parquet = {name: rest for name, rest in names.items() if rest.endswith((".parquet", ".pq"))}
    skipped = [rest for rest in parquet.values() if _is_hidden(rest)]
    refuse_skipped(path, skipped)
    left_out = {*skipped}
    return Found(
        fs=fs,
        root=root,
        parquet=tuple(name for name, rest in parquet.items() if rest not in left_out),
        skipped=tuple(skipped),
        images=tuple(rest for rest in names.values() if is_image(rest)),
        tars=tuple(name for name, rest in names.items() if is_tar(rest) and not _is_hidden(rest)),
    )


def _is_other(info: dict[str, Any]) -> bool:
    return info["type"] not in ("file", "directory")


def _is_hidden(name: str) -> bool:
    """True for metadata of other tools, as in all readers of Parquet folders."""
    return any(part.startswith(("_", ".")) for part in name.split("/"))


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
    given = local_file(path)
    if not is_local(path) or not given.parent.is_dir():
        return ""
    near = nearest(given.name, [name for name in os.listdir(given.parent) if not name.startswith((".", "_"))])
    return f" ({near})" if near else ""


def common_folder(urls: Sequence[str]) -> str:
    """The deepest common folder of the addresses; empty if there is none, or only the root of the disk."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    return "/".join(names[0] for names in takewhile(lambda names: len({*names}) == 1, levels))
