"""Draw the page of a run from its report, its dataset and its pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import Config
from pipeline.core.errors import PipelineError
from pipeline.core.plain import plain_table
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.saved_config import config_of
from pipeline.images.factory import pixel_reader
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.report.load import report_of
from pipeline.report.nights import recent_nights
from pipeline.report.page import by_status, to_html
from pipeline.report.scores import Row
from pipeline.report.summary import DatasetSummary, summarize
from pipeline.report.svg import load_matplotlib
from pipeline.report.thumbnails import REACH, THUMBNAIL, captions, spread, thumbnails
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_arrow

PAGE = "_report.html"
# The first parts, which are searched for examples.
LOOKED_AT = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pictures:
    """The source of the pictures of a page."""

    manifest: Manifest
    reader: PixelReader


def draw(report: Mapping[str, Any], content: DatasetSummary, examples: int, pictures: Pictures | None) -> bytes:
    """The content of ``_report.html``.

    Args:
        report: content of ``_report.json``.
        content: summary of the dataset.
        examples: number of the first rows to show; with 0 the page has no pictures at all.
        pictures: source of the pictures; None shows none.
    """
    some = _examples(content, examples) if examples else []
    shown: Mapping[int, bytes] = {}
    if pictures is not None and examples:
        wanted = {row.number: str(row.id) for rows in by_status(content.failed).values() for row in rows}
        wanted |= {row.number: row.id for row in (*some, *content.odd)}
        both = [row for row in (*content.pairs.most, *content.pairs.least)] if content.pairs else []
        wanted |= {row.number: row.id for label in content.extremes for row in (*label.most, *label.least)}
        wanted |= {row.number: row.id for row in both}
        with ThreadPoolExecutor(1, thread_name_prefix="pictures") as beside:
            made = beside.submit(thumbnails, pictures.manifest, pictures.reader, wanted)
            # Other processes decode the pictures meanwhile.
            load_matplotlib()
            shown = made.result()
        content = replace(content, captions=captions(pictures.manifest, [row.number for row in both]))
    return to_html(report, content, some, shown, output=content.folder)


def try_to_publish(storage: Storage, page: Callable[[], bytes]) -> bool:
    """Write the page that ``page`` draws. A failure is logged only, because the dataset is complete without it."""
    try:
        storage.write(PAGE, page())
    except Exception as error:
        log.warning(
            "the page of the report could not be drawn (%s: %s); python -m pipeline.report %s draws it again",
            type(error).__name__,
            error,
            storage.url,
        )
        return False
    return True


def redraw(url: str, *, examples: int | None = None) -> bytes:
    """The page of a finished dataset, with pictures from its manifest.

    ``examples`` overrides the number of example rows; with 0 no picture is read. Pictures that cannot be read any more
    are left out, with a warning.

    Raises:
        NoDataset, UnfinishedDataset, StorageError: there is nothing to draw.
    """
    dataset = open_dataset(url)
    config = config_of(dataset.plan.config, dataset.url)
    report = report_of(dataset.storage)
    examples = config.report.examples if examples is None else examples
    parts = [(commit.part, int(start)) for commit, start in zip(dataset.commits, dataset.starts, strict=True)]
    content = summarize(dataset.url, parts, id=dataset.id, examples=examples or config.report.examples)
    if "night" in report:
        report["nights"] = recent_nights(dataset.url, report["night"]["date"])
    manifest = _manifest(config, dataset) if examples else None
    if manifest is None or not manifest.image:
        return draw(report, content, examples, None)
    with pixel_reader(config, manifest.root, THUMBNAIL) as reader:
        return draw(report, content, examples, Pictures(manifest, reader))


def _manifest(config: Config, dataset: Dataset) -> Manifest | None:
    """The manifest of a dataset if it still exists unchanged, else None."""
    path = config.manifest.path
    try:
        if path is None:
            log.warning("%s: its plan names no manifest, so no pictures are shown", dataset.url)
            return None
        # The kept columns are in the dataset; only the images are needed from the manifest.
        manifest = open_manifest(config.changed({"manifest.keep": []}).manifest)
    except PipelineError as error:
        log.warning("no pictures are shown: %s", error)
        return None
    manifest = manifest.with_rows([commit.rows for commit in dataset.commits])
    if manifest.rows != dataset.plan.rows:
        log.warning("no pictures are shown: %s has changed since %s was made", path, dataset.url)
        return None
    return manifest


def _examples(content: DatasetSummary, count: int) -> list[Row]:
    """Rows of the first part that has embeddings."""
    for name, start in content.parts[:LOOKED_AT]:
        with open_arrow(f"{content.folder.rstrip('/')}/{name}") as file:
            parquet = pq.ParquetFile(file)
            columns = [parquet.schema_arrow.names[0], "label", "score", "status"]
            table = plain_table(parquet.read(columns=columns).slice(0, REACH))
        chosen = spread(table["status"].to_pylist(), count)
        if chosen:
            rows = table.take(pa.array(chosen, pa.int64())).to_pylist()
            return [
                Row(number=start + place, id=str(row[columns[0]]), label=row["label"], score=row["score"])
                for place, row in zip(chosen, rows, strict=True)
            ]
    return []
