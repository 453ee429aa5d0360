"""Cells and ids of what a caller hands over, as Arrow has them; an error names the place of the one that is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.core.errors import ConfigError, ManifestError, Problem

# What Arrow raises for a value that a column cannot hold: of another kind, too large, or no UTF-8.
_REFUSALS = (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError)
_IDS = "give one for each image, unique, all texts or all whole numbers"


def cell(value: Any) -> Any:
    """None for what pandas puts where a value is missing."""
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value) else value


def plain(values: Any) -> Any:
    """A list of what is a column: a pandas or polars Series, an Arrow array; anything else as it is."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.to_pylist()
    # Tables have no such method.
    return [cell(value) for value in values.to_list()] if hasattr(values, "to_list") else values


def listed(ids: object) -> Sequence[object] | None:
    """The ids of a call, which may be a column of pandas or an array.

    Raises:
        ConfigError: they are no list.
    """
    ids = plain(ids)
    if ids is None:
        return None
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ConfigError([Problem("ids", ids, "must be a list with one id for each image")])
    return [each.item() if hasattr(each, "item") else each for each in ids]


def id_column(ids: Sequence[object], rows: int, name: str = "ids", way_out: str = _IDS) -> pa.Array:
    """Ids as a column; ``name`` says where they come from, ``way_out`` what to do where they are not good.

    Raises:
        ManifestError: not as many as rows, more than one kind, one is missing or stands there twice.
    """
    check_count(len(ids), rows)
    try:
        column = pa.array(ids)
    except _REFUSALS as error:
        raise ManifestError(f"{name}{_place(ids, None)}: no id ({error}); {way_out}") from error
    if column.null_count:
        missing = column.is_null().to_pylist().index(True)
        raise ManifestError(f"{name}[{missing}]: there is none, and every row needs an id; {way_out}")
    if pa.types.is_string(column.type) or pa.types.is_integer(column.type):
        seen: set[object] = set()
        for place, id in enumerate(ids):
            if id in seen:
                raise ManifestError(f"{name}[{place}]: {id!r} stands there twice, and ids must be unique; {way_out}")
            seen.add(id)
    return column


def check_count(ids: int, rows: int) -> None:
    """Refuse fewer or more ids than rows.

    Raises:
        ManifestError: with both numbers.
    """
    if ids != rows:
        raise ManifestError(f"ids: {ids:,} of them for {rows:,} images; give one for each, in their order")


def array(cells: Sequence[Any], kind: pa.DataType, name: str) -> pa.Array:
    """The cells of one column.

    Raises:
        ManifestError: one is not of that kind.
    """
    try:
        return pa.array(cells, kind)
    except UnicodeEncodeError as error:
        place = _place(cells, kind)
        raise ManifestError(
            f"{name}{place}: holds bytes that are no UTF-8; rename the file, or hand over its bytes"
        ) from error
    except _REFUSALS as error:
        raise ManifestError(f"{name}{_place(cells, kind)}: not of the kind of the others ({error})") from error


def utf8(text: str, name: str) -> bytes:
    """The bytes of a text.

    Raises:
        ManifestError: it is no UTF-8, as names of files may be.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(f"{name}: {text!r} holds bytes that are no UTF-8; rename the folder") from error


def _place(values: Sequence[Any], kind: pa.DataType | None) -> str:
    """Where the first stands that no column could hold; nothing where only together they cannot be one."""
    for place, value in enumerate(values):
        try:
            pa.array([value], kind)
        except _REFUSALS:
            return f"[{place}]"
    return ""
