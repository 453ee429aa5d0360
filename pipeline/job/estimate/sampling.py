"""Rows for a trial: from all over what is left of a job, as shards of the same make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import TypeVar

from pipeline.core.records import Piece, Shard
from pipeline.manifest.manifest import Manifest

# So many of the shards, and of the runs of rows in each, may be sampled: more would not make a sample any better.
MOST_SHARDS, MOST_RUNS = 256, 256
# To reach a row of a row group, all before it are read. Runs that begin within so many rows come first; where the
# column holds the images themselves, those at the beginning of a row group do.
DEPTH = 32_768
# The steps of the golden ratio spread whatever number of them there is.
_GOLDEN = 0.618
_T = TypeVar("_T")


def spread(manifest: Manifest, shards: Sequence[Shard], *, rows: int) -> list[Piece]:
    """Runs of up to ``rows`` rows, each at most once; however many are taken from the front, they lie all over.

    A job of few shards comes out whole.
    """
    chosen = _evenly(shards, MOST_SHARDS)
    runs = [run for shard in chosen for run in _evenly(list(_cut(shard, rows)), MOST_RUNS)]
    count = len(runs)
    step = max(1, round(_GOLDEN * count))
    while gcd(step, count) > 1:
        step += 1
    mixed = [runs[number * step % count] for number in range(count)]
    depth = DEPTH if manifest.image_kind == "path" else rows
    return sorted(mixed, key=lambda run: run.start // depth)


def in_shards(runs: Sequence[Piece], *, first: int, rows: int) -> Iterator[Shard]:
    """The runs as shards: the first of ``first`` rows, the others of ``rows``, the last of what is left."""
    index, room, taken = 0, first, list[Piece]()
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            taken.append(Piece(file=run.file, row_group=run.row_group, start=start, stop=stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield _shard(index, taken)
                index, room, taken = index + 1, rows, []
    if taken:
        yield _shard(index, taken)


def _shard(index: int, pieces: Sequence[Piece]) -> Shard:
    # In the order of the files: what lies behind one another is read in one go.
    ordered = sorted(pieces, key=lambda piece: (piece.file, piece.row_group, piece.start))
    return Shard(index=index, rows=sum(piece.stop - piece.start for piece in ordered), pieces=tuple(ordered))


def _cut(shard: Shard, rows: int) -> Iterator[Piece]:
    for piece in shard.pieces:
        for start in range(piece.start, piece.stop, rows):
            yield Piece(piece.file, piece.row_group, start, min(piece.stop, start + rows))


def _evenly(items: Sequence[_T], count: int) -> list[_T]:
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]
