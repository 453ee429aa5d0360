"""The folder that a manifest's relative paths start from, found again after it moved together with the manifest."""

from __future__ import annotations

import logging
import os

import pyarrow.parquet as pq

from pipeline.storage.moved import find_again, is_gone
from pipeline.storage.urls import is_local, local_path, open_arrow

# Relative paths of a manifest that are looked for below a folder.
TRIED = 16
log = logging.getLogger(__name__)


def find_root(recorded: str, url: str, image: str) -> str:
    """The folder that a manifest records for its relative paths, or its place now if it was renamed with the manifest.

    A folder at the same place relative to the manifest counts if at least half of the first images are there.

    Args:
        recorded: the folder in the manifest's metadata; empty if there is none.
        url: the manifest's first file.
        image: its image column.
    """
    if not recorded or not is_gone(recorded):
        return recorded
    paths = _first_paths(url, image)
    for place in find_again(recorded, url):
        there = sum(os.path.isfile(os.path.join(place, path)) for path in paths)
        if paths and 2 * there >= len(paths):
            log.warning("%s: its images were in %s, which is gone, and are taken from %s", url, recorded, place)
            return place
    return recorded


def _first_paths(url: str, image: str) -> list[str]:
    """The first relative local paths of a manifest."""
    with open_arrow(url) as handle:
        batch = next(pq.ParquetFile(handle, pre_buffer=False).iter_batches(TRIED, columns=[image]), None)
    cells = [] if batch is None else batch.column(0).to_pylist()
    texts = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
    paths = [local_path(text) for text in texts if isinstance(text, str) and text and is_local(text)]
    return [path.partition("#bytes=")[0] for path in paths if not os.path.isabs(path)]
