"""What a caller hands over as a manifest: a file that is one, or one that is written of paths, images or a table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.api.arrow import array, cell, check_count, id_column, plain, utf8
from pipeline.api.encode import encode
from pipeline.api.paths import check_paths, paths_of, root_of
from pipeline.core.errors import ConfigError, ManifestError, Problem
from pipeline.manifest.build import EXTENSIONS, from_folder
from pipeline.manifest.manifest import ROOT_KEY
from pipeline.storage.urls import explained, is_local, local_path

# Images are written so many at a time; a photo as PNG takes megabytes.
CHUNK = 64
# Columns that may hold the images of a table, where the caller names none.
USUAL = ("path", "image")
# Manifests that calls have written beside their outputs.
_WRITTEN = re.compile(r"\.[0-9a-f]{16}\.parquet$")


@dataclass(frozen=True, slots=True)
class Columns:
    """What the caller says of columns and rows; None leaves it to what is found."""

    id: str | None
    image: str | None
    keep: Sequence[str]
    ids: Sequence[object] | None
    root: str | None


@dataclass(frozen=True, slots=True)
class Given:
    """A manifest: values of its group in the config; ``written`` is the file that was made, if one was.

    ``schemes`` are those of web addresses that the caller handed over one by one, ``folder`` is one of images.
    """

    columns: Mapping[str, Any]
    written: Path | None = None
    schemes: Sequence[str] = field(default_factory=tuple)
    folder: str | None = None


def manifest_of(images: object, columns: Columns, out: Path) -> Given:
    """Write the manifest ``out``, unless ``images`` is the address of one.

    Raises:
        ManifestError: no images, or something that is none.
        ConfigError: columns are named for images that have none.
    """
    if isinstance(images, str | os.PathLike):
        return _at(os.fspath(images), columns, out)
    if isinstance(images, pd.DataFrame):
        return _of_frame(images, columns, out)
    images = plain(images)
    if isinstance(images, Mapping):
        raise ManifestError("images: a dict; hand over a list, a table, a folder or a manifest")
    if hasattr(images, "__arrow_c_stream__"):
        return _of_table(pa.table(images), columns, out)
    if isinstance(images, bytes) or not isinstance(images, Iterable):
        raise ManifestError(
            f"images: a single {type(images).__name__}; hand over a list, a table, a folder or a manifest"
        )
    if isinstance(images, np.ndarray) and images.ndim in (2, 3) and images.dtype.kind in "biuf":
        raise ManifestError(f"images: an array {list(images.shape)} is a single image; hand over a list of them")
    _refuse_columns(columns, "a list of images has no columns; hand over a table")
    return _of_list(images, columns, out)


def _at(address: str, columns: Columns, out: Path) -> Given:
    """A manifest, a folder of images, or one image."""
    place = Path(local_path(address)).expanduser()
    if is_local(address) and place.is_dir() and all(_WRITTEN.search(one.name) for one in place.glob("*.parquet")):
        _refuse_columns(columns, "a folder of images has no columns; ids are the relative paths")
        if columns.ids is not None:
            raise ConfigError([Problem("ids", "...", "cannot be given for a folder; ids are the relative paths")])
        utf8(str(place.resolve()), "images")
        from_folder(str(place), str(out))
        return replace(_made(out, columns.root), folder=str(place))
    if is_local(address) and place.suffix.lower() in EXTENSIONS:
        _refuse_columns(columns, "an image has no columns")
        return _of_list([address], columns, out)
    if columns.ids is not None:
        raise ConfigError([Problem("ids", "...", "cannot be given for a manifest", "name its column: id='...'")])
    named = {"id": columns.id, "image": columns.image, "root": columns.root}
    told = {key: value for key, value in named.items() if value is not None}
    return Given({"path": address, "keep": _texts(columns.keep), **{key: str(value) for key, value in told.items()}})


def _of_frame(frame: pd.DataFrame, columns: Columns, out: Path) -> Given:
    image, id = _check_names(columns, list(frame.columns))
    # The index stands for ids where there is no column of them.
    ids = None if columns.ids is None else id_column(columns.ids, len(frame))
    if ids is None and id not in frame.columns:
        way_out = "give ids=[...], name a column with id='...', or hand over frame.reset_index(drop=True)"
        ids = id_column([cell(value) for value in frame.index], len(frame), "index", way_out)
    others = frame[list(dict.fromkeys([*([id] if ids is None else []), *columns.keep]))]
    try:
        table = pa.Table.from_pandas(others.set_axis(_texts(others.columns), axis=1), preserve_index=False)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError) as error:
        raise ManifestError(f"images: a column cannot be written to Parquet: {error}") from error
    return _of_cells([cell(value) for value in frame[image]], str(image), table, str(id), ids, columns, out)


def _of_table(table: pa.Table, columns: Columns, out: Path) -> Given:
    image, id = _check_names(columns, table.column_names)
    ids = None if columns.ids is None else id_column(columns.ids, table.num_rows)
    if ids is None and id not in table.column_names:
        ids = pa.array(range(table.num_rows), pa.int64())
    others = table.select(list(dict.fromkeys([*([id] if ids is None else []), *columns.keep])))
    kind = table.schema.field(image).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _of_cells(table[image].to_pylist(), image, others, id, ids, columns, out)
    # Bytes and structs are what a manifest holds; of anything else the manifest's own check says what is wanted.
    whole = _with_ids(others, id, ids).append_column(image, table[image])
    return _write([whole], out, id=id, image=image, keep=columns.keep, root=root_of(columns.root))


def _of_cells(
    cells: list[Any],
    image: str,
    others: pa.Table,
    id: str,
    ids: pa.Array | None,
    columns: Columns,
    out: Path,
) -> Given:
    """A table of which the images were read into a list."""
    first = next((each for each in cells if each is not None), None)
    root, schemes = columns.root, tuple[str, ...]()
    if isinstance(first, Mapping):
        column = array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]), image)
    elif isinstance(first, str | os.PathLike):
        cells, root, schemes = paths_of(cells, columns.root)
        column = array(cells, pa.string(), image)
    else:
        column = pa.array([None if each is None else encode(each, f"{image}[{i}]") for i, each in enumerate(cells)],
                          pa.binary())  # fmt: skip
    rest = _with_ids(others, id, ids)
    # An id that is the path itself is written as it was given.
    name = image if image not in rest.column_names else f"{image}_"
    whole = rest.append_column(name, column)
    return _write([whole], out, id=id, image=name, keep=columns.keep, root=root_of(root), schemes=schemes)


def _of_list(images: Iterable[object], columns: Columns, out: Path) -> Given:
    items = (cell(item) for item in images)
    head = list(islice(items, CHUNK))
    first = next((item for item in head if item is not None), None)
    if isinstance(first, str | os.PathLike):
        given = [*head, *items]
        check_paths(given)
        if columns.ids is not None:
            ids = id_column(columns.ids, len(given))
        else:
            paths = [None if item is None else os.fspath(item) for item in given]
            ids = id_column(paths, len(given), "images", "paths are ids; give others with ids=[...]")
        return _of_cells(given, "path", pa.table({}), "id", ids, columns, out)
    told = None if columns.ids is None else id_column(columns.ids, len(columns.ids))

    def tables() -> Iterator[pa.Table]:
        start, chunk = 0, head
        while chunk:
            cells = [None if item is None else encode(item, f"images[{start + i}]") for i, item in enumerate(chunk)]
            end = start + len(chunk)
            if told is not None and end > len(told):
                # Whatever the iterator still holds is not waited for.
                raise ManifestError(f"ids: {len(told):,} of them for more images; give one for each, in their order")
            ids = pa.array(range(start, end), pa.int64()) if told is None else told[start:end]
            yield pa.table({"id": ids, "image": pa.array(cells, pa.binary())})
            start, chunk = end, list(islice(items, CHUNK))
        if told is not None:
            check_count(len(told), start)

    return _write(tables(), out, id="id", image="image", keep=(), root=root_of(columns.root))


def _write(
    tables: Iterable[pa.Table],
    out: Path,
    *,
    id: str,
    image: str,
    keep: Sequence[str],
    root: str,
    schemes: Sequence[str] = (),
) -> Given:
    rows, start = 0, {ROOT_KEY: utf8(root, "root")}
    with ExitStack() as opened:
        writer = None
        # What the caller's own iterator raises is the caller's.
        for table in tables:
            with explained(str(out)):
                if writer is None:
                    schema = table.schema.with_metadata(start)
                    writer = opened.enter_context(pq.ParquetWriter(out, schema, compression="zstd"))
                writer.write_table(table)
            rows += table.num_rows
        with explained(str(out)):
            opened.close()
    if not rows:
        raise ManifestError("images: nothing to embed; what was given is empty")
    return _made(out, None, id=id, image=image, keep=keep, schemes=schemes)


def _made(
    out: Path,
    root: str | None,
    *,
    id: str = "id",
    image: str = "path",
    keep: Sequence[str] = (),
    schemes: Sequence[str] = (),
) -> Given:
    named = {"path": str(out), "id": id, "image": image, "keep": _texts(keep), "root": root}
    return Given(named, written=out, schemes=schemes)


def _with_ids(table: pa.Table, id: str, ids: pa.Array | None) -> pa.Table:
    if ids is None:
        return table
    others = {name: table[name] for name in table.column_names if name != id}
    return pa.table({id: ids, **others})


def _check_names(columns: Columns, there: Sequence[Any]) -> tuple[Any, Any]:
    """The names of the columns of images and of ids, the second of which need not be there."""
    image = columns.image if columns.image is not None else next((name for name in USUAL if name in there), USUAL[0])
    id = columns.id if columns.id is not None else "id"
    wanted = dict.fromkeys([image, *([] if columns.id is None else [id]), *columns.keep])
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ManifestError(f"images: no column {missing[0]!r}; its columns are: {', '.join(map(str, there))}")
    # Numbers may be names in pandas, and are not in Parquet.
    names = _texts(there)
    twice = [name for name in _texts([*wanted, *([id] if columns.ids is None else [])]) if names.count(name) > 1]
    if twice:
        raise ManifestError(f"images: there are two columns {twice[0]!r}; rename one")
    return image, id


def _texts(names: Iterable[object]) -> list[str]:
    return [str(name) for name in names]


def _refuse_columns(columns: Columns, why: str) -> None:
    given = {"id": columns.id, "image": columns.image, "keep": list(columns.keep) or None}
    problems = [Problem(name, value, why) for name, value in given.items() if value is not None]
    if problems:
        raise ConfigError(problems)
