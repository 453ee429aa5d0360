"""The frozen types of a benchmark of the pipeline, and the figures that follow from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.core.records import Stage
from pipeline.report.throughput import Cost, Limit, find_limit


@dataclass(frozen=True, slots=True)
class StageRounds:
    """A stage alone, one value for each round: images/s with ``threads``, and the core seconds of an image.

    ``decoder`` names the decoder of another config than the job's own.
    """

    name: str
    threads: int
    images_per_second: tuple[float, ...]
    core_seconds: tuple[float, ...]
    decoder: str | None = None


@dataclass(frozen=True, slots=True)
class RunRounds:
    """A whole run, by the job or by another tool, from files to a dataset; one value for each round.

    ``steady`` is in images/s from the end of the first batch until the last byte was written, ``command`` in images/s
    from the start of the process to its end. ``startup`` are seconds to the end of the first batch, ``core_seconds``
    those of the whole command for an image, ``peak_mib`` the memory of the main process. ``failure`` says why there is
    no figure.
    """

    title: str
    note: str
    steady: tuple[float, ...] = ()
    command: tuple[float, ...] = ()
    startup: tuple[float, ...] = ()
    core_seconds: tuple[float, ...] = ()
    peak_mib: float = 0.0
    peak_decoder_mib: float = 0.0
    peak_gpu_mib: float = 0.0
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class PipelineBench:
    """The whole benchmark, as written to ``pipeline.json``; ``ours`` begins with the config as it was given.

    ``streams`` batches are encoded side by side; ``padding`` is the share of the encoder's places that only fill up the
    last batches of shards.
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
    ours: tuple[RunRounds, ...]
    tools: tuple[RunRounds, ...]

    @property
    def cores(self) -> int:
        """Of the machine, as far as the job may use them."""
        return int(str(self.machine["cores"]))

    @property
    def device(self) -> str:
        """Type of the encoder's device."""
        return str(self.machine["device"]).split(":")[0]


def rate(stage: StageRounds) -> float:
    """Images per second of the stage alone: the median of the rounds."""
    return median(stage.images_per_second)


def limit(bench: PipelineBench, *, decoder: StageRounds | None = None, number: int | None = None) -> Limit:
    """The bound of medians, or of the round ``number``; with another decoder if one is given."""

    def cost(stage: StageRounds) -> Cost:
        chosen = decoder if decoder is not None and stage.name == Stage.DECODE else stage
        if number is None:
            return Cost(median(chosen.core_seconds), rate(chosen))
        return Cost(chosen.core_seconds[number], chosen.images_per_second[number])

    return find_limit({stage.name: cost(stage) for stage in bench.stages}, cores=bench.cores, device=bench.device)


def limit_without(bench: PipelineBench, name: str) -> Limit:
    """The bound if the stage ``name`` cost nothing."""
    rest = {stage.name: Cost(median(stage.core_seconds), rate(stage)) for stage in bench.stages if stage.name != name}
    return find_limit(rest, cores=bench.cores, device=bench.device)


def shares(bench: PipelineBench) -> dict[str, float]:
    """Each stage's share of the core time of an image."""
    cores = {stage.name: median(stage.core_seconds) for stage in bench.stages}
    total = sum(cores.values()) or 1.0
    return {name: core / total for name, core in cores.items()}


def ratios(bench: PipelineBench) -> list[float]:
    """The job's steady throughput over the bound, both of the same round; empty where the job failed."""
    whole = bench.ours[0]
    return [whole.steady[number] / limit(bench, number=number).images_per_second for number in range(len(whole.steady))]


def best_tool(bench: PipelineBench, *, steady: bool) -> RunRounds | None:
    """The fastest of the other tools."""
    known = [tool for tool in bench.tools if tool.steady]
    return max(known, key=lambda tool: median(tool.steady if steady else tool.command), default=None)


def times(bench: PipelineBench, run: RunRounds, *, steady: bool) -> list[float]:
    """How many times as fast as the fastest of the other tools, both of the same round."""
    best = best_tool(bench, steady=steady)
    if best is None:
        return []
    pairs = zip(run.steady, best.steady, strict=False) if steady else zip(run.command, best.command, strict=False)
    return [ours / theirs for ours, theirs in pairs]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    ``images`` of the manifest, or scenes of ``size`` (width, height) where there is none; ``decoders`` besides the
    config's own; ``ours`` are overrides for more runs of the job; ``seconds`` for one stage in one round.
    """

    images: int | None
    size: tuple[int, int]
    decoders: tuple[str, ...]
    ours: tuple[tuple[str, ...], ...]
    tools: bool
    tool_batch: int
    repeats: int
    seconds: float
    timeout: float


def merged(overrides: Sequence[str], more: Sequence[str]) -> list[str]:
    """The overrides with ``more``, which replace those of the same key."""
    keys = {text.partition("=")[0] for text in more}
    return [*(text for text in overrides if text.partition("=")[0] not in keys), *more]


def quoted(text: str) -> str:
    """A value as Hydra's grammar takes it, whatever is in it."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return f"'{escaped}'"
