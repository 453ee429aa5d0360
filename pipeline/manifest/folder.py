"""Files of a folder at any depth, on this machine or in a store, and what is left out of a manifest of its images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config.extensions import EXTENSIONS, extension_of
from pipeline.core.errors import ManifestError
from pipeline.storage.base import TEMPORARY
from pipeline.storage.urls import explained, filesystem, from_here, is_local, local_file

# Folders of systems and of devices, in lower case: previews, copies of metadata, and what was thrown away.
_SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "lost.dir"),
    )
)
_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"))


@dataclass(frozen=True, slots=True)
class File:
    """One file: its path relative to the folder, its size in bytes and its date in microseconds, if known."""

    name: str
    size: int | None
    modified: int | None


@dataclass(slots=True)
class LeftOut:
    """Counts of what is left out of a folder: files by extension, and files and folders by the reason.

    ``own`` is the file that is written, which is neither listed nor counted.
    """

    extensions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    own: str = ""

    def __str__(self) -> str:
        """One sentence; empty if nothing was left out."""
        parts = [f"{what} ({count:,})" for what, count in sorted(self.reasons.items())]
        if self.extensions:
            kinds = ", ".join(f"{count:,} {name}" for name, count in self.extensions.most_common())
            parts.insert(0, f"files whose names are not those of images ({self.extensions.total():,}: {kinds})")
        return f"left out: {'; '.join(parts)}; --all takes every file" if parts else ""


def is_image(name: str) -> bool:
    """True if a file, relative to its folder, is an image by its name, and not one that systems hide or made."""
    *folders, base = name.split("/")
    return extension_of(base) in EXTENSIONS and not _reason(base) and not any(map(_folder_reason, folders))


def list_files(folder: str, left_out: LeftOut, *, every: bool = False) -> Iterator[File]:
    """The images of a folder, at any depth, sorted by their relative paths.

    Links to folders are not followed; a broken link has neither size nor date.

    Args:
        folder: a path or an fsspec address.
        left_out: counts what is not listed, as far as the list is read.
        every: list every file, whatever its name is.

    Raises:
        ManifestError: no such folder, or a name that is not UTF-8.
    """
    found = _local(folder, left_out, every) if is_local(folder) else _remote(folder, left_out, every)
    for file in found:
        try:
            file.name.encode()
        except UnicodeEncodeError as error:
            raise ManifestError(f"{file.name!r}: the file's name is not UTF-8; rename it") from error
        yield file


def _local(folder: str, left_out: LeftOut, every: bool) -> Iterator[File]:
    root = local_file(folder)
    if not root.is_dir():
        raise ManifestError(f"{folder}: no such folder{from_here(folder)}")
    root = root.resolve()
    for path in _walk(root, left_out, every):
        try:
            status = path.stat()
            size, modified = status.st_size, status.st_mtime_ns // 1000
        except OSError:
            size, modified = None, None
        yield File(path.relative_to(root).as_posix(), size, modified)


def _walk(folder: Path, left_out: LeftOut, every: bool) -> Iterator[Path]:
    """The files below, in the order of the whole relative path."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries]
    except OSError as error:
        raise ManifestError(f"{folder}: {error.strerror}") from error
    for name, is_folder, is_link in sorted(found, key=lambda entry: f"{entry[0]}/" if entry[1] else entry[0]):
        if not is_folder:
            own = name.startswith(TEMPORARY) or str(folder / name) == left_out.own
            if not own and (every or _wanted(name, left_out)):
                yield folder / name
        elif is_link:
            left_out.reasons["links to folders"] += 1
        elif not every and (reason := _folder_reason(name)):
            left_out.reasons[reason] += 1
        else:
            yield from _walk(folder / name, left_out, every)


def _remote(folder: str, left_out: LeftOut, every: bool) -> Iterator[File]:
    with explained(folder):
        try:
            fs, root = filesystem(folder)
        except ValueError as error:
            known = "known are paths, s3:// and what else fsspec has a driver for"
            raise ManifestError(f"{folder}: {error}; {known}") from error
        if not fs.isdir(root):
            raise ManifestError(f"{folder}: no such folder")
        found = {name[len(root) :].lstrip("/"): info for name, info in fs.find(root, detail=True).items()}
    seen = set[str]()
    for name in sorted(found):
        *folders, base = name.split("/")
        # Some stores list a folder as an empty object.
        if not base or base.startswith(TEMPORARY) or f"{folder.rstrip('/')}/{name}" == left_out.own:
            continue
        if not every:
            at = next((depth for depth, each in enumerate(folders) if _folder_reason(each)), None)
            if at is not None:
                place = "/".join(folders[: at + 1])
                left_out.reasons[_folder_reason(folders[at])] += place not in seen
                seen.add(place)
                continue
            if not _wanted(base, left_out):
                continue
        yield File(name, found[name].get("size"), _microseconds(found[name]))


def _wanted(base: str, left_out: LeftOut) -> bool:
    """True if a file is an image by its name; counts it otherwise."""
    extension, reason = extension_of(base), _reason(base)
    if reason:
        left_out.reasons[reason] += 1
    elif extension not in EXTENSIONS:
        left_out.extensions[extension or "without an extension"] += 1
    return not reason and extension in EXTENSIONS


def _reason(base: str) -> str:
    if base.startswith("._"):
        return "files of macOS's metadata (._*)"
    if base.startswith("."):
        return "hidden files"
    return "files of systems (Thumbs.db and the like)" if base.lower() in _SYSTEM_FILES else ""


def _folder_reason(base: str) -> str:
    lower = base.lower()
    if lower in _SYSTEM_FOLDERS or lower.startswith(".trash"):
        return f"folders {base}"
    return "hidden folders" if base.startswith(".") else ""


def _microseconds(info: dict[str, Any]) -> int | None:
    """The date of a file, which every driver names and writes in its own way; None if it has none."""
    for key in ("LastModified", "last_modified", "mtime", "modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            value = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return round(value.timestamp() * 1_000_000)
        if isinstance(value, int | float):
            return round(value * 1_000_000)
    return None
