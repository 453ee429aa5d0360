"""Refusal of tables whose own log decides which of their Parquet files count, and of partitions that are skipped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.core.errors import ManifestError

# Kinds of tables, and a command that writes what such a table holds as Parquet.
_WAYS_OUT = {
    "a Delta table": "duckdb -c \"copy (from delta_scan('{folder}')) to 'manifest.parquet'\"",
    "an Iceberg table": "duckdb -c \"copy (from iceberg_scan('{folder}')) to 'manifest.parquet'\"",
    "a Hudi table, or a part of one,": "spark.read.format('hudi').load('{folder}').write.parquet('manifest')",
}
_HUDI_PARTITION = ".hoodie_partition_metadata"
_ICEBERG = re.compile(r".*\.metadata\.json(\.gz)?$|version-hint\.text$|snap-.*\.avro$")
_DELTA_LOG = re.compile(r"\d{20}\.|_last_checkpoint$|.*\.json$")
# Levels from a file up to the folder of its table, through partitions.
_LEVELS = 8


def refuse_tables(path: str, root: str, names: Iterable[str]) -> None:
    """Refuse a folder that is a table, or holds one at any depth.

    Args:
        path: ``manifest.path`` as it was given.
        root: the folder.
        names: every file in it, relative to it.

    Raises:
        ManifestError: rows that were removed from the table would be embedded.
    """
    for name in names:
        *folders, base = name.split("/")
        for depth, folder in enumerate(folders):
            kind = ""
            if folder == "_delta_log" and _DELTA_LOG.match(base):
                kind = "a Delta table"
            elif folder == ".hoodie":
                kind = "a Hudi table, or a part of one,"
            elif folder == "metadata" and _ICEBERG.match(base):
                kind = "an Iceberg table"
            if kind:
                raise _refused(path, kind, "/".join([root.rstrip("/"), *folders[:depth]]), folder)


def refuse_parts_of_tables(path: str, fs: Any, files: Sequence[str]) -> None:
    """Refuse files of a table that were named by themselves, by a glob, or by a folder within the table.

    Raises:
        ManifestError: see :func:`refuse_tables`.
    """
    seen = set[str]()
    # A web server has no folders.
    for name in files if not files[0].startswith(("http://", "https://")) else ():
        folder = name.rpartition("/")[0]
        for _ in range(_LEVELS):
            base = folder.rpartition("/")[2]
            if not base or folder in seen:
                break
            seen.add(folder)
            if _any(fs, f"{folder}/_delta_log", _DELTA_LOG):
                raise _refused(path, "a Delta table", folder, "_delta_log")
            if fs.exists(f"{folder}/.hoodie") or fs.exists(f"{folder}/{_HUDI_PARTITION}"):
                raise _refused(path, "a Hudi table, or a part of one,", folder, ".hoodie")
            # A folder "metadata" beside other people's files proves nothing: the data of Iceberg lie in "data".
            if base == "data" and _any(fs, f"{folder.rpartition('/')[0]}/metadata", _ICEBERG):
                raise _refused(path, "an Iceberg table", folder.rpartition("/")[0], "metadata")
            if "=" not in base and base != "data":
                break
            folder = folder.rpartition("/")[0]


def refuse_skipped(path: str, skipped: Sequence[str]) -> None:
    """Refuse partitions of which readers see nothing, such as ``_date=2024-01-01/``.

    Args:
        path: ``manifest.path`` as it was given.
        skipped: Parquet files with a part of their name that begins with ``_`` or ``.``, relative to the folder.

    Raises:
        ManifestError: some of them lie in partitions.
    """
    hidden = [
        (name, folder)
        for name in skipped
        for folder in name.split("/")[:-1]
        if folder.startswith(("_", ".")) and "=" in folder
    ]
    if hidden:
        count = len({name for name, _ in hidden})
        raise ManifestError(
            f"manifest.path={path}: some of its Parquet files ({count:,}) lie in partitions whose names begin with _ "
            f"or . ({hidden[0][1]}), which readers of Parquet folders skip; rename those folders, or name all files by "
            f"a glob: 'manifest.path=\"{path.rstrip('/')}/**/*.parquet\"'"
        )


def _any(fs: Any, folder: str, wanted: re.Pattern[str]) -> bool:
    """True if a folder exists and holds a file of such a name."""
    try:
        return any(wanted.match(name.rstrip("/").rpartition("/")[2]) for name in fs.ls(folder, detail=False))
    except (OSError, NotImplementedError):
        # It does not exist, or may not be listed: files that can be read are read then.
        return False


def _refused(path: str, kind: str, folder: str, log: str) -> ManifestError:
    way_out = _WAYS_OUT[kind].format(folder=folder)
    return ManifestError(
        f"manifest.path={path}: {folder} is {kind} ({log}), whose own log says which files count: its Parquet files "
        f"may hold rows that were removed or replaced. Write what the table holds as Parquet: {way_out}"
    )
