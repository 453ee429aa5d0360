"""The rows that a search found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import pandas as pd

from pipeline.api import thumbnails
from pipeline.dataset import dataset as opened
from pipeline.dataset.search import Hit

# Pictures that a notebook shows.
_TILES = 24


class Hits(Sequence[Hit]):
    """The rows that a search found, best first; a notebook shows their pictures."""

    def __init__(self, dataset: opened.Dataset, rows: Sequence[int], hits: Sequence[Hit], asked: str) -> None:
        self._dataset, self._rows, self._hits, self._asked = dataset, rows, hits, asked

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
        return f"{len(self)} nearest to {self._asked}\n{self.frame().to_string(index=False)}"

    def _repr_html_(self) -> str:
        tiles = [
            thumbnails.Tile(row, str(hit.id), f"{hit.score:.3f}  {hit.label or ''}")
            for row, hit in zip(self._rows, self._hits, strict=True)
        ][:_TILES]
        found = thumbnails.thumbnails(self._dataset, tiles)
        return thumbnails.sheet([f"{len(self)} nearest to {self._asked}"], tiles, found)
