"""Create a manifest from a folder of images, a CSV, or WebDataset tars.

A manifest records the folder that its relative paths start from, so that a job needs no
``manifest.root`` as long as the images stay where they are.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.core.errors import ManifestError, StorageError
from pipeline.manifest.manifest import ROOT_KEY
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import from_here, is_local, local_path, open_file

EXTENSIONS = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".ico",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pcx",
        ".pgm",
        ".png",
        ".ppm",
        ".qoi",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
SIDECARS = ("txt", "json", "cls")
GROUP_ROWS = 65_536


def from_folder(folder: str, out: str, *, extensions: frozenset[str] = EXTENSIONS) -> int:
    """Write a row for every image file below ``folder``, sorted by path; return the number of rows.

    Columns: ``id`` (the relative path), ``path`` (the same), ``size`` (bytes) and ``modified`` (UTC).
    Files are chosen by their extensions; the job checks their content. Links to folders are not followed; a broken
    link has neither size nor date.

    Raises:
        ManifestError: no such folder, no images in it, or a name that is not UTF-8.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ManifestError(f"{folder}: no such folder{from_here(folder)}")
    schema = pa.schema(
        [("id", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("modified", pa.timestamp("us", tz="UTC"))]
    )

    def rows() -> Iterator[dict[str, Any]]:
        for path in _walk(root):
            if path.suffix.lower() not in extensions:
                continue
            name = path.relative_to(root).as_posix()
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise ManifestError(f"{name!r}: the file's name is not UTF-8; rename it") from error
            yield {"id": name, "path": name, **_facts(path)}

    written = _write(rows(), schema, out, root=str(root.resolve()))
    if not written:
        raise ManifestError(f"{folder}: no files that end in {', '.join(sorted(extensions))}")
    return written


def from_csv(path: str, out: str, *, image: str, id: str | None, root: str | None) -> int:
    """Write every row of a CSV with a header, with all columns; return the number of rows.

    The id and image columns are read as text, so that ``00123`` stays ``00123``; other types are inferred
    from all rows, for which the table is held in memory. Without ``id``, a column ``id`` is made of the
    image paths. Relative paths start at ``root``, by default the folder of the CSV. In a ``.tsv``, tabs
    separate the columns.

    Raises:
        ManifestError: not readable, a column is missing, or there are no rows.
    """
    source = Path(path).expanduser()
    parsing = pa_csv.ParseOptions(delimiter="\t" if source.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
    try:
        header = pa_csv.open_csv(source, parse_options=parsing).schema.names
        missing = [name for name in (image, id) if name is not None and name not in header]
        if missing:
            raise ManifestError(
                f"{path}: no column {missing[0]!r}; its columns are {', '.join(header)}; --id and --image name them"
            )
        if id is None and "id" in header:
            id = "id"
        texts = {name: pa.string() for name in (image, id) if name is not None}
        # The streaming reader infers types from the first block, and fails at a later 3.5 in a column of 3s.
        table = pa_csv.read_csv(
            source, parse_options=parsing, convert_options=pa_csv.ConvertOptions(column_types=texts)
        )
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(f"{path}: not readable as CSV: {error}") from error
    if not table.num_rows:
        raise ManifestError(f"{path}: a header without rows")
    if id is None:
        table = table.add_column(0, "id", table.column(image))
    if root is None:
        root = str(source.resolve().parent)
    elif is_local(root):
        root = str(Path(local_path(root)).expanduser().resolve())
    return _write_tables([table], out, root=root)


def from_tars(paths: Sequence[str], out: str) -> int:
    """Write a row for every image in WebDataset tars, addressed by its bytes; nothing is unpacked.

    Columns: ``id`` (tar name and key), ``path`` (``<tar>#bytes=START-STOP``), and the text of the members with the
    same key: ``txt``, ``json`` and ``cls``, null where there is none. Returns the number of rows.

    Raises:
        ManifestError: a tar is compressed or damaged, or holds no images.
    """
    local = all(is_local(path) for path in paths)
    names = [str(Path(local_path(path)).resolve()) if local else path for path in paths]
    if len({PurePosixPath(name).name for name in names}) != len(names):
        raise ManifestError("two tars have the same name, and ids begin with it; rename one")
    root = os.path.commonpath([os.path.dirname(name) for name in names]) if local else names[0].rpartition("/")[0]
    schema = pa.schema([(name, pa.string()) for name in ("id", "path", *SIDECARS)])
    rows = (row for name in names for row in _tar_rows(name, os.path.relpath(name, root) if local else name))
    written = _write(rows, schema, out, root=root)
    if not written:
        raise ManifestError(
            f"{', '.join(paths)}: no images; a WebDataset tar holds members such as 0001.jpg and 0001.txt"
        )
    return written


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below, in the order of the whole relative path."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries]
    except OSError as error:
        raise ManifestError(f"{folder}: {error.strerror}") from error
    for name, is_folder, is_link in sorted(found, key=lambda entry: f"{entry[0]}/" if entry[1] else entry[0]):
        if not is_folder:
            yield folder / name
        elif not is_link:
            yield from _walk(folder / name)


def _facts(path: Path) -> dict[str, int | None]:
    try:
        status = path.stat()
    except OSError:
        return {"size": None, "modified": None}
    return {"size": status.st_size, "modified": status.st_mtime_ns // 1000}


def _tar_rows(url: str, shown: str) -> Iterator[dict[str, Any]]:
    stem = PurePosixPath(url).name.removesuffix(".tar")
    try:
        with open_file(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = (
                m for m in tar if m.isreg() and not m.issparse() and not m.name.rpartition("/")[2].startswith(".")
            )
            for key, group in groupby(members, key=lambda member: _key(member.name)[0]):
                sample = list(group)
                texts: dict[str, str | None] = dict.fromkeys(SIDECARS)
                for member in sample:
                    kind = _key(member.name)[1]
                    if kind in SIDECARS:
                        content = tar.extractfile(member)
                        texts[kind] = content.read().decode(errors="replace") if content is not None else None
                images = [m for m in sample if f".{_key(m.name)[1].rpartition('.')[2]}" in EXTENSIONS]
                for member in images:
                    name = key if len(images) == 1 else f"{key}.{_key(member.name)[1]}"
                    stop = member.offset_data + member.size
                    yield {"id": f"{stem}/{name}", "path": f"{shown}#bytes={member.offset_data}-{stop}", **texts}
            # tarfile stops at a damaged header as at the end; the real end is a block of zeros, or the end of the file.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except StorageError as error:
        raise ManifestError(str(error)) from error
    except tarfile.TarError as error:
        raise ManifestError(
            f"{url}: not a sound, plain tar ({error}); members of a compressed tar have no address, unzip it first"
        ) from error


def _key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name, the rest is the kind.

    Names that begin with a dot have no key and are skipped; macOS adds such metadata files.
    """
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), kind.lower()


def _write(rows: Iterable[dict[str, Any]], schema: pa.Schema, out: str, *, root: str) -> int:
    iterator = iter(rows)

    def tables() -> Iterator[pa.Table]:
        while chunk := list(islice(iterator, GROUP_ROWS)):
            yield pa.Table.from_pylist(chunk, schema=schema)

    return _write_tables(tables(), out, root=root)


def _write_tables(tables: Iterable[pa.Table], out: str, *, root: str) -> int:
    """Write row groups to a temporary file and publish it; nothing is written if there are no rows."""
    # `manifest tar *.tar` without an output would overwrite the last tar.
    if not out.endswith((".parquet", ".pq")):
        raise ManifestError(f"{out}: the last argument is the manifest to write, and ends in .parquet")
    target = str(Path(local_path(out)).expanduser().absolute()) if is_local(out) else out
    folder, _, name = target.rpartition("/")
    writer, rows = None, 0
    try:
        with open_storage(folder or "/").staged() as staged, ExitStack() as stack:
            for table in tables:
                if writer is None:
                    schema = table.schema.with_metadata({ROOT_KEY: root.encode()})
                    writer = stack.enter_context(pq.ParquetWriter(staged.path, schema, compression="zstd"))
                writer.write_table(table, row_group_size=GROUP_ROWS)
                rows += table.num_rows
            if writer is not None:
                writer.close()
                staged.publish(name, replace=True)
    except OSError as error:
        raise StorageError(f"{out}: {error}") from error
    return rows
