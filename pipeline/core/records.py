"""The frozen types that travel along the line from the manifest to the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

OK = "ok"
# The status of the row that stands for the images behind the damage of a tar, whose number is unknown.
DAMAGED = "damaged_tar"


class Stage(StrEnum):
    """Stages of a job: work first, then the waits of the encoder's thread."""

    READ = "read"
    DECODE = "decode"
    COPY = "copy"
    ENCODE = "encode"
    LABEL = "label"
    WRITE = "write"
    WAIT_INPUT = "wait for images"
    WAIT_OUTPUT = "wait for writer"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Reference to one image of the manifest: encoded bytes, or a path or URL; neither for a null cell.

    ``failure`` says why there is none, if that is known before it is read.
    """

    id: str | int
    path: str | None = None
    data: bytes | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start`` to ``stop`` (exclusive) of one row group of one manifest file."""

    file: int
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows of the manifest: the unit of work, of commit and of resume."""

    index: int
    rows: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image has no embedding: ``status`` is a short fixed name, ``error`` says it in words."""

    status: str
    error: str


@dataclass(frozen=True, slots=True)
class Pixels:
    """One decoded image at the model's input size: uint8 ``[H, W, 3]``, RGB."""

    rgb: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """Preprocessing of a checkpoint; sizes are pixels, ``mean`` and ``std`` refer to [0, 1].

    ``resize`` is the length of the shorter edge (the longer one keeps the aspect ratio, rounded down)
    or an exact (height, width); ``crop`` is a centre crop (height, width), or None, and ``corner`` how the
    half of an odd margin is rounded: ``floor`` or ``round`` (to the even number). ``resample`` is Pillow's
    filter number.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    corner: str = "floor"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.resize, int):
            raise TypeError("a resize of the shorter edge without a crop gives no fixed size")
        return self.resize


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """A batch of one shard at the static shape.

    ``pixels`` is uint8 ``[B, 3, H, W]`` on the encoder's device; the first ``len(rows)`` images count, the rest
    repeat them (:mod:`pipeline.engine.padding`). ``rows`` are the positions in the shard. Whoever encodes it calls
    ``release`` once the pixels are no longer needed, and the buffer is used again.
    """

    shard: Shard
    rows: NDArray[np.int64]
    pixels: torch.Tensor
    slot: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Pictures of the job, spread over its manifest: what a backend is compared, and calibrated, on.

    ``pixels`` is uint8 ``[N, 3, H, W]`` on the CPU, N at least 1; row i is the picture ``ids[i]``. ``vectors``, float32
    ``[N, D]``, are the embeddings that the job has made of them; None where it has made none.
    """

    ids: tuple[str, ...]
    pixels: torch.Tensor
    vectors: torch.Tensor | None = None

    def half(self, start: int) -> Sample:
        """Every second picture from ``start`` (0 or 1) on: what is calibrated on one half is judged on the other."""
        if len(self.ids) == 1:
            return self
        return self._at(list(range(start, len(self.ids), 2)))

    def spread(self, count: int) -> Sample:
        """Up to ``count`` of the pictures, at equal distances."""
        if count >= len(self.ids):
            return self
        return self._at([place * len(self.ids) // count for place in range(count)])

    def _at(self, places: list[int]) -> Sample:
        vectors = None if self.vectors is None else self.vectors[places]
        return Sample(ids=tuple(self.ids[place] for place in places), pixels=self.pixels[places], vectors=vectors)


@dataclass(frozen=True, slots=True)
class Parity:
    """Comparison of a backend with fp32: cosines over ``images`` images, and the share with the same best label.

    ``top1`` is None where there are no labels; ``worst`` holds ids and cosines, lowest first. ``remembered`` is set
    where an earlier job compared more images with the same arithmetic, and these were compared again. ``screened`` is
    how many pictures were compared pixel by pixel to find those that are furthest apart, whose embeddings were compared
    then; None where embeddings of all were.
    """

    images: int
    lowest_cosine: float
    mean_cosine: float
    top1: float | None
    worst: tuple[tuple[str, float], ...]
    remembered: Remembered | None = None
    screened: int | None = None


@dataclass(frozen=True, slots=True)
class Remembered:
    """The figures of the earlier job ``job``, which is a digest of its inputs."""

    job: str
    parity: Parity


@dataclass(frozen=True, slots=True)
class ShardRows:
    """All that is known of a shard once its last image was read, except for embeddings.

    ``table`` holds the id and the kept columns in manifest order; ``failures`` maps positions to why, ``repeats`` those
    of images to the first one with the same bytes, which alone was embedded. ``texts`` counts the rows of a job with
    texts: with a text (``rows``), without one, with one that another row has too, with one that was cut.
    """

    shard: Shard
    table: pa.Table
    failures: Mapping[int, Failure]
    repeats: Mapping[int, int] = field(default_factory=dict)
    texts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """L2-normalised vectors, float32 ``[N, D]``, on the device that made them."""

    vectors: torch.Tensor


@dataclass(frozen=True, slots=True)
class Labels:
    """The best ``k`` labels of each row, best first: ``indices`` int64 and ``scores`` float32, ``[N, k]``."""

    indices: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True, slots=True)
class TextBank:
    """The embedded label set: ``features`` float32 ``[L, D]``, L2-normalised, row i for ``names[i]``.

    ``scoring`` is ``softmax`` (CLIP) or ``sigmoid`` (SigLIP); ``scale`` multiplies the cosine and
    ``bias`` is added. ``cached`` says whether the features came from the cache on disk.
    """

    names: tuple[str, ...]
    features: NDArray[np.float32]
    scoring: str
    scale: float
    bias: float
    fingerprint: str
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Timeline:
    """Slices of ``width`` seconds from ``began`` (seconds since the epoch) on, one after the other.

    ``amounts`` holds, by stage, the seconds that its threads spent in each slice, and as ``images`` how many were
    embedded in it.
    """

    began: float = 0.0
    width: float = 0.0
    amounts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds by stage, summed over the threads that spent them; clocks of shards and workers add up.

    ``cores`` are the core seconds of those threads alone, not of others that work for them.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    cores: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Clocks) -> Clocks:
        return Clocks(_sum(self.seconds, other.seconds), _sum(self.cores, other.cores))


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in dict.fromkeys([*one, *other])}


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Result of one shard: its part, its rows by status, and whether the commit is this run's.

    ``repeats`` counts the rows that share the embedding of an earlier row with the same bytes. ``began``, the request
    for its rows, and ``ended``, when it was durable, are seconds since the epoch; 0 where they were not measured.
    ``texts`` are those of :class:`ShardRows`.
    """

    shard: int
    part: str
    rows: int
    counts: Mapping[str, int]
    committed: bool
    repeats: int = 0
    began: float = 0.0
    ended: float = 0.0
    texts: Mapping[str, int] = field(default_factory=dict)


def by_status(counts: Mapping[str, int]) -> dict[str, int]:
    """Return rows by status: ``ok`` first, the others by name."""
    return {OK: counts.get(OK, 0), **{status: counts[status] for status in sorted(counts) if status != OK}}


def failed_rows(counts: Mapping[str, int]) -> int:
    """Return the number of rows without an embedding, from the rows by status."""
    return sum(count for status, count in counts.items() if status != OK)
