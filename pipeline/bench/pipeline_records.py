"""Records of a benchmark of the pipeline, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from pipeline.core.records import Stage
from pipeline.report.bottleneck import Cost, Limit, find_limit


@dataclass(frozen=True, slots=True)
class StageRounds:
    """A stage alone, one value for each round: images/s with ``threads``, and the core seconds of an image.

    ``decoder`` names a decoder other than the job's own.
    """

    name: str
    threads: int
    images_per_second: tuple[float, ...]
    core_seconds: tuple[float, ...]
    decoder: str | None = None


@dataclass(frozen=True, slots=True)
class JobRounds:
    """Runs of the whole job, from files to a dataset, one value for each round.

    ``steady`` is in images/s from the end of the first batch until the last byte was written, ``command`` in images/s
    from the start of the process to its end. ``startup`` are seconds to the end of the first batch, ``core_seconds``
    those of the whole command for an image. Memory is the peak of all rounds: of the main process, of the largest
    decoder process, of the GPU.
    """

    steady: tuple[float, ...]
    command: tuple[float, ...]
    startup: tuple[float, ...]
    core_seconds: tuple[float, ...]
    peak_mib: float
    peak_decoder_mib: float = 0.0
    peak_gpu_mib: float = 0.0


@dataclass(frozen=True, slots=True)
class PipelineBench:
    """The whole benchmark, as written to ``pipeline.json``.

    ``streams`` batches are encoded side by side; ``padding`` is the share of padding rows in the last batches of
    shards.
    """

    started: str
    command: str
    model: str
    images: str
    backend: str
    decoder: str
    labels: int
    batch: int
    streams: int
    padding: float
    repeats: int
    seconds: float
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    stages: tuple[StageRounds, ...]
    decoders: tuple[StageRounds, ...]
    job: JobRounds

    @property
    def cores(self) -> int:
        """Cores that the job may use."""
        return int(str(self.machine["cores"]))

    @property
    def device(self) -> str:
        """Type of the encoder's device."""
        return str(self.machine["device"]).split(":")[0]


def rate(stage: StageRounds) -> float:
    """Images per second of the stage alone: the median of the rounds."""
    return median(stage.images_per_second)


def limit(
    bench: PipelineBench, *, decoder: StageRounds | None = None, number: int | None = None, without: str | None = None
) -> Limit:
    """The bound of the medians, or of the round ``number``; with another decoder, or ``without`` a stage."""

    def cost(stage: StageRounds) -> Cost:
        chosen = decoder if decoder is not None and stage.name == Stage.DECODE else stage
        if number is None:
            return Cost(median(chosen.core_seconds), rate(chosen))
        return Cost(chosen.core_seconds[number], chosen.images_per_second[number])

    costs = {stage.name: cost(stage) for stage in bench.stages if stage.name != without}
    return find_limit(costs, cores=bench.cores, device=bench.device)


def shares(bench: PipelineBench) -> dict[str, float]:
    """Each stage's share of the core time of an image."""
    cores = {stage.name: median(stage.core_seconds) for stage in bench.stages}
    total = sum(cores.values()) or 1.0
    return {name: core / total for name, core in cores.items()}


def ratios(bench: PipelineBench) -> list[float]:
    """The job's steady throughput over the bound, in each round."""
    return [steady / limit(bench, number=number).images_per_second for number, steady in enumerate(bench.job.steady)]
