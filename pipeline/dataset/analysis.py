"""Results of analyses of a dataset: one Parquet file each, beside the dataset and not in it.

The file of ``photos`` with near duplicates is ``photos.duplicates.parquet``. Its rows name rows of the dataset by their
id. The schema metadata ``pipeline.analysis`` is JSON: the kind, the dataset's address and fingerprint, parameters and
counts. The fingerprint tells whether the file is about the present rows of the dataset.

==========  =============================================================================================
kind        columns, the first of them with the name and type of the dataset's id
==========  =============================================================================================
duplicates  id, ``group`` int64, ``size`` int32, ``keep`` bool, ``kept_id`` as id, ``similarity`` float32,
            ``reason`` string: the rows of groups of two or more, the largest group first and the kept
            row before the others
sample      id, ``label`` string, ``cluster`` int32, ``distance`` float32, ``size`` int64: chosen rows in
            the order of the dataset; without clusters the last three are null
clusters    id, ``cluster`` int32, ``distance`` float32: every row with an embedding, in that order
==========  =============================================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import ArtifactError, ConfigError, Problem
from pipeline.dataset.dataset import Dataset
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.retry import retried
from pipeline.storage.urls import explained, is_local, local_file, open_arrow, within

KEY = b"pipeline.analysis"
KINDS = ("duplicates", "sample", "clusters")


@dataclass(frozen=True, slots=True)
class Analysis:
    """Metadata of the file of an analysis.

    Attributes:
        kind: one of :data:`KINDS`.
        url: the file.
        dataset: address of the dataset when the file was written.
        fingerprint: :attr:`Dataset.fingerprint` of the dataset then.
        parameters: of the analysis, such as ``threshold`` and ``keep``.
        counts: rows by name, such as ``groups`` and ``dropped``.
        schema: of the rows, without metadata.
        rows: number of rows.
    """

    kind: str
    url: str
    dataset: str
    fingerprint: Mapping[str, str]
    parameters: Mapping[str, Any]
    counts: Mapping[str, int]
    schema: pa.Schema
    rows: int

    def fits(self, dataset: Dataset) -> bool:
        """True if the file is of the present state of a dataset, at any address."""
        return dict(self.fingerprint) == dataset.fingerprint


def analysis_url(dataset: Dataset, kind: str) -> str:
    """The file for an analysis of a dataset, beside it.

    Raises:
        ConfigError: the dataset is a whole bucket, which has no place beside it.
    """
    url = f"{dataset.address.rstrip('/')}.{kind}.parquet"
    _place(url)
    return url


def analyses_of(dataset: Dataset) -> dict[str, Analysis]:
    """The files beside a dataset by their kind; :meth:`Analysis.fits` tells which are of its present state.

    Files of these names that are no analyses are left out.

    Raises:
        StorageError: the storage cannot be read.
    """
    found = {}
    for kind in KINDS:
        try:
            analysis = read_analysis(analysis_url(dataset, kind))
        except (ArtifactError, ConfigError):
            continue
        if analysis.kind == kind:
            found[kind] = analysis
    return found


def read_analysis(url: str) -> Analysis:
    """Read the metadata of a file; ``pyarrow.parquet.read_table`` and any other reader read its rows.

    Raises:
        ArtifactError: there is no such file, or it is not the file of an analysis.
        StorageError: the storage cannot be read.
    """
    storage, name = _place(url)
    place = f"{storage.url.rstrip('/')}/{name}"
    if storage.size(name) is None:
        raise ArtifactError(f"{place}: no such file")
    try:
        with explained(place):
            rows, schema = retried(place, lambda: _footer(place))
        about = json.loads((schema.metadata or {})[KEY])
        return Analysis(**about, url=place, schema=schema.remove_metadata(), rows=rows)
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{place}: not a file of pipeline.dedup or pipeline.sample") from error


def check_output(dataset: Dataset, kind: str, output: str | None) -> str:
    """The file to write: ``output``, or the one beside the dataset.

    Raises:
        ConfigError: it lies in the dataset, or there is a file of another kind, which is not replaced.
    """
    url = output or analysis_url(dataset, kind)
    if within(str(local_file(url).absolute()) if is_local(url) else url, dataset.address):
        allowed = "lies in the dataset, whose readers would read it as rows"
        raise ConfigError([Problem("--output", url, allowed, "name a file beside it")])
    storage, name = _place(url)
    if storage.size(name) is not None:
        try:
            there = read_analysis(url).kind
        except ArtifactError:
            there = "another program"
        if there != kind:
            allowed = f"is a file of {there}, not of {kind}, and is not replaced"
            raise ConfigError([Problem("--output", url, allowed, "name another file, or remove it")])
    return url


@contextmanager
def writing(
    url: str, kind: str, dataset: Dataset, schema: pa.Schema, **about: Mapping[str, Any]
) -> Iterator[pq.ParquetWriter]:
    """Write the rows of an analysis; the file appears, in place of an older one, at the end of the context.

    Args:
        url: of :func:`check_output`.
        kind: one of :data:`KINDS`.
        dataset: what is analysed.
        schema: of the rows.
        about: ``parameters`` and ``counts``.

    Raises:
        StorageError: it cannot be written.
    """
    told = {"kind": kind, "dataset": dataset.address, "fingerprint": dataset.fingerprint, **about}
    storage, name = _place(url)
    with storage.staged() as staged:
        with (
            explained(url),
            pq.ParquetWriter(staged.path, schema.with_metadata({KEY: json.dumps(told)}), compression="zstd") as writer,
        ):
            yield writer
        staged.publish(name, replace=True)


def _footer(url: str) -> tuple[int, pa.Schema]:
    with open_arrow(url) as file:
        parquet = pq.ParquetFile(file)
        return parquet.metadata.num_rows, parquet.schema_arrow


def _place(url: str) -> tuple[Storage, str]:
    """The storage that holds a file, and the file's name there."""
    local = is_local(url)
    folder, name = os.path.split(str(local_file(url).absolute()) if local else url)
    if not name or not (local or "://" in folder):
        raise ConfigError([Problem("--output", url, "names no file in a folder", "give the address of a file")])
    return open_storage(folder), name
