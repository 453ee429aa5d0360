"""A dataset whose columns and thumbnails are held in memory, up to a limit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.concurrency import in_order
from pipeline.core.plain import plain_table
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import HELD, Dataset
from pipeline.storage.urls import open_arrow


class Memory:
    """Values by key, of ``limit`` bytes in all; the least recently used ones leave first. Safe in many threads.

    Values of one ``kind`` never push each other out: of a column that is larger than the limit the first parts stay,
    where the newest would all be gone when the next search begins with the first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[Hashable, tuple[Any, int, Hashable]] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: dict[Hashable, threading.Lock] = {}
        self.bytes = 0

    def lock(self, key: Hashable) -> threading.Lock:
        """The lock of what is read into the memory."""
        with self._lock:
            return self._reading.setdefault(key, threading.Lock())

    def get(self, key: Hashable) -> Any:
        """The value of a key, or None."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                return None
            self._held.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: Any, size: int, *, kind: Hashable = None) -> None:
        """Hold a value of ``size`` bytes, if it can be."""
        with self._lock:
            if key in self._held:
                return
            full = self.bytes + size > self.limit
            others = [key for key, (_, _, of) in self._held.items() if kind is None or of != kind] if full else []
            while self.bytes + size > self.limit and others:
                _, freed, _ = self._held.pop(others.pop(0))
                self.bytes -= freed
            if self.bytes + size <= self.limit:
                self._held[key] = (value, size, kind)
                self.bytes += size


@dataclass(frozen=True, slots=True)
class CachedDataset(Dataset):
    """A dataset that keeps in ``memory`` what was read of it. The name of a part holds its digest, so it never ages."""

    memory: Memory = field(kw_only=True)

    @classmethod
    def of(cls, dataset: Dataset, memory: Memory) -> CachedDataset:
        """The same dataset with a memory."""
        return cls(**{each.name: getattr(dataset, each.name) for each in fields(dataset)}, memory=memory)

    @property
    def threads(self) -> int:
        """Parts at a time: as many as the storage reads side by side, if they are small; what was read stays anyway."""
        largest = max(commit.size for commit in self.commits)
        return max(1, min(self.storage.threads, HELD // (2 * largest)))

    def read(self, commit: Commit, columns: Sequence[str], *, proven: bool = False) -> pa.Table:
        """See :meth:`Dataset.read`."""
        # Of several that want the same part one reads it, and the others wait.
        with self.memory.lock((self.url, commit.part)):
            held = {name: self.memory.get((self.url, commit.part, name)) for name in columns}
            missing = [name for name in columns if held[name] is None]
            if missing or proven:
                table = Dataset.read(self, commit, missing or columns, proven=proven)
                held |= {name: self._keep((self.url, commit.part, name), table[name]) for name in table.column_names}
        return pa.table([held[name] for name in columns], names=list(columns))

    def rows(self, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """The rows with these numbers, in their order; reads the row groups that hold them, and no others.

        Raises:
            StorageError: a part is missing or damaged.
        """
        wanted = np.asarray(numbers, np.int64)
        places = np.searchsorted(self.starts, wanted, side="right") - 1
        groups: dict[tuple[int, int], list[int]] = {}
        for number, place in zip(wanted.tolist(), places.tolist(), strict=True):
            starts = self._groups(self.commits[place])
            within = number - int(self.starts[place])
            groups.setdefault((place, int(np.searchsorted(starts, within, side="right")) - 1), []).append(number)

        def take(item: tuple[tuple[int, int], list[int]]) -> list[tuple[int, dict[str, Any]]]:
            (place, group), here = item
            first = int(self.starts[place]) + int(self._groups(self.commits[place])[group])
            table = self.read_group(self.commits[place], group, columns)
            taken = _rows(table.take(pa.array([number - first for number in here], pa.int64())))
            return list(zip(here, taken, strict=True))

        with closing(in_order(take, groups.items(), threads=self.storage.threads)) as found:
            content = dict(row for some in found for row in some)
        return [content[number] for number in wanted.tolist()]

    def read_group(self, commit: Commit, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of one row group.

        Raises:
            StorageError: the part is missing or damaged.
        """
        held = {name: self.memory.get((self.url, commit.part, group, name)) for name in columns}
        if missing := [name for name in columns if held[name] is None]:
            table = self._opened(commit, lambda parquet: parquet.read_row_group(group, missing, use_threads=False))
            table = plain_table(table.select(missing), self.schema)
            held |= {name: self._keep((self.url, commit.part, group, name), table[name]) for name in missing}
        return pa.table([held[name] for name in columns], names=list(columns))

    def group_sizes(self, commit: Commit) -> NDArray[np.int64]:
        """Rows of each row group of a part."""
        return np.diff(self._groups(commit), append=commit.rows)

    def _groups(self, commit: Commit) -> NDArray[np.int64]:
        """The first row of each row group of a part."""
        key = (self.url, commit.part, "groups")
        found: NDArray[np.int64] | None = self.memory.get(key)
        if found is None:
            rows = self._opened(commit, lambda parquet: [
                parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)
            ])  # fmt: skip
            found = np.cumsum([0, *rows[:-1]], dtype=np.int64)
            self.memory.put(key, found, found.nbytes)
        return found

    def _opened(self, commit: Commit, work: Any) -> Any:
        url = f"{self.url.rstrip('/')}/{commit.part}"

        def read() -> Any:
            with open_arrow(url) as file:
                return work(pq.ParquetFile(file, pre_buffer=False))

        return self.load(url, read)

    def _keep(self, key: tuple[Any, ...], column: pa.ChunkedArray) -> pa.ChunkedArray:
        self.memory.put(key, column, column.nbytes, kind=(self.url, key[-1]))
        return column


def texts(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column, in which bytes that are not UTF-8 are replaced; Parquet files have them in texts."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return ["not UTF-8"] * len(column)
        stored = column.cast(pa.large_binary()).to_pylist()
        values = [None if each is None else each.decode(errors="replace") for each in stored]
    return values


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    columns = [texts(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
