"""``Dataset``: the rows of a finished dataset as arrays and tables, search, and relabelling."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from pipeline.api.config import config_from, label_settings, prompts_of
from pipeline.api.encode import encode
from pipeline.api.notebook import Hits, Tile, heading, sheet
from pipeline.api.paths import absolute
from pipeline.api.process_state import settings_restored
from pipeline.api.scratch import Scratch, written_prompts
from pipeline.core.errors import ConfigError, NoDataset, Problem
from pipeline.core.records import OK
from pipeline.dataset import dataset
from pipeline.dataset import search as exact
from pipeline.dataset.parts import VECTORS
from pipeline.dataset.vectors import cut
from pipeline.engine.query import derive

if TYPE_CHECKING:
    from pipeline.models.checkpoint import Checkpoint

_FAILURE = ("status", "error")
# Rows of a sheet in a notebook, and of a search result at most.
_TILES, _MOST = 12, 10_000
# Cached attributes, which are cleared when a temporary dataset is closed.
_CACHED = ("counts", "report", "ids", "embeddings", "_model")


class Dataset:
    """A finished dataset, from :func:`~pipeline.embed` or :func:`~pipeline.open_dataset`: one row for each image.

    Rows are in the order of the images. A dataset in a temporary folder is removed with this object, or earlier by
    :meth:`close` or at the end of a ``with`` block.
    """

    def __init__(self, stored: dataset.Dataset, scratch: Scratch | None = None) -> None:
        self._opened, self._scratch, self._closed = stored, scratch, False

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove a dataset in a temporary folder; any other stays and can still be used."""
        if self._scratch is not None:
            self._scratch.close()
            self._closed = True
            for name in _CACHED:
                self.__dict__.pop(name, None)

    @property
    def _stored(self) -> dataset.Dataset:
        if self._closed:
            raise NoDataset("the dataset was closed, and its temporary folder was removed; output='...' keeps one")
        return self._opened

    @property
    def url(self) -> str:
        """Its folder or address; ``pandas.read_parquet(dataset.url)`` reads all of it."""
        return self._stored.url

    def __len__(self) -> int:
        return self._stored.plan.rows

    @property
    def dim(self) -> int:
        """The length of an embedding."""
        return self._stored.dim

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by status, ``ok`` first."""
        counts = Counter({OK: 0})
        for commit in self._stored.commits:
            counts.update(commit.counts)
        return dict(counts)

    @cached_property
    def report(self) -> Mapping[str, Any]:
        """The content of ``_report.json``: throughput, stages, parity, versions, the whole config."""
        found: dict[str, Any] = json.loads(self._stored.storage.read("_report.json") or b"{}")
        return found

    @cached_property
    def ids(self) -> list[Any]:
        """The id of every row, unchanged."""
        return list(self.table([self._stored.id])[self._stored.id].to_pylist())

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """One row of length 1 for every image, float32 ``[N, D]``, read-only; NaN if the image failed.

        Of a job of texts alone, they are those of the texts.
        """
        matrix = np.full((len(self), self.dim), np.nan, np.float32)
        for commit, (vectors, rows) in zip(self._stored.commits, self._vectors(), strict=True):
            matrix[rows + self._stored.starts[commit.shard]] = vectors
        matrix.flags.writeable = False
        return matrix

    def matrix(self) -> tuple[list[Any], NDArray[np.float32]]:
        """The ids and embeddings of the images that did not fail: a list of M, and float32 ``[M, D]``."""
        good = ~np.isnan(self.embeddings[:, 0])
        return [id for id, known in zip(self.ids, good.tolist(), strict=True) if known], self.embeddings[good]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Every row in order, as an Arrow table; ``columns`` selects and orders columns.

        Raises:
            ConfigError: there is no such column.
        """
        names = self._stored.schema.names
        wrong = [name for name in columns or () if name not in names]
        if wrong:
            allowed = f"is not a column of {self.url}; there are {', '.join(names)}"
            raise ConfigError([Problem("columns", name, allowed) for name in wrong])
        return pa.concat_tables(self._stored.stream(list(names if columns is None else columns)))

    def frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Every row in order; the default is all columns but those of embeddings, see :attr:`embeddings`."""
        vectors = {name for name in VECTORS if name in self._stored.own_columns}
        names = [name for name in self._stored.schema.names if name not in vectors]
        frame: pd.DataFrame = self.table(names if columns is None else columns).to_pandas()
        return frame

    @property
    def failures(self) -> pd.DataFrame:
        """The id, status and error of every row that failed."""
        frame = self.frame([self._stored.id, *_FAILURE])
        return frame[frame["status"] != OK].reset_index(drop=True)

    def search(
        self,
        text: str | None = None,
        *,
        image: object = None,
        id: object = None,
        vector: ArrayLike | None = None,
        top: int = 10,
    ) -> Hits:
        """Find the images nearest to a text, an image (path, bytes, PIL, array), a row's id or a vector, exactly.

        A text is embedded without a template, an image with the dataset's own settings. The row of ``id`` is not a hit.

        Raises:
            ConfigError: not exactly one of the four is given, the image cannot be read, or there is no such id.
            ModelError: the model that made the dataset cannot be opened.
        """
        given = {"text": text, "image": image, "id": id, "vector": vector}
        names = [name for name, value in given.items() if value is not None]
        problems = []
        if len(names) != 1:
            problems.append(Problem("search", ", ".join(names), f"must be one of {', '.join(given)}"))
        if not isinstance(top, int | np.integer) or not 1 <= top <= _MOST:
            problems.append(Problem("top", top, f"must be from 1 to {_MOST}"))
        if problems:
            raise ConfigError(problems)
        top, stored = int(top), self._stored
        itself, shown = None, names[0] if names[0] in ("image", "vector") else repr(given[names[0]])
        if text is not None:
            from pipeline.engine.query import embed_text

            query = embed_text(self._model, [text])[0]
        elif image is not None:
            with _argument_names(), settings_restored():
                query = self._embed(image)
        elif id is not None:
            with _argument_names():
                itself, query = exact.find_row(stored, str(id))
        else:
            query = _unit(vector, self.dim)
        query = cut(query[None], self.dim)[0]
        found = exact.nearest(stored, query[None], top + (itself is not None))[0]
        found = exact.without(found, itself, top)
        return Hits(stored, found.rows.tolist(), exact.fetch(stored, found), shown)

    def relabel(
        self,
        labels: Sequence[str] | Mapping[str, str | Sequence[str] | None] | str | os.PathLike[str] | None = None,
        *,
        templates: Sequence[str] | str | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        heads: Sequence[str | os.PathLike[str]] | None = None,
        output: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Dataset:
        """Make a dataset of the same embeddings with other labels or heads; no image is read.

        Arguments that are None keep this dataset's settings. ``heads`` are files of :func:`~pipeline.save_head`;
        ``output`` is that of :func:`~pipeline.embed`. Calls in several threads run one after another.

        Raises:
            PipelineError: a setting is wrong, or the model that made the dataset cannot be opened.
        """
        from pipeline.job.relabel import relabel

        stored, scratch = self._stored, Scratch() if output is None else None
        place = str(scratch.path / "dataset") if scratch is not None else absolute(os.fspath(output or ""))
        files_of_heads = None if heads is None else [absolute(os.fspath(each)) for each in heads]
        given = {"labels.top_k": top_k, "labels.threshold": threshold, "labels.heads": files_of_heads}
        prompts, files = prompts_of(labels), ExitStack()
        settings = {
            **label_settings(labels, templates),
            **{key: value for key, value in given.items() if value is not None},
            "output.dir": place,
            "report.progress": "bar" if progress else "none",
            "log.level": "warning",
        }
        try:
            with files, settings_restored():
                if prompts is not None:
                    config_from(settings)
                    del settings["prompts.labels"]
                    settings["prompts.path"] = files.enter_context(written_prompts(prompts, scratch, place))
                relabel(stored, derive(stored, config_from(settings), list(settings)), notes=False)
            return Dataset(dataset.open_dataset(place), scratch)
        except BaseException:
            if scratch is not None:
                scratch.close()
            raise

    @cached_property
    def _model(self) -> Checkpoint:
        from pipeline.engine.query import config_of_dataset, open_model

        return open_model(self._stored, config_of_dataset(self._stored).model)

    def _embed(self, image: object) -> NDArray[np.float32]:
        from pipeline.engine.query import config_of_dataset, embed_image

        config = config_of_dataset(self._stored)
        if isinstance(image, str | os.PathLike):
            return embed_image(self._model, config, Path(os.path.expanduser(image)))
        with tempfile.TemporaryDirectory(prefix="clip-pipeline-") as folder:
            path = Path(folder) / "image"
            path.write_bytes(encode(image, "image"))
            return embed_image(self._model, config, path)

    def _vectors(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        stored = self._stored
        return (stored.form.load(table[stored.column]) for table in stored.stream([stored.column]))

    def _summary(self) -> str:
        rows = ", ".join(f"{count:,} {status}" for status, count in self.counts.items())
        return f"{len(self):,} rows ({rows}), embeddings of {self.dim} numbers"

    def __repr__(self) -> str:
        if self._closed:
            return "<Dataset, closed>"
        return f"<Dataset {self.url}: {self._summary()}>"

    def _repr_html_(self) -> str:
        if self._closed:
            return f"<div>{heading(['a dataset that was closed'])}</div>"
        commit = self._stored.commits[0]
        head = self._stored.read(commit, [self._stored.id, "label", "score", *_FAILURE]).slice(0, _TILES).to_pylist()
        tiles = []
        for row, values in enumerate(head):
            text = values["status"]
            if values["status"] == OK:
                text = "" if values["label"] is None else f"{values['score']:.2f}  {values['label']}"
            tiles.append(Tile(row, str(values[self._stored.id]), text))
        place = "in a temporary folder" if self._scratch is not None else self.url
        model = self._stored.plan.about.get("model", "")
        return sheet(self._stored, [self._summary(), f"model {model}; {place}"], tiles)


@contextmanager
def _argument_names() -> Iterator[None]:
    """Name problems by argument, not by command-line option."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([replace(each, key=each.key.lstrip("-")) for each in error.problems]) from error


def _unit(given: ArrayLike | None, dim: int) -> NDArray[np.float32]:
    try:
        vector = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise ConfigError([Problem("vector", given, f"must be {dim} finite numbers")]) from error
    length = float(np.linalg.norm(vector))
    if vector.shape != (dim,) or not np.isfinite(length) or not length:
        raise ConfigError([Problem("vector", list(vector.shape), f"must be {dim} finite numbers that are not all 0")])
    return (vector / length).astype(np.float32)
