"""Search results and datasets in a notebook: a sequence of hits, and HTML sheets with thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import overload

import pandas as pd

from pipeline.core.errors import PipelineError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.search import Hit
from pipeline.engine.query import config_of_dataset
from pipeline.images.factory import pixel_reader
from pipeline.manifest.manifest import open_manifest
from pipeline.report import thumbnails as gallery

# Thumbnails of a search result.
SHOWN = 24
# Seconds after which a sheet is shown without the remaining thumbnails.
TIMEOUT = 10.0
# Pixels of a thumbnail on the page.
SIDE = 112
# Characters of a caption line.
CHARACTERS = 18
_CELL = f"display:inline-block;width:{SIDE + 4}px;margin:0 8px 8px 0;vertical-align:top;font-size:12px;line-height:1.3"
_CUT = "overflow:hidden;text-overflow:ellipsis;white-space:nowrap"


class Hits(Sequence[Hit]):
    """The rows that a search found, best first; a notebook shows thumbnails."""

    def __init__(self, dataset: Dataset, rows: Sequence[int], hits: Sequence[Hit], query: str) -> None:
        self._dataset, self._rows, self._hits, self._query = dataset, rows, hits, query

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hit]: ...
    def __getitem__(self, index: int | slice) -> Hit | Sequence[Hit]:
        return self._hits[index]

    def __len__(self) -> int:
        return len(self._hits)

    def frame(self) -> pd.DataFrame:
        """One row for each hit: rank, score (cosine), the id, label, and the kept columns."""
        table = [
            {"rank": hit.rank, "score": hit.score, self._dataset.id: hit.id, "label": hit.label, **hit.kept}
            for hit in self._hits
        ]
        return pd.DataFrame(table, columns=["rank", "score", self._dataset.id, "label", *self._dataset.kept])

    def __repr__(self) -> str:
        return f"{len(self)} nearest to {self._query}\n{self.frame().to_string(index=False)}"

    def _repr_html_(self) -> str:
        tiles = [
            Tile(row, str(hit.id), f"{hit.score:.3f}  {hit.label or ''}")
            for row, hit in zip(self._rows[:SHOWN], self._hits[:SHOWN], strict=True)
        ]
        return sheet(self._dataset, [f"{len(self)} nearest to {self._query}"], tiles)


@dataclass(frozen=True, slots=True)
class Tile:
    """A row on a sheet: its number in the dataset, its id, and a caption."""

    row: int
    id: str
    text: str = ""


def sheet(dataset: Dataset, lines: Sequence[str], tiles: Sequence[Tile]) -> str:
    """HTML of a contact sheet under some lines, of which the first is the heading; every text is escaped."""
    pictures = _thumbnails(dataset, tiles) if tiles else {}
    shown = "".join(_tile(tile, pictures.get(tile.row)) for tile in tiles)
    return f"<div>{heading(lines)}<div style='margin-top:8px'>{shown}</div></div>"


def heading(lines: Sequence[str]) -> str:
    """HTML of some lines, of which the first is bold; every text is escaped."""
    rest = "".join(f"<div>{escape(line)}</div>" for line in lines[1:])
    return f"<div><b>{escape(lines[0])}</b></div>{rest}"


def _thumbnails(dataset: Dataset, tiles: Sequence[Tile]) -> dict[int, bytes]:
    """JPEG bytes of the middle of each image by row; images that cannot be read are left out.

    Empty if the manifest was removed or has another number of rows.
    """
    try:
        config = config_of_dataset(dataset)
        manifest = open_manifest(config.manifest).with_rows([commit.rows for commit in dataset.commits])
        if manifest.rows != dataset.plan.rows:
            return {}
        # One process is enough for a few images, and starts sooner.
        config = config.changed({"loader.workers": 1})
        with pixel_reader(config, manifest.root, gallery.THUMBNAIL) as reader:
            return gallery.thumbnails(manifest, reader, {tile.row: tile.id for tile in tiles}, seconds=TIMEOUT)
    except PipelineError:
        return {}


def _tile(tile: Tile, jpeg: bytes | None) -> str:
    title, text = escape(tile.id), escape(tile.text)
    # The end of a path identifies a file better than its beginning.
    short = title if len(tile.id) <= CHARACTERS else f"…{escape(tile.id[1 - CHARACTERS :])}"
    picture = f"<div style='width:{SIDE}px;height:{SIDE}px;border:1px solid #8888'></div>"
    if jpeg is not None:
        code = base64.b64encode(jpeg).decode()
        picture = f"<img width='{SIDE}' height='{SIDE}' alt='{title}' src='data:image/jpeg;base64,{code}'>"
    captions = ((title, short), (text, text))
    lines = "".join(f"<div style='{_CUT}' title='{whole}'>{line}</div>" for whole, line in captions if line)
    return f"<div style='{_CELL}'>{picture}{lines}</div>"
