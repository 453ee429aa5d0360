"""Columns in every encoding that Arrow has for them, for manifests of twelve rows."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.jobs import scene

ROWS = 12
TEXTS = [f"scene {number:02d}" for number in range(ROWS)]
NUMBERS = [7 * number for number in range(ROWS)]


def dictionary(values: Sequence[Any], kind: pa.DataType | None = None, index: pa.DataType | None = None) -> pa.Array:
    """The values as a dictionary array."""
    encoded = pa.array(values, kind).dictionary_encode()
    return encoded if index is None else encoded.cast(pa.dictionary(index, encoded.type.value_type))


def texts(values: Sequence[Any]) -> dict[str, pa.Array]:
    """Texts in every encoding that a Parquet file may have."""
    return {
        "string": pa.array(values, pa.string()),
        "large_string": pa.array(values, pa.large_string()),
        "string_view": pa.array(values, pa.string_view()),
        "dictionary": dictionary(values),
        "dictionary-int8": dictionary(values, index=pa.int8()),
        "dictionary-large": dictionary(values, pa.large_string()),
    }


def blobs(values: Sequence[bytes | None]) -> dict[str, pa.Array]:
    """Bytes in every encoding; those of a fixed size are filled up with zeros, which decoders of JPEG ignore."""
    size = max(len(value) for value in values if value is not None)
    padded = [None if value is None else value.ljust(size, b"\0") for value in values]
    return {
        "binary": pa.array(values, pa.binary()),
        "large_binary": pa.array(values, pa.large_binary()),
        "binary_view": pa.array(values, pa.binary_view()),
        "dictionary-binary": dictionary(values),
        "fixed_size_binary": pa.array(padded, pa.binary(size)),
    }


def integers() -> dict[str, pa.Array]:
    """Integers of every width, and a dictionary of them."""
    kinds = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    found = {kind: pa.array(NUMBERS, pa.type_for_alias(kind)) for kind in kinds}
    large = pa.array([2**64 - 1 - number for number in NUMBERS], pa.uint64())
    return {**found, "uint64-large": large, "dictionary-int": dictionary(NUMBERS)}


IDS = {**texts(TEXTS), **integers()}


TEXT_KINDS, BYTES_KINDS = tuple(texts(["a"])), tuple(blobs([b"a"]))
# Bytes and paths of a struct, each kind at least once.
_PAIRS = (*zip(BYTES_KINDS, TEXT_KINDS, strict=False), ("binary", "dictionary-large"), ("binary_view", "string"))
IMAGES = (*TEXT_KINDS, *BYTES_KINDS, *(f"struct-{kind}-{place}" for kind, place in _PAIRS), "struct-alone")


def images(folder: Path) -> dict[str, pa.Array]:
    """The image column in every encoding; the files of paths are written to ``folder``. The last row has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [scene(number)[0] for number in range(ROWS - 1)]
    names = [f"{number:02d}.jpg" for number in range(ROWS - 1)]
    for name, data in zip(names, pictures, strict=True):
        (folder / name).write_bytes(data)
    found = {**texts([*names, None]), **blobs([*pictures, None])}
    cells = blobs([*pictures[:6], *[None] * (ROWS - 6)])
    places = texts([*[None] * 6, *names[6:], None])
    for kind, place in _PAIRS:
        struct = pa.StructArray.from_arrays([cells[kind], places[place]], ["bytes", "path"])
        found[f"struct-{kind}-{place}"] = struct
    found["struct-alone"] = pa.StructArray.from_arrays([blobs([*pictures, None])["binary_view"]], ["bytes"])
    return found


def kept() -> dict[str, pa.Array]:
    """Columns of every type that Parquet holds, all with nulls."""
    some = [None if number % 5 == 2 else number for number in range(ROWS)]
    words = [None if number is None else f"w{number % 4}" for number in some]
    lists = [None if number is None else [f"{number}", f"w{number % 3}"][: number % 3] for number in some]
    view = pa.string_view()
    pairs = [None if word is None else [(word, word)] for word in words]
    days = [None if number is None else datetime.date(2026, 1, 1 + number) for number in some]
    prices = [None if number is None else Decimal(number) / 4 for number in some]
    keys = [None if number is None else uuid.UUID(int=number).bytes for number in some]
    flags = pa.array([None if number is None else number % 2 for number in some], pa.int8())
    return {
        **{f"text_{name.replace('-', '_')}": column for name, column in texts(words).items()},
        **{f"bytes_{name.replace('-', '_')}": column for name, column in blobs(
            [None if word is None else word.encode() for word in words]).items()},
        "dictionary_of_numbers": dictionary(some),
        "ordered": pa.DictionaryArray.from_arrays(
            pa.array([None if number is None else number % 2 for number in some], pa.int8()),
            pa.array(["low", "high"]), ordered=True),
        "list": pa.array(lists, pa.list_(pa.string())),
        "large_list": pa.array(lists, pa.large_list(pa.string())),
        "list_of_views": pa.array(lists, pa.list_(view)),
        "list_view": pa.array(lists, pa.list_view(pa.string())),
        "large_list_view": pa.array(lists, pa.large_list_view(pa.string())),
        "fixed_list": pa.array([None if n is None else [n, None] for n in some], pa.list_(pa.int16(), 2)),
        "struct_with_views": pa.array([None if w is None else {"name": w, "raw": w.encode()} for w in words],
                                      pa.struct([("name", view), ("raw", pa.binary_view())])),
        "struct_of_dictionary": pa.StructArray.from_arrays([dictionary(words)], ["word"]),
        "map": pa.array(pairs, pa.map_(pa.string(), pa.string())),
        "map_of_views": pa.array(pairs, pa.map_(view, view)),
        "decimal32": pa.array(prices, pa.decimal128(7, 2)).cast(pa.decimal32(7, 2)),
        "decimal128": pa.array(prices, pa.decimal128(20, 4)),
        "decimal256": pa.array(prices, pa.decimal256(50, 4)),
        "zoned": pa.array(some, pa.timestamp("ns", "Europe/Berlin")),
        "zoneless": pa.array(some, pa.timestamp("us")),
        "day": pa.array(days, pa.date32()),
        "clock": pa.array(some, pa.time64("us")),
        "duration": pa.array(some, pa.duration("ms")),
        "half": pa.array(some, pa.float16()),
        "yes": flags.cast(pa.bool_()),
        "nothing": pa.nulls(ROWS),
        "uuid": pa.array(keys, pa.uuid()),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array([None if w is None else f'"{w}"' for w in words])),
        "json_of_views": pa.ExtensionArray.from_storage(pa.json_(view), pa.array(
            [None if w is None else f'"{w}"' for w in words], view)),
        "bool8": pa.ExtensionArray.from_storage(pa.bool8(), flags),
    }  # fmt: skip


def runs(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    """The values as a run-end encoded array, which Arrow holds and Parquet does not."""
    ends = pa.array(range(1, len(values) + 1), pa.int32())
    return pa.RunEndEncodedArray.from_arrays(ends, pa.array(values, kind))
