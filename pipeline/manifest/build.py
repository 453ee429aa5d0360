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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.extensions import BY_FORMAT
from pipeline.core.concurrency import in_order
from pipeline.core.errors import ManifestError, StorageError
from pipeline.core.processes import cores
from pipeline.manifest.csv_table import read_table
from pipeline.manifest.folder import LeftOut, list_files
from pipeline.manifest.manifest import FILES_AT_A_TIME, ROOT_KEY
from pipeline.manifest.tars import SIDECARS, expanded, is_image_kind, key_of, refuse_repeated, stem_of
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import is_local, local_file, open_file, scheme_of

GROUP_ROWS = 65_536


def from_folder(folder: str, out: str, *, left_out: LeftOut | None = None, every: bool = False) -> int:
    """Write a row for every image file below ``folder``, sorted by path; return the number of rows.

    Columns: ``id`` (the relative path), ``path`` (the same), ``size`` (bytes) and ``modified`` (UTC).
    Files are chosen by their extensions; the job checks their content. Links to folders are not followed; a broken
    link has neither size nor date.

    Args:
        folder: a path or an fsspec address.
        out: the Parquet file to write.
        left_out: counts the files that are left out.
        every: take every file, whatever its name is.

    Raises:
        ManifestError: no such folder, no images in it, or a name that is not UTF-8.
    """
    left_out = LeftOut() if left_out is None else left_out
    root = str(local_file(folder).resolve()) if is_local(folder) else folder.rstrip("/")
    schema = pa.schema(
        [("id", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("modified", pa.timestamp("us", tz="UTC"))]
    )
    left_out.own = str(local_file(out).resolve()) if is_local(out) else out

    def rows() -> Iterator[dict[str, Any]]:
        for file in list_files(folder, left_out, every=every):
            # A name that looks like an address is no address.
            path = f"./{file.name}" if scheme_of(file.name) and is_local(root) else file.name
            yield {"id": file.name, "path": path, "size": file.size, "modified": file.modified}

    written = _write(rows(), schema, out, root=root)
    if not written:
        usual = ", ".join(each[0] for each in BY_FORMAT.values())
        said = f"; {left_out}" if str(left_out) else ""
        raise ManifestError(f"{folder}: no files that end in {usual} or the like{said}")
    return written


def from_csv(path: str, out: str, *, image: str, id: str | None, root: str | None) -> int:
    """Write every row of a CSV with a header, with all columns; return the number of rows.

    The id and image columns are read as text, so that ``00123`` stays ``00123``; other types are inferred
    from all rows, for which the table is held in memory. Without ``id``, a column ``id`` is made of the
    image paths. Relative paths start at ``root``, by default the folder of the CSV. Encoding and delimiter see
    :func:`pipeline.manifest.csv_table.read_table`.

    Raises:
        ManifestError: not readable, a column is missing, or there are no rows.
    """
    table, id = read_table(path, image, id)
    if not table.num_rows:
        raise ManifestError(f"{path}: a header without rows")
    if id is None:
        table = table.add_column(0, "id", table.column(image))
    if root is None:
        root = str(local_file(path).resolve().parent) if is_local(path) else path.rpartition("/")[0]
    elif is_local(root):
        root = str(local_file(root).resolve())
    return _write_tables([table], out, root=root)


def from_tars(paths: Sequence[str], out: str) -> int:
    """Write a row for every image in WebDataset tars, addressed by its bytes; nothing is unpacked.

    Columns: ``id`` (tar name and key), ``path`` (``<tar>#bytes=START-STOP``), and the text of the members with the
    same key: ``txt``, ``json`` and ``cls``, null where there is none. Returns the number of rows. Some tars are read
    side by side, and each of them once from end to end.

    Args:
        paths: files, globs, or ranges such as ``s3://bucket/{00000..41454}.tar``.
        out: the Parquet file to write.

    Raises:
        ManifestError: a tar is compressed or damaged, a glob matches none, two have one name, or there are no images.
    """
    local = all(is_local(path) for path in paths)
    names = [str(local_file(name).resolve()) if local else name for path in paths for name in expanded(path)]
    refuse_repeated(names)
    root = os.path.commonpath([os.path.dirname(name) for name in names]) if local else names[0].rpartition("/")[0]
    schema = pa.schema([(name, pa.string()) for name in ("id", "path", *SIDECARS)])

    def rows_of(name: str) -> list[dict[str, Any]]:
        return list(_tar_rows(name, os.path.relpath(name, root) if local else name))

    threads = cores() if local else FILES_AT_A_TIME
    rows = (row for found in in_order(rows_of, names, threads=threads) for row in found)
    written = _write(rows, schema, out, root=root)
    if not written:
        raise ManifestError(
            f"{', '.join(paths)}: no images; a WebDataset tar holds members such as 0001.jpg and 0001.txt"
        )
    return written


def _tar_rows(url: str, shown: str) -> Iterator[dict[str, Any]]:
    stem = stem_of(url)
    try:
        with open_file(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = (
                m for m in tar if m.isreg() and not m.issparse() and not m.name.rpartition("/")[2].startswith(".")
            )
            for key, group in groupby(members, key=lambda member: key_of(member.name)[0]):
                sample = list(group)
                texts: dict[str, str | None] = dict.fromkeys(SIDECARS)
                for member in sample:
                    kind = key_of(member.name)[1]
                    if kind in SIDECARS:
                        content = tar.extractfile(member)
                        texts[kind] = content.read().decode(errors="replace") if content is not None else None
                images = [m for m in sample if is_image_kind(key_of(m.name)[1])]
                for member in images:
                    name = key if len(images) == 1 else f"{key}.{key_of(member.name)[1]}"
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
            f"{url}: not a sound, plain tar ({error}); members of a compressed tar have no address, unzip it first, or "
            "give manifest.path of a job tars that gzip compressed"
        ) from error


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
    target = str(local_file(out).absolute()) if is_local(out) else out
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
