"""The images of a call as a manifest: an existing one, or one written from paths, images, a folder or a table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.api.arrow import cell, check_count, id_column, to_column, to_list, utf8
from pipeline.api.encode import encode
from pipeline.api.paths import absolute, check_paths, paths_of
from pipeline.config.extensions import EXTENSIONS
from pipeline.core.errors import ConfigError, ManifestError, Problem
from pipeline.core.plain import plain_table, plain_type
from pipeline.manifest.build import from_folder
from pipeline.manifest.manifest import ROOT_KEY
from pipeline.storage.urls import explained, is_local, local_file

# Images that are encoded and written at a time; a photo as PNG takes megabytes.
CHUNK = 64
# Default names of the image column of a table.
USUAL = ("path", "image")
# Manifests that earlier calls wrote beside their outputs.
_WRITTEN = re.compile(r"\.[0-9a-f]{16}\.parquet$")


@dataclass(frozen=True, slots=True)
class Columns:
    """Arguments of the caller about columns and rows; None is the default, which depends on the images."""

    id: str | None
    image: str | None
    keep: Sequence[str]
    ids: Sequence[object] | None
    root: str | None
    text: str | None = None

    @property
    def copied(self) -> list[str]:
        """The columns that are written beside the id and the images."""
        return [*self.keep, *([self.text] if self.text is not None else [])]


@dataclass(frozen=True, slots=True)
class InputManifest:
    """Values of the config group ``manifest``; ``written`` is the file, if this call wrote it.

    ``schemes`` are those of web addresses that were given one by one; ``folder`` is the folder of images, if any.
    """

    config: Mapping[str, Any]
    written: Path | None = None
    schemes: Sequence[str] = ()
    folder: str | None = None


def manifest_of(images: object, columns: Columns, out: Path) -> InputManifest:
    """Write the manifest ``out``, unless ``images`` is the address of one.

    Raises:
        ManifestError: there are no images, or a value is not an image.
        ConfigError: columns are named for images without columns.
    """
    if isinstance(images, str | os.PathLike):
        return _from_address(os.fspath(images), columns, out)
    if isinstance(images, pd.DataFrame):
        return _from_frame(images, columns, out)
    images = to_list(images)
    if isinstance(images, Mapping):
        raise ManifestError("images: a dict; give a list, a table, a folder or a manifest")
    if hasattr(images, "__arrow_c_stream__"):
        # Parquet does not hold every encoding of Arrow.
        return _from_table(plain_table(pa.table(images), kept=True), columns, out)
    if isinstance(images, bytes) or not isinstance(images, Iterable):
        raise ManifestError(f"images: a single {type(images).__name__}; give a list, a table, a folder or a manifest")
    if isinstance(images, np.ndarray) and images.ndim in (2, 3) and images.dtype.kind in "biuf":
        raise ManifestError(f"images: an array {list(images.shape)} is a single image; give a list of them")
    _refuse_columns(columns, "a list of images has no columns; give a table")
    return _from_list(images, columns, out)


def _from_address(address: str, columns: Columns, out: Path) -> InputManifest:
    """A manifest, a folder of images, or one image."""
    path = local_file(address)
    if is_local(address) and path.is_dir() and all(_WRITTEN.search(one.name) for one in path.glob("*.parquet")):
        _refuse_columns(columns, "a folder of images has no columns; ids are the relative paths")
        if columns.ids is not None:
            raise ConfigError([Problem("ids", "...", "cannot be given for a folder; ids are the relative paths")])
        utf8(str(path.resolve()), "images")
        from_folder(str(path), str(out))
        return InputManifest(_config(out, "id", "path", root=columns.root), out, folder=str(path))
    if is_local(address) and path.suffix.lower() in EXTENSIONS:
        _refuse_columns(columns, "an image has no columns")
        return _from_list([address], columns, out)
    if columns.ids is not None:
        raise ConfigError([Problem("ids", "...", "cannot be given for a manifest", "name its column: id='...'")])
    named = {"id": columns.id, "image": columns.image, "root": columns.root, "text": columns.text}
    given = {key: str(value) for key, value in named.items() if value is not None}
    return InputManifest({"path": address, "keep": _names(columns.keep), **given})


def _from_frame(frame: pd.DataFrame, columns: Columns, out: Path) -> InputManifest:
    columns = _resolve(columns, list(frame.columns))
    ids = None if columns.ids is None else id_column(columns.ids, len(frame))
    if ids is None and columns.id not in frame.columns:
        # Without an id column, the index holds the ids.
        way_out = "give ids=[...], name a column with id='...', or pass frame.reset_index(drop=True)"
        ids = id_column([cell(value) for value in frame.index], len(frame), "index", way_out)
    others = frame[list(dict.fromkeys([*([columns.id] if ids is None else []), *columns.copied]))]
    try:
        table = pa.Table.from_pandas(others.set_axis(_names(others.columns), axis=1), preserve_index=False)
        table = plain_table(table, kept=True)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError) as error:
        raise ManifestError(f"images: a column cannot be written to Parquet: {error}") from error
    cells = [cell(value) for value in frame[columns.image]]
    return _from_cells(cells, _with_ids(table, str(columns.id), ids), columns, out)


def _from_table(table: pa.Table, columns: Columns, out: Path) -> InputManifest:
    columns = _resolve(columns, table.column_names)
    id, image = str(columns.id), str(columns.image)
    ids = None if columns.ids is None else id_column(columns.ids, table.num_rows)
    if ids is None and id not in table.column_names:
        ids = pa.array(range(table.num_rows), pa.int64())
    others = table.select(list(dict.fromkeys([*([id] if ids is None else []), *columns.copied])))
    others = _with_ids(others, id, ids)
    kind = plain_type(table.schema.field(image).type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _from_cells(table[image].to_pylist(), others, columns, out)
    # A manifest holds bytes and structs unchanged; its own check refuses any other type.
    config = _config(out, id, image, columns)
    return _write([others.append_column(image, table[image])], InputManifest(config, out), columns.root)


def _from_cells(cells: list[Any], others: pa.Table, columns: Columns, out: Path) -> InputManifest:
    """Write a column of images beside ``others``, the ids and the kept columns."""
    first = next((each for each in cells if each is not None), None)
    name, root, schemes = str(columns.image), columns.root, tuple[str, ...]()
    if isinstance(first, Mapping):
        column = to_column(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]), name)
    elif isinstance(first, str | os.PathLike):
        paths = paths_of(cells, root)
        root, schemes = paths.root, paths.schemes
        column = to_column(paths.cells, pa.string(), name)
    else:
        encoded = [None if each is None else encode(each, f"{name}[{i}]") for i, each in enumerate(cells)]
        column = pa.array(encoded, pa.binary())
    # The image column may be kept, or hold the ids, too; that copy is written as it was given.
    name = name if name not in others.column_names else f"{name}_"
    config = _config(out, str(columns.id), name, columns)
    return _write([others.append_column(name, column)], InputManifest(config, out, schemes), root)


def _from_list(images: Iterable[object], columns: Columns, out: Path) -> InputManifest:
    items = (cell(item) for item in images)
    head = list(islice(items, CHUNK))
    first = next((item for item in head if item is not None), None)
    if isinstance(first, str | os.PathLike):
        cells = [*head, *items]
        check_paths(cells)
        if columns.ids is not None:
            ids = id_column(columns.ids, len(cells))
        else:
            paths = [None if item is None else os.fspath(item) for item in cells]
            ids = id_column(paths, len(cells), "images", "paths are ids; give others with ids=[...]")
        return _from_cells(cells, pa.table({"id": ids}), replace(columns, id="id", image="path"), out)
    given = None if columns.ids is None else id_column(columns.ids, len(columns.ids))

    def tables() -> Iterator[pa.Table]:
        start, chunk = 0, head
        while chunk:
            cells = [None if item is None else encode(item, f"images[{start + i}]") for i, item in enumerate(chunk)]
            end = start + len(chunk)
            if given is not None and end > len(given):
                # The rest of the iterator is not consumed.
                raise ManifestError(f"ids: {len(given):,} of them for more images; give one for each, in their order")
            ids = pa.array(range(start, end), pa.int64()) if given is None else given[start:end]
            yield pa.table({"id": ids, "image": pa.array(cells, pa.binary())})
            start, chunk = end, list(islice(items, CHUNK))
        if given is not None:
            check_count(len(given), start)

    return _write(tables(), InputManifest(_config(out, "id", "image"), out), columns.root)


def _write(tables: Iterable[pa.Table], manifest: InputManifest, root: str | None) -> InputManifest:
    """Write the manifest's file, with the root of relative paths, absolute, in its metadata."""
    out, metadata = str(manifest.written), {ROOT_KEY: utf8(absolute(root or "."), "root")}
    rows, writer = 0, None
    with ExitStack() as opened:
        # An error of the caller's own iterator is raised unchanged, so only the writes are explained.
        for table in tables:
            with explained(out):
                if writer is None:
                    schema = table.schema.with_metadata(metadata)
                    writer = opened.enter_context(pq.ParquetWriter(out, schema, compression="zstd"))
                writer.write_table(table)
            rows += table.num_rows
        with explained(out):
            opened.close()
    if not rows:
        raise ManifestError("images: nothing to embed; the input is empty")
    return manifest


def _config(out: Path, id: str, image: str, columns: Columns | None = None, root: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(out), "id": id, "image": image, "keep": [], "root": root}
    if columns is not None:
        found["keep"] = _names(columns.keep)
        found |= {} if columns.text is None else {"text": str(columns.text)}
    return found


def _with_ids(table: pa.Table, id: str, ids: pa.Array | None) -> pa.Table:
    """The table with other ids in the first column, unless ``ids`` is None."""
    if ids is None:
        return table
    others = {name: table[name] for name in table.column_names if name != id}
    return pa.table({id: ids, **others})


def _resolve(columns: Columns, there: Sequence[Any]) -> Columns:
    """The arguments with the names of the image column, which must exist, and of the id column, which need not."""
    image = columns.image if columns.image is not None else next((name for name in USUAL if name in there), USUAL[0])
    id = columns.id if columns.id is not None else "id"
    wanted = dict.fromkeys([image, *([] if columns.id is None else [id]), *columns.copied])
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ManifestError(f"images: no column {missing[0]!r}; its columns are: {', '.join(map(str, there))}")
    # Names may be numbers in pandas, and must be texts in Parquet.
    names = _names(there)
    repeated = [name for name in _names([*wanted, *([id] if columns.ids is None else [])]) if names.count(name) > 1]
    if repeated:
        raise ManifestError(f"images: there are two columns {repeated[0]!r}; rename one")
    return replace(columns, id=id, image=image)


def _names(names: Iterable[object]) -> list[str]:
    return [str(name) for name in names]


def _refuse_columns(columns: Columns, why: str) -> None:
    given = {"id": columns.id, "image": columns.image, "text": columns.text, "keep": list(columns.keep) or None}
    problems = [Problem(name, value, why) for name, value in given.items() if value is not None]
    if problems:
        raise ConfigError(problems)
