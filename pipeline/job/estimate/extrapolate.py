"""Extrapolation from a trial to the whole job; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from pipeline.core.errors import ConfigError, OutputBusy, TooManyFailures
from pipeline.core.processes import cores
from pipeline.core.records import OK, Clocks, Shard, Stage
from pipeline.core.run_report import Pace
from pipeline.dataset.commits import Commit
from pipeline.engine.demo.notes import notes_of
from pipeline.engine.prepare import Prepared
from pipeline.images.factory import worker_threads
from pipeline.job import finish
from pipeline.job.estimate.record import Estimate
from pipeline.job.estimate.scaling import Processes
from pipeline.job.estimate.trial import Mark, Trial
from pipeline.report.bottleneck import LoopFigures, find_bottleneck, find_pace
from pipeline.storage.urls import free_bytes, is_local
from pipeline.telemetry.run_stats import RunStats, WorkerStats

# Smallest error of a time, as a share of it: the same run on the same machine differs by as much.
LEAST_ERROR = 0.05
# A shard is held as rows while the one before it is held as a table and as the pages of its file.
COPIES = 3
_ON_GPU = (Stage.COPY, Stage.ENCODE, Stage.LABEL)


@dataclass(frozen=True, slots=True)
class Work:
    """Work that an output still needs.

    Attributes:
        left: shards that a run would embed.
        done: commits that it would keep.
        damaged: commits that it would replace.
        startup_seconds: time from the command to the first shard.
        scenes_seconds: time to render the demo's scenes.
        processes: processes that would embed.
        busy: message about another run that holds the output, or an empty string.
        expected_rows: rows that are expected of all shards, where the plan has none.
    """

    left: Sequence[Shard]
    done: Mapping[int, Commit]
    damaged: int
    startup_seconds: float
    scenes_seconds: float
    processes: Processes
    busy: str
    expected_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows of the shards that are left."""
        return sum(shard.rows for shard in self.left)


@dataclass(frozen=True, slots=True)
class Pacing:
    """Duration of the loop in ``seconds``, with a relative ``error``, for so many ``images``."""

    seconds: float
    error: float
    images: int
    images_per_second: float
    pace: Pace | None
    clocks: Clocks | None


def pacing(trial: Trial, work: Work, prepared: Prepared) -> Pacing:
    """Return the duration of the loop over the shards that are left.

    The first batch takes as long as in the trial, all others follow at the measured throughput. That counts images;
    where encoding is the bottleneck it counts batches, because the last batch of a shard may be mostly padding.
    """
    rows = work.rows
    good = trial.counts[OK] / trial.rows if trial.rows else 1.0
    share = good * (1 - trial.repeats)
    covered = trial.whole and trial.rows == rows
    images = sum(trial.images) if covered else round(rows * share)
    one = trial.images_per_second
    if trial.begin is None or trial.end is None or not one:
        # No image could be embedded, or all of them fitted into the first batches.
        seconds = trial.seconds * rows / trial.rows if trial.rows and not covered else trial.seconds
        return Pacing(seconds, trial.error, images, 0.0, None, None)
    config, counted = prepared.config, trial.counted_images
    window = _between(trial.worker, trial.begin, trial.end)
    stats = RunStats(began=0.0, ended=trial.counted_seconds, rows=counted, images=counted, workers=(window,))
    pace = find_pace(stats, finish.setup_of(prepared), LoopFigures(counted, trial.counted_seconds, one))
    gpu = not prepared.device.startswith("cpu")
    encoding = pace.stages[Stage.ENCODE].share if pace is not None and Stage.ENCODE in pace.stages else 0.0
    if gpu:
        encoding = 1.0 if pace is not None and pace.ratio and _by_gpu(pace) else 0.0
    size = config.loader.batch_size
    filled = counted / ((trial.end.batches - trial.begin.batches) * size)
    batches = sum(-(-round(shard.rows * share) // size) for shard in work.left)
    padded = batches * size * filled / images if images else 1.0
    rate = work.processes.rate(one, _core_seconds(pace, counted, gpu=gpu)) / (1 + encoding * (padded - 1))
    rest = max(0, images - trial.images[0])
    seconds = trial.seconds if covered and work.processes.gain == 1 else trial.first + rest / rate
    return Pacing(seconds, max(LEAST_ERROR, trial.error if not covered else 0.0), images, rate, pace, window.clocks)


def _by_gpu(pace: Pace) -> bool:
    encode = pace.stages.get(Stage.ENCODE)
    return encode is not None and encode.images_per_second is not None and encode.images_per_second <= pace.bound * 1.01


def _core_seconds(pace: Pace | None, images: int, *, gpu: bool) -> float:
    """Return the core seconds of an image, without those of the thread that waits for a GPU."""
    if pace is None or not images:
        return 0.0
    return sum(s.core_seconds for name, s in pace.stages.items() if not (gpu and name in _ON_GPU)) / images


def _between(worker: WorkerStats, begin: Mark, end: Mark) -> WorkerStats:
    """Return the resources that a process used between two marks."""
    clocks = Clocks(_less(end.clocks.seconds, begin.clocks.seconds), _less(end.clocks.cores, begin.clocks.cores))
    used = end.spent - begin.spent
    return replace(worker, clocks=clocks, own_core_seconds=used.own, child_core_seconds=used.children)


def _less(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(0.0, seconds - other.get(name, 0.0)) for name, seconds in one.items()}


def failing(failed: int, rows: int) -> tuple[float, float]:
    """Return the likely range of a share, from ``failed`` of ``rows``: Wilson's score interval with z = 2."""
    if not rows:
        return 0.0, 1.0
    share, z = failed / rows, 2.0
    middle, width = share + z * z / (2 * rows), z * sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def figures(trial: Trial | None, work: Work, prepared: Prepared) -> Estimate:
    """Return the estimate; without a ``trial`` no shard is left."""
    config, wanted = prepared.config, prepared.plan
    startup = round(work.startup_seconds, 3)
    estimate = Estimate(
        output=config.output.dir,
        rows=wanted.rows or work.expected_rows,
        shards=wanted.shards,
        shard_rows=wanted.shard_rows,
        done_rows=sum(commit.rows for commit in work.done.values()),
        done_shards=len(work.done),
        damaged_shards=work.damaged,
        left_rows=work.rows,
        left_shards=len(work.left),
        startup_seconds=startup,
        seconds=startup,
        low=startup,
        high=startup,
        scenes_seconds=round(work.scenes_seconds, 3),
        done_bytes=sum(commit.size for commit in work.done.values()),
        free_bytes=free_bytes(config.output.dir) if is_local(config.output.dir) else None,
        stored=f"{config.output.dtype}, {config.output.compression}",
        batch_size=config.loader.batch_size,
        processes=work.processes.count,
        about_processes=work.processes.words,
        notes=notes_of(config),
    )
    if trial is not None:
        estimate = _measured(estimate, trial, work, prepared)
    problems, code = _problems(estimate, work, config.errors.max_fraction)
    return replace(estimate, problems=problems, exit_code=code)


def _measured(estimate: Estimate, trial: Trial, work: Work, prepared: Prepared) -> Estimate:
    """Return the estimate with what follows from the trial."""
    config, startup = prepared.config, work.startup_seconds
    loop = pacing(trial, work, prepared)
    seconds = startup + loop.seconds
    bound, advice = "nothing", "too few images to tell" if trial.images else "no image could be embedded"
    if loop.clocks is not None:
        # The stages of the measured batches stand for those of the whole loop.
        found = find_bottleneck(loop.clocks, finish.setup_of(prepared), startup=startup, wall=seconds)
        bound, advice = found.stage, found.advice
    failed = trial.rows - trial.counts[OK]
    share = failed / trial.rows if trial.rows else 0.0
    covered = trial.whole and trial.rows == work.rows
    low, high = (share, share) if covered else failing(failed, trial.rows)
    extra = COPIES * max(0, max(shard.rows for shard in work.left) - trial.largest) * trial.memory_per_row / 2**20
    memory = dict(trial.worker.memory)
    memory["peak_rss_mib"] = round(memory["peak_rss_mib"] + extra, 1)
    return replace(
        estimate,
        seconds=round(seconds, 3),
        low=round(startup + loop.seconds * (1 - loop.error), 3),
        high=round(startup + loop.seconds * (1 + loop.error), 3),
        images=loop.images,
        images_per_second=round(loop.images_per_second, 2),
        cores_busy=round(loop.pace.cores_busy, 2) if loop.pace is not None else 0.0,
        sample={
            "rows": trial.rows,
            "images": sum(trial.images),
            "batches": len(trial.images),
            "seconds": round(trial.seconds, 3),
            "counted_images": trial.counted_images,
            "counted_seconds": round(trial.counted_seconds, 3),
        },
        output_bytes=round(work.rows * trial.bytes_per_row + len(work.left) * trial.bytes_per_part),
        memory=memory,
        shard_mib=round(extra, 1),
        decoders=min(worker_threads(config), cores()) if config.loader.isolation == "process" else 0,
        failed=share,
        failed_low=low,
        failed_high=high,
        counts=trial.counts,
        error_example=trial.error_example,
        repeats=trial.repeats,
        bound=bound,
        advice=advice,
        pace=loop.pace.verdict if loop.pace is not None else "",
    )


def _problems(estimate: Estimate, work: Work, max_fraction: float) -> tuple[tuple[str, ...], int]:
    """Return the reasons why a run would fail, worst first, and its exit code."""
    found: list[tuple[str, int]] = []
    if work.busy:
        found.append((f"{work.busy}: a run would be refused", OutputBusy.exit_code))
    free = estimate.free_bytes
    if free is not None and estimate.output_bytes > free:
        text = (
            f"{estimate.output}: {estimate.output_bytes / 1e6:,.1f} MB are to be written and {free / 1e6:,.1f} MB are "
            "free; free some space, or choose another output.dir; output.dtype=float16 takes half"
        )
        found.append((text, ConfigError.exit_code))
    failed_before = sum(commit.rows - commit.counts.get(OK, 0) for commit in work.done.values())
    failed = failed_before + estimate.failed * estimate.left_rows
    if failed > max_fraction * estimate.rows:
        counts = ", ".join(f"{name} {count}" for name, count in estimate.counts.items())
        text = (
            f"about {failed / estimate.rows:.1%} of the rows are expected to fail, more than "
            f"errors.max_fraction={max_fraction}: {counts} in the sample"
        )
        found.append((text, TooManyFailures.exit_code))
    return tuple(text for text, _ in found), found[0][1] if found else 0
