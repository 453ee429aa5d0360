"""Conversion of a finished dataset into a table of a database, part by part.

A table has a mark: the digests of its dataset, and how many of its parts are in the table. After a command was killed,
the next one goes on behind them, and a further one does nothing. Rows without an embedding are left out.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import date, time, timedelta
from importlib import import_module
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import ConfigError, Problem, install_hint
from pipeline.core.records import OK
from pipeline.dataset.commits import Commit
from pipeline.dataset.convert import without_status
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.portable import converted, for_datasets

# Numbers of embeddings that are sent at a time, and the most rows: JSON has about 20 bytes for a number.
NUMBERS, ROWS = 400_000, 1000
# Raised when another version writes other tables.
VERSION = 1
Mark = Mapping[str, Any]


class Table(Protocol):
    """A table of a database; each method raises StorageError if the database fails."""

    def mark(self) -> Mark | None:
        """Return the mark of the table, empty if it has none; None if there is no table."""

    def create(self, mark: Mark) -> None:
        """Create the table with a mark, in place of the one that is there."""

    def write(self, rows: Iterator[pa.Table], mark: Mark) -> None:
        """Write the rows of one part and then the mark; those of a part that was written in part are replaced."""


@dataclass(frozen=True, slots=True)
class Filled:
    """Result of :func:`fill`: rows of the table, those of them that this call wrote, and rows without embeddings."""

    rows: int
    written: int
    left_out: int


def client_of(package: str, to: str) -> Any:
    """Return the package of a database's client, of the extra ``to``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError([Problem("--to", to, f"{package} is not installed ({error})", install_hint(to))]) from error


def schema_of(dataset: Dataset) -> pa.Schema:
    """Return the columns of the table: all but status and error, in types that other tools know."""
    return for_datasets(without_status(dataset))


def fill(dataset: Dataset, table: Table, *, replace: bool, on_rows: Callable[[int], object]) -> Filled:
    """Write the rows that are not in the table yet.

    Args:
        dataset: the dataset.
        table: of this dataset, or not there yet.
        replace: replace a table of another dataset, or of another state of this one.
        on_rows: called with the number of rows of each part that is in the table.

    Raises:
        ConfigError: the table holds something else, or no row has an embedding.
        StorageError: the dataset or the database failed; the same call goes on later.
    """
    if not dataset.vectors:
        raise ConfigError([Problem("DATASET", dataset.url, "no row has an embedding, so there is nothing to convert")])
    schema = schema_of(dataset)
    mark = {"version": VERSION, "dataset": dataset.address, "dim": dataset.dim, **dataset.fingerprint, "parts": 0}
    found = table.mark()
    if not _continues(found, mark, replace=replace):
        table.create(mark)
        found = mark
    assert found is not None
    done = int(found["parts"])
    before = sum(commit.counts.get(OK, 0) for commit in dataset.commits[:done])
    on_rows(before)

    def good(commit: Commit, part: pa.Table) -> pa.Table:
        return converted(part.filter(pc.is_valid(part[dataset.column])), schema)

    with closing(dataset.each(good, schema.names, parts=dataset.commits[done:])) as parts:
        for number, rows in enumerate(parts, done + 1):
            table.write(_batches(rows, dataset.dim), {**mark, "parts": number})
            on_rows(rows.num_rows)
    return Filled(dataset.vectors, dataset.vectors - before, dataset.plan.rows - dataset.vectors)


def _continues(found: Mark | None, wanted: Mark, *, replace: bool) -> bool:
    """Return whether the table holds the first parts of the dataset; False if it is to be created."""
    if found is None:
        return False
    if not found:
        allowed = "exists, and was not made by this command"
        raise ConfigError([Problem("--table", "the table", allowed, "name another one, or drop it yourself")])
    same = ("version", "dim", "fingerprints", "success")
    if all(found.get(name) == wanted[name] for name in same):
        return True
    if replace:
        return False
    what = f"another dataset ({found.get('dataset')}, {found.get('dim')} numbers)"
    if found.get("fingerprints") == wanted["fingerprints"]:
        what = f"another state of this dataset ({found.get('dataset')})"
    raise ConfigError(
        [Problem("--table", "the table", f"holds {what}", "name another one; --replace drops it and begins anew")]
    )


def _batches(rows: pa.Table, dim: int) -> Iterator[pa.Table]:
    step = max(1, min(ROWS, NUMBERS // dim))
    return (rows.slice(start, step) for start in range(0, rows.num_rows, step))


def json_value(value: Any) -> Any:
    """Return a value of Arrow as JSON has it.

    Bytes become base64, dates and times ISO 8601, durations seconds, decimals strings; NaN and infinity become null.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): json_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | time):
        return value.isoformat()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)
