"""A collection of Qdrant, as a target of :mod:`pipeline.dataset.databases`.

The id of a point follows from that of its row, so that a part which was written in part is written over. The mark is in
the metadata of the collection.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.core.errors import ConfigError, PipelineError, Problem, StorageError
from pipeline.dataset.databases import Mark, client_of, json_value, schema_of
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.parts import VECTORS
from pipeline.storage.urls import within

NAME = re.compile(r"\w[\w.-]{0,254}", re.ASCII)
KEY = "clip-pipeline"
# Of the UUIDs of ids that are not numbers from 0 on.
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, KEY)


class QdrantCollection:
    """A collection at a URL (with a key in ``QDRANT_API_KEY``), or in a folder of the embedded mode; close it.

    Raises:
        ConfigError: qdrant-client is missing, or the place or the name is not valid.
        StorageError: there is no connection, or the folder is in use.
    """

    def __init__(self, dataset: Dataset, place: str, name: str) -> None:
        qdrant_client = client_of("qdrant_client", "qdrant")
        self._models = qdrant_client.models
        self._dataset, self._name, self._columns = dataset, name, schema_of(dataset).names
        # Of images and texts, each point has two vectors with names; else one without.
        self._vectors = [column for column in VECTORS if column in self._columns]
        options: dict[str, Any] = {"path": os.path.expanduser(place)}
        problems = []
        if not NAME.fullmatch(name):
            problems.append(Problem("--table", name, "must be a name of letters, digits, _, . and -"))
        if "://" in place:
            options = {"url": place, "api_key": os.environ.get("QDRANT_API_KEY"), "timeout": 120}
            if urlsplit(place).username is not None or urlsplit(place).scheme not in ("http", "https"):
                problems.append(Problem("--out", "the URL", "must be http:// or https://, without a password"))
        elif within(os.path.abspath(options["path"]), dataset.address):
            problems.append(Problem("--out", place, "lies in the dataset, whose readers would read it as rows"))
        if problems:
            raise ConfigError(problems)
        self.shown = place
        with self._explained():
            self._client = qdrant_client.QdrantClient(**options, check_compatibility=False)

    def close(self) -> None:
        """Close the connection or the folder."""
        self._client.close()

    def mark(self) -> Mark | None:
        """See :class:`~pipeline.dataset.databases.Table`."""
        with self._explained():
            if not self._client.collection_exists(self._name):
                return None
            return dict((self._client.get_collection(self._name).config.metadata or {}).get(KEY, {}))

    def create(self, mark: Mark) -> None:
        """See :class:`~pipeline.dataset.databases.Table`."""
        datatype = "float32" if self._dataset.form.dtype == "float32" else "float16"
        params = self._models.VectorParams(size=self._dataset.dim, distance="Cosine", datatype=datatype)
        vectors = {column: params for column in self._vectors} if len(self._vectors) > 1 else params
        with self._explained():
            self._client.delete_collection(self._name)
            self._client.create_collection(self._name, vectors_config=vectors, metadata={KEY: dict(mark)})
        if self.mark() != mark:
            raise StorageError(f"{self.shown}: this server keeps no metadata of collections; take Qdrant 1.16 or later")

    def write(self, rows: Iterator[pa.Table], mark: Mark) -> None:
        """See :class:`~pipeline.dataset.databases.Table`."""
        with self._explained():
            for batch in rows:
                self._client.upsert(self._name, points=self._points(batch), wait=True)
            self._client.update_collection(self._name, metadata={KEY: dict(mark)})

    def _points(self, batch: pa.Table) -> list[Any]:
        payloads = batch.drop_columns(self._vectors).to_pylist()
        vectors: list[dict[str, Any]] = [{} for _ in payloads]
        for column in self._vectors:
            floats, places = self._dataset.form.load(batch[column])
            for place, vector in zip(places.tolist(), floats.tolist(), strict=True):
                vectors[place][column] = vector
        return [
            self._models.PointStruct(
                id=point_id(payload[self._columns[0]]),
                vector=vector if len(self._vectors) > 1 else vector[self._vectors[0]],
                payload={name: json_value(value) for name, value in payload.items()},
            )
            for payload, vector in zip(payloads, vectors, strict=True)
        ]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:
            text = f"{self.shown}: {' '.join(str(error).split()) or type(error).__name__}"
            raise StorageError(f"{text}; the same command goes on behind the last whole part") from error


def point_id(id: str | int) -> str | int:
    """Return the id of a row's point: a number from 0 on as it is, else a UUID of version 5."""
    return id if isinstance(id, int) and id >= 0 else str(uuid.uuid5(NAMESPACE, str(id)))
