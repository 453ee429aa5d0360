"""Small pictures of a dataset's rows, and the HTML that a notebook shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from pipeline.core.errors import PipelineError
from pipeline.dataset.dataset import Dataset
from pipeline.engine.query import config_of_dataset
from pipeline.images.factory import pixel_reader
from pipeline.manifest.manifest import open_manifest
from pipeline.report import thumbnails as gallery

# A notebook does not wait longer for pictures, in seconds.
PATIENCE = 10.0
# Pixels of a picture in the page.
SIDE = 112
# Letters of a line under it that there is room for.
LETTERS = 18
_CELL = f"display:inline-block;width:{SIDE + 4}px;margin:0 8px 8px 0;vertical-align:top;font-size:12px;line-height:1.3"
_CUT = "overflow:hidden;text-overflow:ellipsis;white-space:nowrap"


@dataclass(frozen=True, slots=True)
class Tile:
    """A row as a notebook shows it: its number in the dataset, its id, and a line about it."""

    row: int
    id: str
    text: str = ""


def thumbnails(dataset: Dataset, tiles: Sequence[Tile]) -> dict[int, bytes]:
    """JPEG bytes of the middle of each image by the number of its row; what cannot be shown is left out.

    Where the manifest has gone, or holds other rows by now, that is all.
    """
    if not tiles:
        return {}
    try:
        config = config_of_dataset(dataset)
        manifest = open_manifest(config.manifest)
        if manifest.rows != dataset.plan.rows:
            return {}
        # One process is enough for a few, and starts sooner.
        config = replace(config, loader=replace(config.loader, workers=1))
        with pixel_reader(config, manifest.root, gallery.THUMBNAIL) as reader:
            return gallery.thumbnails(manifest, reader, {tile.row: tile.id for tile in tiles}, seconds=PATIENCE)
    except PipelineError:
        return {}


def sheet(lines: Sequence[str], tiles: Sequence[Tile], pictures: Mapping[int, bytes]) -> str:
    """A contact sheet under a few lines, of which the first is the heading; every text is escaped."""
    head = "".join(f"<div>{escape(line)}</div>" for line in lines[1:])
    shown = "".join(_tile(tile, pictures.get(tile.row)) for tile in tiles)
    return f"<div><div><b>{escape(lines[0])}</b></div>{head}<div style='margin-top:8px'>{shown}</div></div>"


def _tile(tile: Tile, jpeg: bytes | None) -> str:
    title, text = escape(tile.id), escape(tile.text)
    # The end of a path tells more than its beginning.
    short = title if len(tile.id) <= LETTERS else f"…{escape(tile.id[1 - LETTERS :])}"
    picture = f"<div style='width:{SIDE}px;height:{SIDE}px;border:1px solid #8888'></div>"
    if jpeg is not None:
        code = base64.b64encode(jpeg).decode()
        picture = f"<img width='{SIDE}' height='{SIDE}' alt='{title}' src='data:image/jpeg;base64,{code}'>"
    told = ((title, short), (text, text))
    lines = "".join(f"<div style='{_CUT}' title='{whole}'>{line}</div>" for whole, line in told if line)
    return f"<div style='{_CELL}'>{picture}{lines}</div>"
