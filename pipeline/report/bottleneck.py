"""The bottleneck of a run, and the throughput that its stages allow, compared with the one it had; pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.records import Clocks, Stage
from pipeline.core.run_report import Pace, StagePace
from pipeline.telemetry.run_stats import RunStats

START_UP = "start-up"
# Core time of the process outside of all stages.
OTHER = "other"
WAITS = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT)
# Stages that also wait for storage, so that core seconds alone do not give their rate.
_ELSEWHERE = (Stage.READ, Stage.WRITE)
# Stages that run on a GPU, although a core waits for them in a busy loop.
_ON_GPU = (Stage.COPY, Stage.ENCODE, Stage.LABEL)
# With a larger share of its time spent waiting, the encoder is not the bottleneck.
WAITING = 0.25
# With a larger share of its batches waiting for their launches, a GPU is not the bottleneck.
STARVED = 0.5
# A smaller share of the limit means time that no stage explains.
NEAR = 0.95
# Images that were decoded before the clock started lift the rate of a short run above its limit.
OVER = 1.05


@dataclass(frozen=True, slots=True)
class ProcessSetup:
    """The work of each process of a run: type of its device such as ``cpu``, threads that read and decode, cores."""

    device: str
    precision: str
    decoder: str
    threads: int
    streams: int
    cores: int

    def threads_of(self, processes: int) -> dict[str, int]:
        """Return the parallel threads of all processes by stage; one for a stage that is not named."""
        reading, encoding = processes * self.threads, processes * self.streams
        return {Stage.READ: reading, Stage.DECODE: reading, Stage.ENCODE: encoding, Stage.LABEL: encoding}


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The slowest stage of a run, and the advice against it, in words."""

    stage: str
    advice: str


@dataclass(frozen=True, slots=True)
class GpuUse:
    """The share of the loop's time in which the GPUs computed (``busy``), and of the batches that waited for their
    launches (``starved``)."""

    busy: float
    starved: float


def gpu_use(stats: RunStats, seconds: float) -> GpuUse | None:
    """The use of the GPUs in a loop of ``seconds``; None without a batch on a GPU."""
    starved = stats.gpu_starved
    if starved is None or seconds <= 0:
        return None
    return GpuUse(busy=min(1.0, stats.gpu_seconds / (seconds * stats.processes)), starved=starved)


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """The loop of a run: ``images`` in ``seconds``, from the first read to the last write.

    ``steady`` are the images/s after the start-up; 0 where the run was too short to tell, and the whole loop counts.
    """

    images: int
    seconds: float
    steady: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a stage: ``core_seconds`` for one image, and ``images_per_second`` of the stage alone with the
    threads of the job (infinite where nothing waits for it)."""

    core_seconds: float
    images_per_second: float


@dataclass(frozen=True, slots=True)
class Limit:
    """The highest possible rate in images/s, the stage ``by`` which it is set, and whether all ``cores`` together set
    it."""

    images_per_second: float
    by: str
    cores: bool


def find_limit(costs: Mapping[str, Cost], *, cores: int, device: str) -> Limit:
    """The highest rate of a run whose stages cost ``costs``.

    The cores share all stages, so their limit is ``cores / sum of core seconds``; on a CPU ``by`` is then the stage
    with the largest share. A stage on the GPU (also decoding, if it runs there), and a stage that waits for disk or
    network, is the limit by itself if it is slower.
    """
    gpu = device != "cpu"
    work = {name: cost for name, cost in costs.items() if not (gpu and name in (*_ON_GPU, OTHER))}
    total = sum(cost.core_seconds for cost in work.values())
    largest = max(work, key=lambda name: work[name].core_seconds, default=OTHER)
    limits = [Limit(cores / total if total > 0 else float("inf"), largest, cores=True)]
    alone = _ELSEWHERE + ((*_ON_GPU, Stage.DECODE) if gpu else ())
    limits += [Limit(cost.images_per_second, name, cores=False) for name, cost in costs.items() if name in alone]
    return min(limits, key=lambda limit: limit.images_per_second)


def find_bottleneck(
    clocks: Clocks, setup: ProcessSetup, *, startup: float, wall: float, gpu: GpuUse | None = None
) -> Bottleneck:
    """Return the bottleneck of a run; ``startup`` and ``wall`` are seconds, ``gpu`` is the use of its GPUs."""
    seconds, workers, cores = clocks.seconds, setup.threads, setup.cores
    wait_in, wait_out = seconds.get(Stage.WAIT_INPUT, 0.0), seconds.get(Stage.WAIT_OUTPUT, 0.0)
    # Batches that are encoded in parallel share their wall time.
    encoding = (seconds.get(Stage.ENCODE, 0.0) + seconds.get(Stage.LABEL, 0.0)) / setup.streams
    loop = wait_in + wait_out + encoding
    if loop == 0:
        return Bottleneck("nothing", "every shard was done already")
    if startup > wall / 2:
        advice = f"start-up took {startup:.1f} of {wall:.1f} s and does not grow with the number of images"
        return Bottleneck(START_UP, advice)
    if wait_out / loop > WAITING:
        return Bottleneck("writing", "write to a faster disk, or raise manifest.shard_rows for fewer, larger parts")
    if wait_in / loop > WAITING:
        if seconds.get(Stage.READ, 0.0) > seconds.get(Stage.DECODE, 0.0):
            advice = f"raise loader.workers (now {workers}): reading waits for storage, so more threads help"
            return Bottleneck("reading", advice)
        if workers < cores:
            advice = f"raise loader.workers from {workers} to {cores}, one for each core"
        elif setup.decoder == "exact":
            advice = "images.decoder=fast decodes JPEGs two to three times as fast (README, Decoders)"
        else:
            advice = f"all {cores} cores decode; smaller images or more cores would help"
        return Bottleneck("decoding", advice)
    if gpu is not None and gpu.starved > STARVED:
        advice = (
            f"the GPU computed in {gpu.busy:.0%} of the time, and {gpu.starved:.0%} of the batches waited for the "
            "process that launches them: raise loader.batch_size, or lower loader.workers, whose threads hold it up"
        )
        return Bottleneck("launching", advice)
    if setup.device != "cpu":
        busy = "" if gpu is None else f", busy in {gpu.busy:.0%} of the time"
        advice = f"the GPU is the slowest stage{busy}; raise loader.batch_size until images/s stops rising"
    elif setup.precision == "fp32":
        advice = (
            "the model is the slowest stage; use a GPU (backend.device=cuda), or backend.precision=bf16 on a processor "
            "with AVX512_BF16 or AMX"
        )
    else:
        advice = "the model is the slowest stage; use a GPU (backend.device=cuda) or more cores"
    return Bottleneck("encoding", advice)


def find_pace(stats: RunStats, setup: ProcessSetup, loop: LoopFigures) -> Pace | None:
    """The rates of a run's stages and its share of their limit; None where nothing was embedded.

    ``stats`` hold the clocks, and the core seconds of the loop, of processes that worked side by side.
    """
    if loop.images == 0 or not stats.workers:
        return None
    clocks, spent, cores, images = stats.clocks, stats.spent, stats.cores, loop.images
    threads, device = setup.threads_of(stats.processes), setup.device
    used = {name: core for name, core in clocks.cores.items() if name not in WAITS}
    rest = max(0.0, spent.own - sum(used.values()))
    if spent.children:
        used[Stage.DECODE] = used.get(Stage.DECODE, 0.0) + spent.children
    # Of several threads that work on one batch, the clocks count only the first.
    shared = device == "cpu" and cores // threads[Stage.ENCODE] > 1 and Stage.ENCODE in used
    where = Stage.ENCODE if shared else OTHER
    used[where] = used.get(where, 0.0) + rest
    total = sum(used.values()) or 1.0
    stages = {}
    for name, core in used.items():
        # The host's clock of a GPU's stage includes what the GPU waits for.
        own = stats.gpu_seconds if name == Stage.ENCODE and device != "cpu" else 0.0
        wall = own or clocks.seconds.get(name, 0.0)
        alone = images * threads.get(name, 1) / wall if wall > 0 else None
        stages[str(name)] = StagePace(alone, core, core / total)
    limit = find_limit(
        {n: Cost(s.core_seconds / images, s.images_per_second or float("inf")) for n, s in stages.items()},
        cores=cores,
        device=device,
    )
    rate = loop.steady or images / loop.seconds
    return Pace(
        stages=stages,
        cores_busy=spent.total / loop.seconds,
        bound=limit.images_per_second,
        ratio=rate / limit.images_per_second,
        verdict=verdict(
            limit, {n: s.share for n, s in stages.items()}, rate=loop.steady or None, cores=cores, device=device
        ),
    )


def verdict(limit: Limit, shares: Mapping[str, float], *, rate: float | None, cores: int, device: str) -> str:
    """Compare ``rate`` (images/s) with the limit, and list the stages by core time, as one sentence.

    Without a rate, or with one above the limit, the run was too short for the comparison, which is left out.
    """
    ranked = sorted(shares, key=lambda name: -shares[name])
    takers = [f"{name} {shares[name]:.0%}" for name in ranked if shares[name] >= 0.01]
    core_time = f"core time: {', '.join(takers)}" if takers else "no core time was measured"
    if rate is None or rate > OVER * limit.images_per_second:
        return core_time
    what = "1 core allows" if cores == 1 else f"{cores} cores allow"
    if not limit.cores:
        what = "the GPU allows" if device != "cpu" and limit.by == Stage.ENCODE else f"the stage {limit.by} allows"
    highest = in_words(limit.images_per_second)
    if rate >= limit.images_per_second:
        return f"{what} about {highest} images/s, which this run reached; {core_time}"
    ratio = rate / limit.images_per_second
    compared = f"{what} at most {highest} images/s; this run had {in_words(rate)} ({ratio:.0%})"
    if ratio < NEAR:
        compared += ", the rest went to waiting, contention or other programs"
    return f"{compared}; {core_time}"


def share_of_limit(report: Mapping[str, Any]) -> float | None:
    """Steady throughput over the limit, at most 1; None where a report has neither or the run was too short."""
    pace = report["pace"]
    if not pace or not report["steady_images_per_second"] or pace["ratio"] > OVER:
        return None
    return min(1.0, float(pace["ratio"]))


def in_words(rate: float) -> str:
    """Images per second as text, with one decimal below 1,000."""
    return f"{rate:,.1f}" if rate < 1000 else f"{rate:,.0f}"
