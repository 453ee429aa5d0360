"""Sample of a job: rows from all over its manifest as shards, and the demo's scenes where a job has no manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import TypeVar

from pipeline.config.schema import Config
from pipeline.core.errors import ManifestError
from pipeline.core.records import Piece, Shard
from pipeline.dataset import plan
from pipeline.engine.demo import folder as demo
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import cut
from pipeline.storage.base import Storage

# Shards that are sampled, and runs of rows in each of them: more would not make the sample any better.
MOST_SHARDS, MOST_RUNS = 256, 256
# All rows of a row group before a wanted one are read too. Runs that begin within so many rows come first; where the
# column holds the images themselves, those at the beginning of a row group do.
DEPTH = 32_768
# Scenes that are rendered for the parity gates, which read the first ones, and for the trial.
GATES, TRIAL = 256, 1024
# Steps of the golden ratio spread any number of items evenly.
_GOLDEN_RATIO = 0.618
_T = TypeVar("_T")
log = logging.getLogger(__name__)


def expected(manifest: Manifest, shard_rows: int) -> Iterator[Shard]:
    """Return every shard of a job; a tar has the rows that are expected of its bytes."""
    for shard in cut(manifest, shard_rows):
        if manifest.counted:
            yield shard
        else:
            rows = manifest.files[shard.index].rows
            yield replace(shard, rows=rows, pieces=tuple(replace(piece, stop=rows) for piece in shard.pieces))


def spread(manifest: Manifest, shards: Sequence[Shard], *, rows: int) -> list[Piece]:
    """Return runs of up to ``rows`` rows, each at most once, so that every prefix covers the manifest evenly.

    A job of few shards is returned whole.
    """
    chosen = _evenly(shards, MOST_SHARDS)
    runs = [run for shard in chosen for run in _evenly(list(_split(shard, rows)), MOST_RUNS)]
    count = len(runs)
    step = max(1, round(_GOLDEN_RATIO * count))
    while gcd(step, count) > 1:
        step += 1
    mixed = [runs[number * step % count] for number in range(count)]
    depth = DEPTH if manifest.image_kind == "path" else rows
    return sorted(mixed, key=lambda run: run.start // depth)


def in_shards(runs: Sequence[Piece], *, first: int, rows: int) -> Iterator[Shard]:
    """Cut the runs into shards: the first of ``first`` rows, the others of ``rows``, the last of the remaining ones."""
    index, missing, pieces = 0, first, list[Piece]()
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + missing)
            pieces.append(replace(run, start=start, stop=stop))
            missing -= stop - start
            start = stop
            if missing == 0:
                yield _shard(index, pieces)
                index, missing, pieces = index + 1, rows, []
    if pieces:
        yield _shard(index, pieces)


def _shard(index: int, pieces: Sequence[Piece]) -> Shard:
    # In the order of the files, so that neighbouring rows are read together.
    ordered = sorted(pieces, key=lambda piece: (piece.file, piece.row_group, piece.start))
    return Shard(index=index, rows=sum(piece.stop - piece.start for piece in ordered), pieces=tuple(ordered))


def _split(shard: Shard, rows: int) -> Iterator[Piece]:
    for piece in shard.pieces:
        for start in range(piece.start, piece.stop, rows):
            yield replace(piece, start=start, stop=min(piece.stop, start + rows))


def _evenly(items: Sequence[_T], count: int) -> list[_T]:
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


class Scenes:
    """Manifest of a job that has none: the rendered scenes of its output, or a few of them in a temporary folder.

    ``config`` is the job's with that manifest; a job with a manifest of its own keeps it.

    Args:
        config: config of the job.
        storage: its output.
        folder: temporary folder; nothing is written anywhere else.

    Raises:
        ManifestError: the output exists, and its scenes do not.
    """

    def __init__(self, config: Config, storage: Storage, folder: Path) -> None:
        self.config, self.seconds = config, 0.0
        self._folder, self._rendered, self._partial = folder, 0, False
        manifest = config.manifest
        if manifest.path is not None:
            return
        place = demo.scenes_folder(config.output.dir)
        path = demo.manifest_in(place, manifest.demo_scenes)
        log.info("manifest.path is not set: estimated for %d rendered scenes in %s", manifest.demo_scenes, place)
        if not path.exists():
            if plan.read(storage) is not None:
                raise ManifestError(
                    f"{path}: the scenes of {storage.url} are gone, and an estimate renders none there; the same "
                    "command without run.dry does"
                )
            self._partial = True
            path = self._render(range(min(GATES, manifest.demo_scenes)))
        self.config = demo.with_scenes(config, path)

    @property
    def seconds_to_render(self) -> float:
        """Seconds that the job needs to render its scenes; 0 where they exist."""
        if not self._partial:
            return 0.0
        return self.seconds / self._rendered * self.config.manifest.demo_scenes

    def sample(self, runs: Sequence[Piece]) -> list[Piece]:
        """Return the first runs, whose scenes are rendered now; all of them where nothing has to be rendered."""
        if not self._partial:
            return list(runs)
        chosen, rows = list[Piece](), list[int]()
        for run in runs:
            if len(rows) >= TRIAL:
                break
            chosen.append(run)
            rows += range(run.start, run.stop)
        self._render(rows)
        return chosen

    def _render(self, rows: Sequence[int]) -> Path:
        began = time.time()
        path = demo.render_folder(self._folder, self.config.manifest.demo_scenes, rows=rows)
        self._rendered += len(rows)
        self.seconds += time.time() - began
        return path
