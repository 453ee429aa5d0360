"""An estimate of a run with the next faster decoder, from images of the run itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.core.processes import cores
from pipeline.core.records import ImageRef, Stage
from pipeline.core.run_report import Pace
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.report.bottleneck import Cost, ProcessSetup, find_limit, in_words
from pipeline.report.thumbnails import find
from pipeline.telemetry.run_stats import RunStats

# The next faster decoder.
FASTER = {"exact": "fast", "fast": "scaled"}
# Seconds; a shorter run is not worth the time of the comparison.
LONG = 30.0
# Images that are decoded twice, the first rows of the manifest that they come from, and the seconds for reading them.
PICTURES, REACH, SECONDS = 24, 2048, 10.0
# A smaller gain is not worth a change of the decoder.
GAIN = 1.2
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Faster:
    """The estimate for another decoder: how many ``times`` as fast it decodes, and the images/s of the whole run."""

    decoder: str
    times: float
    images_per_second: float

    @property
    def advice(self) -> str:
        """The estimate as a sentence."""
        if self.times < GAIN:
            return (
                f"images.decoder={self.decoder} would hardly help: it decodes {PICTURES} of these images only "
                f"{self.times:.1f} times as fast; use smaller images or more cores"
            )
        return (
            f"images.decoder={self.decoder} would give about {in_words(self.images_per_second)} images/s (it decodes "
            f"these images {self.times:.1f} times as fast)"
        )


def faster_decoder(
    manifest: Manifest, reader: PixelReader, pace: Pace | None, stats: RunStats, setup: ProcessSetup
) -> Faster | None:
    """Decode some images with the decoder of the run and with the next faster one; None for a short run.

    Args:
        manifest: manifest of the run.
        reader: reader of its images.
        pace: cost of its stages.
        stats: its images, seconds and cores.
        setup: its decoder and its device.
    """
    kind = setup.decoder
    if stats.seconds < LONG or pace is None or kind not in FASTER or Stage.DECODE not in pace.stages:
        return None
    count = min(manifest.rows, REACH)
    numbers = sorted({place * count // PICTURES for place in range(PICTURES)})
    try:
        refs = list(_read(manifest, reader, numbers))
        now, then = (_seconds(reader, each, refs) if refs else 0.0 for each in (kind, FASTER[kind]))
    except Exception as error:
        # The run is finished; a missing estimate is not worth an error.
        log.debug("%s: %s", type(error).__name__, error)
        return None
    if not now or not then:
        return None
    costs = {
        name: Cost(
            stage.core_seconds / stats.images * (then / now if name == Stage.DECODE else 1.0),
            stage.images_per_second or float("inf"),
        )
        for name, stage in pace.stages.items()
    }
    limit = find_limit(costs, cores=stats.cores or cores(), device=setup.device)
    return Faster(FASTER[kind], now / then, limit.images_per_second * min(1.0, pace.ratio))


def _read(manifest: Manifest, reader: PixelReader, numbers: Sequence[int]) -> Iterator[ImageRef]:
    """Some images with their bytes, until the timeout."""
    end = time.monotonic() + SECONDS
    source = replace(reader.source, read_seconds=min(reader.source.read_seconds, SECONDS / 4))
    for _, ref in find(manifest, numbers, seconds=SECONDS):
        data = source.read(ref)
        if isinstance(data, bytes):
            yield ImageRef(id=ref.id, data=data)
        if time.monotonic() > end:
            return


def _seconds(reader: PixelReader, kind: str, refs: list[ImageRef]) -> float:
    """Seconds of decoding; the first image, which starts a process, does not count."""
    spent = 0.0

    def add(stage: str, seconds: float) -> None:
        nonlocal spent
        spent += seconds if stage == Stage.DECODE else 0.0

    other = reader.by(kind)
    try:
        other.read(refs[0])
        other.read_all(refs, add)
    finally:
        other.close()
    return spent
