"""From a trial of a job to what all of it takes; nothing here is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, OutputBusy, TooManyFailures
from pipeline.core.processes import cores
from pipeline.core.records import OK, Clocks, Shard, Stage
from pipeline.core.run_report import Pace
from pipeline.dataset.commits import Commit
from pipeline.engine.prepare import Prepared
from pipeline.images.factory import worker_threads
from pipeline.job import finish
from pipeline.job.estimate.record import Estimate
from pipeline.job.estimate.scaling import Processes
from pipeline.job.estimate.trial import Mark, Trial
from pipeline.storage.urls import free_bytes, is_local
from pipeline.telemetry.members import Member

# No machine runs more evenly than this from one run to the next, as a share of the time.
LEAST_ERROR = 0.05
# While one shard is being filled, another is being written: as a table, and as the pages of its file.
COPIES = 3
_ON_GPU = (Stage.COPY, Stage.ENCODE, Stage.LABEL)


@dataclass(frozen=True, slots=True)
class Pacing:
    """What the loop takes: ``seconds`` of it, give or take the share ``error``; ``images`` that it embeds."""

    seconds: float
    error: float
    images: int
    images_per_second: float
    pace: Pace | None
    window: Member | None


def pacing(trial: Trial, left: Sequence[Shard], config: Config, prepared: Prepared, processes: Processes) -> Pacing:
    """The time of the loop over the shards that are ``left``.

    The first batch takes as long as in the trial, all others come at its pace. That is in images; where encoding takes
    the time it is in batches, of which the last of a shard may be full of padding.
    """
    rows = sum(shard.rows for shard in left)
    good = trial.counts[OK] / trial.rows if trial.rows else 1.0
    share = good * (1 - trial.repeats)
    covered = trial.whole and trial.rows == rows
    images = sum(trial.images) if covered else round(rows * share)
    one = trial.images_per_second
    if trial.begin is None or trial.end is None or not one:
        # Nothing could be embedded, or all of it at once.
        seconds = trial.seconds * rows / trial.rows if trial.rows and not covered else trial.seconds
        return Pacing(seconds, trial.error, images, 0.0, None, None)
    window = _between(trial.member, trial.begin, trial.end)
    counted, seconds = trial.end.images - trial.begin.images, trial.end.at - trial.begin.at
    pace = finish.pace_of((window,), prepared, images=counted, steady=one, seconds=seconds)
    gpu = not prepared.device.startswith("cpu")
    encoding = pace.stages[Stage.ENCODE].share if pace is not None and Stage.ENCODE in pace.stages else 0.0
    if gpu:
        encoding = 1.0 if pace is not None and pace.ratio and _by_gpu(pace) else 0.0
    size = prepared.config.loader.batch_size
    filled = counted / ((trial.end.batches - trial.begin.batches) * size)
    batches = sum(-(-round(shard.rows * share) // size) for shard in left)
    padded = batches * size * filled / images if images else 1.0
    rate = processes.rate(one, _core_seconds(pace, counted, gpu=gpu)) / (1 + encoding * (padded - 1))
    rest = max(0, images - trial.images[0])
    loop = trial.seconds if covered and processes.gain == 1 else trial.first + rest / rate
    return Pacing(loop, max(LEAST_ERROR, trial.error if not covered else 0.0), images, rate, pace, window)


def _by_gpu(pace: Pace) -> bool:
    encode = pace.stages.get(Stage.ENCODE)
    return encode is not None and encode.images_per_second is not None and encode.images_per_second <= pace.bound * 1.01


def _core_seconds(pace: Pace | None, images: int, *, gpu: bool) -> float:
    """Of the machine's cores, for one image; the core that starts a GPU's work only waits for it."""
    if pace is None or not images:
        return 0.0
    return sum(s.core_seconds for name, s in pace.stages.items() if not (gpu and name in _ON_GPU)) / images


def _between(member: Member, begin: Mark, end: Mark) -> Member:
    """What a process did between two marks."""
    clocks = Clocks(_less(end.clocks.seconds, begin.clocks.seconds), _less(end.clocks.cores, begin.clocks.cores))
    used = end.spent - begin.spent
    return replace(member, clocks=clocks, own_core_seconds=used.own, child_core_seconds=used.children)


def _less(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(0.0, seconds - other.get(name, 0.0)) for name, seconds in one.items()}


def failing(failed: int, rows: int) -> tuple[float, float]:
    """The likely range of a share of which ``failed`` of ``rows`` were seen: Wilson's interval at two sigmas."""
    if not rows:
        return 0.0, 1.0
    share, z = failed / rows, 2.0
    middle, width = share + z * z / (2 * rows), z * sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def figures(
    trial: Trial | None,
    left: Sequence[Shard],
    done: Mapping[int, Commit],
    prepared: Prepared,
    processes: Processes,
    *,
    startup: float,
    scenes: float,
    damaged: int,
    busy: str,
) -> Estimate:
    """All that is told of a job; without a ``trial`` nothing is left of it.

    Args:
        trial: what was measured.
        left: the shards that a run would embed.
        done: the commits that it would keep.
        prepared: its plan and its engine.
        processes: those that would embed.
        startup: seconds from the command to the first shard.
        scenes: seconds to render those of the demo.
        damaged: commits that it would do again.
        busy: who keeps a run out just now.
    """
    config, wanted = prepared.config, prepared.plan
    estimate = Estimate(
        output=config.output.dir,
        rows=wanted.rows,
        shards=wanted.shards,
        done_rows=sum(commit.rows for commit in done.values()),
        done_shards=len(done),
        damaged_shards=damaged,
        left_rows=sum(shard.rows for shard in left),
        left_shards=len(left),
        startup_seconds=round(startup, 3),
        seconds=round(startup, 3),
        low=round(startup, 3),
        high=round(startup, 3),
        scenes_seconds=round(scenes, 3),
        done_bytes=sum(commit.size for commit in done.values()),
        free_bytes=free_bytes(config.output.dir) if is_local(config.output.dir) else None,
        stored=f"{config.output.dtype}, {config.output.compression}",
        batch_size=config.loader.batch_size,
        processes=processes.count,
        about_processes=processes.words,
    )
    if trial is not None:
        estimate = _measured(estimate, trial, left, prepared, processes)
    problems, code = _problems(estimate, done, config.errors.max_fraction, busy)
    return replace(estimate, problems=problems, exit_code=code)


def _measured(
    estimate: Estimate, trial: Trial, left: Sequence[Shard], prepared: Prepared, processes: Processes
) -> Estimate:
    config, startup = prepared.config, estimate.startup_seconds
    loop = pacing(trial, left, config, prepared, processes)
    seconds = startup + loop.seconds
    bound, advice = "nothing", "no image could be embedded"
    if trial.images:
        advice = "too few images to tell"
    if loop.window is not None:
        # As if the window were all of the loop: what binds is told by shares.
        bound, advice = finish.bound_of((loop.window,), prepared, startup=startup, wall=seconds)
    failed = trial.rows - trial.counts[OK]
    low, high = failing(failed, trial.rows)
    whole = trial.whole and trial.rows == estimate.left_rows
    share = failed / trial.rows if trial.rows else 0.0
    extra = COPIES * max(0, max(shard.rows for shard in left) - trial.largest) * trial.memory_per_row / 2**20
    memory = dict(trial.member.memory)
    memory["peak_rss_mib"] = round(memory["peak_rss_mib"] + extra, 1)
    begin, end = trial.begin, trial.end
    counted = begin is not None and end is not None
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
            "counted_images": end.images - begin.images if counted and begin and end else 0,
            "counted_seconds": round(end.at - begin.at, 3) if counted and begin and end else 0.0,
        },
        output_bytes=round(estimate.left_rows * trial.bytes_per_row + len(left) * trial.bytes_per_part),
        memory=memory,
        shard_mib=round(extra, 1),
        decoders=min(worker_threads(config), cores()) if config.loader.isolation == "process" else 0,
        failed=share,
        failed_low=share if whole else low,
        failed_high=share if whole else high,
        counts=trial.counts,
        error_example=trial.error_example,
        repeats=trial.repeats,
        bound=bound,
        advice=advice,
        pace=loop.pace.verdict if loop.pace is not None else "",
    )


def _problems(
    estimate: Estimate, done: Mapping[int, Commit], max_fraction: float, busy: str
) -> tuple[tuple[str, ...], int]:
    """Why a run would not end well, worst first, and the exit code that it would end with."""
    found: list[tuple[str, int]] = []
    if busy:
        found.append((f"{busy}: a run would be refused", OutputBusy.exit_code))
    free = estimate.free_bytes
    if free is not None and estimate.output_bytes > free:
        text = (
            f"{estimate.output}: {estimate.output_bytes / 1e6:,.1f} MB are to be written and {free / 1e6:,.1f} MB are "
            "free; free some space, or choose another output.dir; output.dtype=float16 takes half"
        )
        found.append((text, ConfigError.exit_code))
    there = sum(commit.rows - commit.counts.get(OK, 0) for commit in done.values())
    failing_rows = there + estimate.failed * estimate.left_rows
    if failing_rows > max_fraction * estimate.rows:
        text = (
            f"about {failing_rows / estimate.rows:.1%} of the rows are expected to fail, more than "
            f"errors.max_fraction={max_fraction}: {_in_words(estimate.counts)} in the sample"
        )
        found.append((text, TooManyFailures.exit_code))
    return tuple(text for text, _ in found), found[0][1] if found else 0


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
