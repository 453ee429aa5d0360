"""What a caller hands over as a manifest: a file that is one, or one that is written of paths, images or a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.addresses import explained, is_local, local_path, scheme_of
from pipeline.api.encoded import encode
from pipeline.errors import ConfigError, ManifestError, Problem
from pipeline.manifest.build import EXTENSIONS, from_folder
from pipeline.manifest.source import ROOT_KEY

WEB = ("http", "https")
# Images are written so many at a time; a photo as PNG takes megabytes.
CHUNK = 64
# Columns that may hold the images of a table, where the caller names none.
USUAL = ("path", "image")


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

    ``schemes`` are those of web addresses that the caller handed over one by one.
    """

    columns: Mapping[str, Any]
    written: Path | None = None
    schemes: Sequence[str] = field(default_factory=tuple)


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
    if isinstance(images, Mapping):
        raise ManifestError("images: a dict; hand over a list, a table, a folder or a manifest")
    if hasattr(images, "__arrow_c_stream__"):
        return _of_table(pa.table(images), columns, out)
    if isinstance(images, bytes) or not isinstance(images, Iterable):
        raise ManifestError(
            f"images: a single {type(images).__name__}; hand over a list, a table, a folder or a manifest"
        )
    _refuse_columns(columns, "a list of images has no columns; hand over a table")
    return _of_list(images, columns, out)


def _at(address: str, columns: Columns, out: Path) -> Given:
    """A manifest, a folder of images, or one image."""
    place = Path(local_path(address)).expanduser()
    if is_local(address) and place.is_dir() and not any(place.glob("*.parquet")):
        _refuse_columns(columns, "a folder of images has no columns; ids are the relative paths")
        if columns.ids is not None:
            raise ConfigError([Problem("ids", "...", "cannot be given for a folder; ids are the relative paths")])
        from_folder(str(place), str(out))
        return _made(out, columns.root)
    if is_local(address) and place.suffix.lower() in EXTENSIONS:
        _refuse_columns(columns, "an image has no columns")
        return _of_list([address], columns, out)
    if columns.ids is not None:
        raise ConfigError([Problem("ids", "...", "cannot be given for a manifest", "name its column: id='...'")])
    named = {"id": columns.id, "image": columns.image, "root": columns.root}
    told = {key: value for key, value in named.items() if value is not None}
    return Given({"path": address, "keep": list(columns.keep), **told})


def _of_frame(frame: pd.DataFrame, columns: Columns, out: Path) -> Given:
    image = columns.image or _usual(list(frame.columns))
    id = columns.id or "id"
    _check_names([image, *([columns.id] if columns.id else []), *columns.keep], list(frame.columns))
    # The index stands for ids where there is no column of them.
    ids = columns.ids if columns.ids is not None else list(frame.index) if id not in frame.columns else None
    others = list(dict.fromkeys([*([id] if ids is None else []), *columns.keep]))
    try:
        table = pa.Table.from_pandas(frame[others], preserve_index=False)
    except pa.ArrowException as error:
        raise ManifestError(f"images: a column cannot be written to Parquet: {error}") from error
    return _of_cells([_cell(value) for value in frame[image]], image, table, id, ids, columns, out)


def _of_table(table: pa.Table, columns: Columns, out: Path) -> Given:
    image, id = columns.image or _usual(table.column_names), columns.id or "id"
    _check_names([image, *([columns.id] if columns.id else []), *columns.keep], table.column_names)
    ids = columns.ids
    if ids is None and id not in table.column_names:
        ids = range(table.num_rows)
    others = table.select(list(dict.fromkeys([*([id] if ids is None else []), *columns.keep])))
    kind = table.schema.field(image).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _of_cells(table[image].to_pylist(), image, others, id, ids, columns, out)
    # Bytes and structs are what a manifest holds; of anything else the manifest's own check says what is wanted.
    whole = _with_ids(others, id, ids, table.num_rows).append_column(image, table[image])
    return _write([whole], out, id=id, image=image, keep=columns.keep, root=_root(columns.root))


def _of_cells(
    cells: list[Any],
    image: str,
    others: pa.Table,
    id: str,
    ids: Sequence[object] | None,
    columns: Columns,
    out: Path,
) -> Given:
    """A table of which the images were read into a list."""
    first = next((cell for cell in cells if cell is not None), None)
    root, schemes = columns.root, tuple[str, ...]()
    if isinstance(first, Mapping):
        array = _array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]), image)
    elif isinstance(first, str | os.PathLike):
        cells, root, schemes = _paths(cells, columns.root)
        array = _array(cells, pa.string(), image)
    else:
        array = pa.array([None if cell is None else encode(cell, f"{image}[{i}]") for i, cell in enumerate(cells)],
                         pa.binary())  # fmt: skip
    rest = _with_ids(others, id, ids, len(cells))
    # An id that is the path itself is written as it was given.
    name = image if image not in rest.column_names else f"{image}_"
    whole = rest.append_column(name, array)
    return _write([whole], out, id=id, image=name, keep=columns.keep, root=_root(root), schemes=schemes)


def _of_list(images: Iterable[object], columns: Columns, out: Path) -> Given:
    items = iter(images)
    head = list(islice(items, CHUNK))
    first = next((item for item in head if item is not None), None)
    if isinstance(first, str | os.PathLike):
        given = [_cell(item) for item in chain(head, items)]
        ids = columns.ids
        if ids is None:
            ids = [None if item is None else os.fspath(item) for item in given]
            _check_unique(ids)
        return _of_cells(given, "path", pa.table({}), "id", ids, columns, out)

    def tables() -> Iterator[pa.Table]:
        start, chunk = 0, head
        while chunk:
            cells = [None if item is None else encode(item, f"images[{start + i}]") for i, item in enumerate(chunk)]
            numbers: Sequence[object] = range(start, start + len(chunk))
            if columns.ids is not None:
                numbers = columns.ids[start : start + len(chunk)]
            yield _with_ids(pa.table({}), "id", numbers, len(chunk)).append_column(
                "image", pa.array(cells, pa.binary())
            )
            start, chunk = start + len(chunk), list(islice(items, CHUNK))
        if columns.ids is not None and len(columns.ids) != start:
            raise _other_count(len(columns.ids), start)

    return _write(tables(), out, id="id", image="image", keep=(), root=_root(columns.root))


def _paths(cells: list[Any], root: str | None) -> tuple[list[Any], str | None, tuple[str, ...]]:
    """Paths as a manifest has them, where they start, and which kinds of web addresses are among them.

    Without a root, local paths are made absolute and start at the folder that holds them all.
    """
    strange = next(((i, c) for i, c in enumerate(cells) if not isinstance(c, str | os.PathLike | None)), None)
    if strange is not None:
        raise ManifestError(f"images[{strange[0]}]: {type(strange[1]).__name__} among paths; hand over one kind")
    paths = [None if cell is None else os.fspath(cell) for cell in cells]
    known = [path for path in paths if path]
    schemes = tuple(sorted({scheme_of(path) for path in known} & {*WEB}))
    if root is not None:
        return paths, root, schemes
    local = {path: os.path.abspath(os.path.expanduser(local_path(path))) for path in known if is_local(path)}
    if local:
        root = os.path.commonpath([os.path.dirname(path) for path in local.values()])
    elif remote := [path for path in known if scheme_of(path) not in WEB]:
        levels = zip(*(path.split("/")[:-1] for path in remote), strict=False)
        root = "/".join(names[0] for names in takewhile(lambda names: len({*names}) == 1, levels))
        if not root.partition("://")[2]:
            raise ManifestError("images: addresses in several stores; give those of each to a call of their own")
    return [local.get(path, path) if path else path for path in paths], root, schemes


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
    rows = 0
    with explained(str(out)), ExitStack() as opened:
        writer = None
        for table in tables:
            if writer is None:
                schema = table.schema.with_metadata({ROOT_KEY: root.encode()})
                writer = opened.enter_context(pq.ParquetWriter(out, schema, compression="zstd"))
            writer.write_table(table)
            rows += table.num_rows
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
    named = {"path": str(out), "id": id, "image": image, "keep": list(keep), "root": root}
    return Given(named, written=out, schemes=schemes)


def _with_ids(table: pa.Table, id: str, ids: Sequence[object] | None, rows: int) -> pa.Table:
    if ids is None:
        return table
    if len(ids) != rows:
        raise _other_count(len(ids), rows)
    try:
        column = pa.array(ids)
    except (pa.ArrowException, TypeError) as error:
        raise ManifestError(f"ids: must be all texts or all whole numbers ({error})") from error
    others = {name: table[name] for name in table.column_names if name != id}
    return pa.table({id: column, **others})


def _other_count(ids: int, rows: int) -> ManifestError:
    return ManifestError(f"ids: {ids:,} of them for {rows:,} images; give one for each, in their order")


def _check_unique(paths: Sequence[object]) -> None:
    seen: set[object] = set()
    for place, path in enumerate(paths):
        if path in seen:
            raise ManifestError(f"images[{place}]: {path} stands there twice, and ids must be unique; give ids=[...]")
        seen.add(path)


def _check_names(wanted: Sequence[str], there: Sequence[Any]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ManifestError(f"images: no column {missing[0]!r}; its columns are: {', '.join(map(str, there))}")


def _refuse_columns(columns: Columns, why: str) -> None:
    given = {"id": columns.id, "image": columns.image, "keep": list(columns.keep) or None}
    problems = [Problem(name, value, why) for name, value in given.items() if value is not None]
    if problems:
        raise ConfigError(problems)


def _usual(names: Sequence[str]) -> str:
    return next((name for name in USUAL if name in names), USUAL[0])


def _array(cells: list[Any], kind: pa.DataType, image: str) -> pa.Array:
    try:
        return pa.array(cells, kind)
    except (pa.ArrowException, TypeError) as error:
        raise ManifestError(f"images: column {image!r} holds more than one kind ({error})") from error


def _cell(value: Any) -> Any:
    """None for what pandas puts where a value is missing."""
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value) else value


def _root(root: str | None) -> str:
    """Where relative paths start, from wherever the manifest is read."""
    if root is not None and not is_local(root):
        return root
    return os.path.abspath(os.path.expanduser(local_path(root or ".")))
