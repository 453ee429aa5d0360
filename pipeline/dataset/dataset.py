"""Read access to a finished dataset: its plan, and columns of its parts in order, a few parts at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.concurrency import AHEAD, in_order
from pipeline.core.errors import NoDataset, StorageError, UnfinishedDataset
from pipeline.core.plain import plain_fields, plain_table, read_batches
from pipeline.core.records import OK
from pipeline.dataset import commits, plan
from pipeline.dataset.commits import Commit
from pipeline.dataset.parts import TextVectors, vectors_in
from pipeline.dataset.vectors import VectorFormat, vectors_of
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.retry import retried
from pipeline.storage.urls import explained, open_arrow

# Limit in bytes on the parts in memory at a time; one part is always read.
HELD = 1 << 30
# Rows read at a time of a part that cannot be read at once.
FEW_ROWS = 32
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A finished dataset; ``marker`` is the content of ``_SUCCESS``, which names every part by its digest.

    ``schema`` is the schema of its parts with plain types, ``starts`` the row number at which each part begins.
    ``encoded`` is True if an earlier version wrote other encodings of these types, such as views. ``searched`` is set
    where another column of embeddings than the usual one is read.
    """

    storage: Storage
    plan: plan.Plan
    commits: tuple[Commit, ...]
    marker: bytes
    schema: pa.Schema
    starts: NDArray[np.int64]
    encoded: bool = False
    searched: str = ""

    @property
    def url(self) -> str:
        """Its folder or address."""
        return self.storage.url

    @property
    def address(self) -> str:
        """The same, absolute if it is local."""
        return str(self.storage.root) if isinstance(self.storage, LocalStorage) else self.storage.url

    @property
    def id(self) -> str:
        """The name of the id column."""
        return str(self.schema.names[0])

    @property
    def kept(self) -> list[str]:
        """The names of the columns kept from the manifest."""
        return list(self.schema.names[1 : -len(self.own_columns)])

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The names of the pipeline's columns."""
        return plan.own_columns(self.plan.fingerprints)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.form.dim

    @property
    def column(self) -> str:
        """Name of the column of embeddings: ``text_embedding`` in a dataset of texts alone."""
        return self.searched or vectors_in(self.schema)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of stored numbers: float32, float16, int8, or uint8 for bits."""
        return self.form.element

    @property
    def form(self) -> VectorFormat:
        """The form of stored embeddings."""
        kind = self.schema.field(self.column).type
        size = kind.list_size if pa.types.is_fixed_size_list(kind) else 0
        return VectorFormat.of(self.plan.fingerprints["output"], size)

    @property
    def vectors(self) -> int:
        """Rows that have an embedding."""
        return sum(commit.counts.get(OK, 0) for commit in self.commits)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digests of the dataset's fingerprints and of its ``_SUCCESS``."""
        fingerprints = json.dumps(self.plan.fingerprints, sort_keys=True, ensure_ascii=False)
        return {
            "fingerprints": hashlib.sha256(fingerprints.encode()).hexdigest(),
            "success": hashlib.sha256(self.marker).hexdigest(),
        }

    @property
    def threads(self) -> int:
        """Number of parts to read at a time, limited by the storage and by memory."""
        largest = max(commit.size for commit in self.commits)
        return max(1, min(self.storage.threads, HELD // (largest * (AHEAD + 1))))

    def read(self, commit: Commit, columns: Sequence[str], *, proven: bool = False) -> pa.Table:
        """Some columns of one part; ``proven`` reads every byte and checks the commit's digest.

        Raises:
            StorageError: the part is missing or damaged.
        """
        url = f"{self.url.rstrip('/')}/{commit.part}"

        def load() -> pa.Table:
            if not proven:
                with open_arrow(url) as file:
                    return _table(file, columns, self.schema)
            data = self.storage.read(commit.part)
            if data is None or hashlib.sha256(data).hexdigest() != commit.sha256:
                raise StorageError(f"{url}: {'missing' if data is None else 'damaged'}; {self._way_out}")
            return _table(pa.BufferReader(data), columns, self.schema)

        return self.load(url, load)

    def load(self, url: str, read: Callable[[], _Result]) -> _Result:
        """The result of ``read``, which reads the part at ``url``; errors of the store that pass are tried again.

        Raises:
            StorageError: the part is missing or damaged.
        """
        try:
            with explained(url):
                return retried(url, read)
        except pa.ArrowException as error:
            raise StorageError(f"{url}: not readable as Parquet ({error}); {self._way_out}") from error

    def each(
        self,
        work: Callable[[Commit, pa.Table], _Result],
        columns: Sequence[str],
        *,
        parts: Iterable[Commit] | None = None,
    ) -> Generator[_Result, None, None]:
        """The results of ``work`` for each part, in order; it runs in threads, several parts at a time.

        ``parts`` are some of the commits; the default is all.
        """

        def step(commit: Commit) -> _Result:
            return work(commit, self.read(commit, columns))

        with closing(in_order(step, self.commits if parts is None else parts, threads=self.threads)) as results:
            yield from results

    def stream(self, columns: Sequence[str]) -> Generator[pa.Table, None, None]:
        """The rows of every part, in order."""
        return self.each(lambda commit, table: table, columns)

    @property
    def _way_out(self) -> str:
        return f"python -m pipeline.verify {self.url} --repair does it again"


def open_dataset(url: str) -> Dataset:
    """Open a dataset that is complete.

    Raises:
        NoDataset: there is none.
        UnfinishedDataset: its job has not ended.
        StorageError: its metadata is inconsistent.
    """
    storage = open_storage(url)
    marker = storage.read(commits.SUCCESS)
    found = plan.read(storage)
    if found is None:
        raise NoDataset(f"{storage.url}: no dataset is here; give the output.dir of a job")
    if marker is None:
        raise UnfinishedDataset(
            f"{storage.url}: the dataset is not finished (no {commits.SUCCESS}); run the command that began it, or "
            f"python -m pipeline.verify {storage.url} --repair"
        )
    read = tuple(commits.read_commits(storage, found))
    try:
        parts = json.loads(marker)["parts"]
    except (ValueError, TypeError, KeyError):
        parts = None
    if parts != [commit.part for commit in read]:
        raise StorageError(
            f"{storage.url}/{commits.SUCCESS}: does not name the parts of the commits; "
            f"python -m pipeline.verify {storage.url} lists the problems"
        )
    first = f"{storage.url.rstrip('/')}/{read[0].part}"
    try:
        with explained(first), open_arrow(first) as file:
            stored = pq.read_schema(file)
    except pa.ArrowException as error:
        raise StorageError(
            f"{first}: not readable as Parquet ({error}); "
            f"python -m pipeline.verify {storage.url} --repair does it again"
        ) from error
    if not found.counted:
        found = replace(found, rows=sum(commit.rows for commit in read))
    starts = np.cumsum([0, *(commit.rows for commit in read[:-1])], dtype=np.int64)
    schema = plain_fields(stored)
    return Dataset(storage, found, commits=read, marker=marker, schema=schema, starts=starts, encoded=schema != stored)


def text_vectors_of(table: pa.Table, images: NDArray[Any], own: Sequence[str]) -> TextVectors | None:
    """The embeddings of texts beside those of ``images`` ``[N, width]``; None where ``own`` columns have none."""
    if "text_embedding" not in own:
        return None
    vectors, missing = np.zeros_like(images), np.ones(table.num_rows, dtype=bool)
    stored, rows = vectors_of(table["text_embedding"], images.shape[1])
    vectors[rows], missing[rows] = stored, False
    return TextVectors(vectors, missing)


def _table(file: Any, columns: Sequence[str], known: pa.Schema) -> pa.Table:
    """Columns of a part with the types of ``known``: earlier versions wrote views and other encodings too."""
    parquet = pq.ParquetFile(file, pre_buffer=False)
    try:
        table = parquet.read(columns=list(columns), use_threads=False)
    except pa.ArrowNotImplementedError:
        # A kept struct with more than 2 GiB of bytes.
        groups = range(parquet.num_row_groups)
        table = pa.Table.from_batches(
            [batch for group in groups for batch in read_batches(parquet, group, columns, FEW_ROWS, known)]
        )
    return plain_table(table.select(list(columns)), known)
