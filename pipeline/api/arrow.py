"""Arrow columns from Python values; an error names the position of the wrong value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.core.errors import ConfigError, ManifestError, Problem

# Errors of Arrow for a value that a column cannot hold: of another type, too large, or not UTF-8.
_ERRORS = (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError)
_IDS = "give one for each image, unique, all texts or all whole numbers"


def cell(value: Any) -> Any:
    """The value, or None for a missing value of pandas."""
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value) else value


def to_list(values: Any) -> Any:
    """A list of a pandas or polars Series or an Arrow array; any other value is returned unchanged."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.to_pylist()
    # Tables have no such method.
    return [cell(value) for value in values.to_list()] if hasattr(values, "to_list") else values


def id_list(ids: object) -> Sequence[object] | None:
    """The argument ``ids`` as a list; it may be a column of pandas or an array.

    Raises:
        ConfigError: it is not a list.
    """
    ids = to_list(ids)
    if ids is None:
        return None
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ConfigError([Problem("ids", ids, "must be a list with one id for each image")])
    return [each.item() if hasattr(each, "item") else each for each in ids]


def id_column(ids: Sequence[object], rows: int, name: str = "ids", way_out: str = _IDS) -> pa.Array:
    """Ids as a column; messages call them ``name`` and end with ``way_out``.

    Raises:
        ManifestError: another number of ids than rows, ids of several types, a missing or repeated id.
    """
    check_count(len(ids), rows)
    try:
        column = pa.array(ids)
    except _ERRORS as error:
        raise ManifestError(f"{name}{_position(ids, None)}: not an id ({error}); {way_out}") from error
    if column.null_count:
        missing = column.is_null().to_pylist().index(True)
        raise ManifestError(f"{name}[{missing}]: is missing, and every row needs an id; {way_out}")
    if pa.types.is_string(column.type) or pa.types.is_integer(column.type):
        seen: set[object] = set()
        for position, id in enumerate(ids):
            if id in seen:
                raise ManifestError(f"{name}[{position}]: {id!r} occurs twice, and ids must be unique; {way_out}")
            seen.add(id)
    return column


def check_count(ids: int, rows: int) -> None:
    """Refuse another number of ids than rows.

    Raises:
        ManifestError: with both numbers.
    """
    if ids != rows:
        raise ManifestError(f"ids: {ids:,} of them for {rows:,} images; give one for each, in their order")


def to_column(cells: Sequence[Any], kind: pa.DataType, name: str) -> pa.Array:
    """The cells as a column of a type.

    Raises:
        ManifestError: a cell is not of the type.
    """
    try:
        return pa.array(cells, kind)
    except UnicodeEncodeError as error:
        position = _position(cells, kind)
        raise ManifestError(
            f"{name}{position}: holds bytes that are not UTF-8; rename the file, or pass its content"
        ) from error
    except _ERRORS as error:
        raise ManifestError(f"{name}{_position(cells, kind)}: not of the type of the others ({error})") from error


def utf8(text: str, name: str) -> bytes:
    """The bytes of a text.

    Raises:
        ManifestError: it is not UTF-8, as names of files may be.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(f"{name}: {text!r} holds bytes that are not UTF-8; rename the folder") from error


def _position(values: Sequence[Any], kind: pa.DataType | None) -> str:
    """The index of the first value that Arrow refuses, as ``[3]``; empty if it refuses only their combination."""
    for position, value in enumerate(values):
        try:
            pa.array([value], kind)
        except _ERRORS:
            return f"[{position}]"
    return ""
