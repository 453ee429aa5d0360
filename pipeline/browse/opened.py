"""A dataset as the page shows it: its columns, pictures, model, index and analyses, each opened when it is wanted."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.browse.cached import CachedDataset
from pipeline.browse.measures import Progress
from pipeline.browse.pictures import Pictures
from pipeline.browse.selection import MOST, SIMILAR, Result, Selection, select
from pipeline.core.errors import ArtifactError, ConfigError, PipelineError, Problem, StorageError
from pipeline.dataset.analysis import Analysis, analyses_of
from pipeline.dataset.index import OpenedIndex
from pipeline.dataset.vectors import cut
from pipeline.engine.query import config_of_dataset, embed_image, embed_text, open_model
from pipeline.models.lean import import_transformers
from pipeline.storage.local import LocalStorage
from pipeline.storage.retry import retried
from pipeline.storage.urls import explained, open_arrow

if TYPE_CHECKING:
    from pipeline.models.checkpoint import Checkpoint

# Uploaded pictures whose embeddings are kept.
UPLOADS = 100


class OpenedDataset:
    """One dataset of the page; ``model`` names the place of its model, if it was moved. Close it."""

    def __init__(self, dataset: CachedDataset, model: str | None) -> None:
        self.dataset = dataset
        self.pictures = Pictures(dataset)
        self._model, self._lock = model, threading.Lock()
        self._checkpoint: Checkpoint | None = None
        self._index: OpenedIndex | PipelineError | None = None
        self._texts: dict[str, NDArray[np.float32]] = {}
        self._uploads: dict[str, NDArray[np.float32]] = {}

    def close(self) -> None:
        """End its processes."""
        self.pictures.close()

    @property
    def index(self) -> OpenedIndex | None:
        """Its index for approximate search, or None."""
        if self._index is None:
            try:
                self._index = OpenedIndex.of(self.dataset)
            except (ArtifactError, ConfigError) as error:
                self._index = error
        return self._index if isinstance(self._index, OpenedIndex) else None

    def warm_up(self, progress: Progress) -> None:
        """Import what a search needs, and read the embeddings if they fit and are local, before the first search.

        Raises:
            StorageError: a part is missing or damaged.
        """
        # PyTorch embeds texts, and multiplies numbers of 16 bits.
        import torch  # noqa: F401

        dataset = self.dataset
        fits = dataset.vectors * dataset.form.size <= dataset.memory.limit / 2
        if fits and isinstance(dataset.storage, LocalStorage):
            for done, _ in enumerate(dataset.stream([dataset.column]), 1):
                progress(done, len(dataset.commits))

    def analyses(self) -> dict[str, Analysis]:
        """The analyses beside it that are of its present state."""
        return {kind: found for kind, found in analyses_of(self.dataset).items() if found.fits(self.dataset)}

    def find(self, selection: Selection, progress: Progress) -> Result:
        """The rows of a selection.

        Raises:
            ConfigError: its row has no embedding, or its picture or group is not there.
            ModelError: the dataset's model cannot be opened, for a text.
            StorageError: a part is missing or damaged.
        """
        query = self.vector(selection) if selection.asks else None
        alone = not selection.conditions and not selection.group and selection.order == SIMILAR
        if query is not None and alone and not selection.exact and self.index is not None:
            # FAISS compares vectors of any length.
            found = self.index.search(query, MOST)
            return Result(found.rows, found.scores, len(found.rows), approximate=True)
        ids = self.members(selection.group) if selection.group else None
        return select(self.dataset, selection, query=query, ids=ids, progress=progress)

    def vector(self, selection: Selection) -> NDArray[np.float32]:
        """The sum of what a selection asks for, less what it asks to leave out, float32 ``[D]``."""
        asked = []
        if selection.text:
            asked.append(self._text(selection.text))
        if selection.like is not None:
            asked.append(self.embedding(selection.like))
        if selection.image:
            if selection.image not in self._uploads:
                raise ConfigError(
                    [Problem("image", selection.image, "is not known any more: choose the picture again")]
                )
            asked.append(self._uploads[selection.image])
        whole = np.sum(asked, axis=0) if asked else np.zeros(self.dataset.dim, np.float32)
        if selection.minus:
            whole = whole - self._text(selection.minus)
        vector: NDArray[np.float32] = whole.astype(np.float32)
        return vector

    def embedding(self, row: int) -> NDArray[np.float32]:
        """The embedding of a row, float32 ``[D]``.

        Raises:
            ConfigError: it has none.
        """
        value = self.dataset.rows([row], [self.dataset.column])[0][self.dataset.column]
        if value is None:
            raise ConfigError([Problem("like", row, "this row has no embedding, so nothing is like it")])
        stored = np.asarray(value, self.dataset.dtype)[None]
        vector: NDArray[np.float32] = self.dataset.form.decode(stored)[0]
        return vector

    def upload(self, data: bytes) -> str:
        """Embed a picture; returns its key for :attr:`Selection.image`.

        Raises:
            ConfigError: it is no picture that the dataset's job would have taken.
            ModelError: the model cannot be opened.
        """
        import hashlib

        key = hashlib.sha256(data).hexdigest()[:16]
        if key not in self._uploads:
            config = config_of_dataset(self.dataset)
            with tempfile.TemporaryDirectory(prefix="clip-pipeline-") as folder:
                place = Path(folder) / "picture"
                place.write_bytes(data)
                vector = embed_image(self._open_model(), config, place)
            self._uploads[key] = cut(vector[None], self.dataset.dim)[0]
            while len(self._uploads) > UPLOADS:
                del self._uploads[next(iter(self._uploads))]
        return key

    def members(self, group: str) -> pa.Array:
        """The ids of a group ``KIND:NUMBER`` of an analysis, or of a whole ``sample``.

        Raises:
            ConfigError: there is no such analysis of this state of the dataset.
            StorageError: its file cannot be read.
        """
        kind, _, number = group.partition(":")
        table = self.analysis(kind)
        column = "group" if kind == "duplicates" else "cluster"
        if group != "sample" and (column not in table.column_names or not number.isdecimal() or len(number) > 18):
            raise ConfigError([Problem("group", group, "must be like duplicates:0, clusters:0 or sample")])
        ids = table[0] if group == "sample" else table.filter(pc.equal(table[column], int(number)))[0]
        kind = self.dataset.schema.field(0).type
        found: pa.Array = pa.concat_arrays([pa.array([], kind), *ids.cast(kind).chunks])
        return found

    def made(self, group: str) -> str:
        """The parameters and counts of the analysis of a group, which may be made again; empty without a group."""
        about = self.analyses().get(group.partition(":")[0]) if group else None
        return "" if about is None else _made(about)

    def analysis(self, kind: str) -> pa.Table:
        """The rows of an analysis, whose first column are ids.

        Raises:
            ConfigError: there is none of this state of the dataset.
            StorageError: its file cannot be read.
        """
        about = self.analyses().get(kind)
        if about is None:
            raise ConfigError([Problem("group", kind, f"{self.dataset.url} has no such analysis of its present state")])
        key = (about.url, self.dataset.fingerprint["success"], _made(about))
        held: pa.Table | None = self.dataset.memory.get(key)
        if held is None:
            try:
                with explained(about.url):
                    held = retried(about.url, partial(_table, about.url))
            except pa.ArrowException as error:
                raise StorageError(f"{about.url}: not readable as Parquet ({error}); make it again") from error
            self.dataset.memory.put(key, held, held.nbytes)
        return held

    def places(self, ids: pa.Array) -> dict[Any, int]:
        """The numbers of the rows with these ids; reads the ids of every part."""
        found: dict[Any, int] = {}
        for commit, table in zip(self.dataset.commits, self.dataset.stream([self.dataset.id]), strict=True):
            column = table[0]
            here = pc.indices_nonzero(pc.is_in(column, value_set=ids.cast(column.type)))
            start = int(self.dataset.starts[commit.shard])
            found |= dict(
                zip(column.take(here).to_pylist(), (start + place for place in here.to_pylist()), strict=True)
            )
        return found

    def _text(self, text: str) -> NDArray[np.float32]:
        if text not in self._texts:
            if len(self._texts) >= UPLOADS:
                self._texts.clear()
            self._texts[text] = cut(embed_text(self._open_model(), [text]), self.dataset.dim)[0]
        return self._texts[text]

    def _open_model(self) -> Checkpoint:
        with self._lock:
            if self._checkpoint is None:
                from dataclasses import replace

                import_transformers()
                model = config_of_dataset(self.dataset).model
                self._checkpoint = open_model(
                    self.dataset, model if self._model is None else replace(model, name=self._model)
                )
            return self._checkpoint


def _made(about: Analysis) -> str:
    return f"{about.parameters} {about.counts}"


def _table(url: str) -> pa.Table:
    with open_arrow(url) as file:
        return pq.read_table(file)


def shown_columns(dataset: CachedDataset) -> list[str]:
    """The columns of a tile."""
    there: Mapping[str, Any] = dict.fromkeys(dataset.schema.names)
    return [dataset.id, *(name for name in ("label", "score", "status", "error") if name in there)]
