"""Extent of a comparison with fp32, in proportion to the job: how many images, and whether at all places of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.backends.base import ImageEncoder
from pipeline.config.schema import ParityConfig

# A comparison takes at most this share of the job, or as many seconds, whichever is more.
SHARE, SECONDS = 0.03, 2.0


@dataclass(frozen=True, slots=True)
class Extent:
    """``images`` to compare; ``whole`` is True if full batches are encoded, so that every place of one is compared."""

    images: int
    whole: bool

    def covers(self, other: Extent) -> bool:
        """True if a comparison of this extent shows all that one of ``other`` does."""
        return self.images >= other.images and self.whole >= other.whole


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds for an image, on the clock: in full batches of all streams, in fp32, and to read and decode it."""

    backend: float
    fp32: float
    drawing: float = 0.0

    def seconds(self, extent: Extent, encoder: ImageEncoder) -> float:
        """Estimated seconds of a comparison."""
        places = batch_places(extent.images, encoder) if extent.whole else extent.images
        return places * self.backend + extent.images * (self.fp32 + self.drawing)


def extents(limits: ParityConfig, encoder: ImageEncoder) -> list[Extent]:
    """The extents to choose from, smallest first; the first one is always affordable, the last one is the most.

    An encoder of one shape encodes full batches anyway.
    """
    images, fewest = limits.images, min(limits.fewest, limits.images)
    sizes = [images]
    while sizes[0] > fewest:
        sizes.insert(0, max(sizes[0] // 2, fewest))
    smallest = [Extent(fewest, whole=False)] if encoder.flexible else []
    return smallest + [Extent(size, whole=True) for size in sizes]


def affordable(
    choices: Sequence[Extent], costs: Costs, encoder: ImageEncoder, *, rows: int, spent: float | None = None
) -> Extent:
    """The largest extent whose comparison is in proportion to a job of ``rows``; at least the first of ``choices``.

    ``spent`` are the seconds that the first one took; None: as ``costs`` say.
    """
    budget = max(SECONDS, SHARE * rows * costs.backend)
    budget -= costs.seconds(choices[0], encoder) if spent is None else spent
    return next((each for each in reversed(choices[1:]) if costs.seconds(each, encoder) <= budget), choices[0])


def batch_places(images: int, encoder: ImageEncoder) -> int:
    """Places of the full batches that ``images`` take, with those of streams that have nothing to do meanwhile."""
    turn = encoder.batch_size * encoder.streams
    return -(-images // turn) * turn
