"""The throughput that the stages of a run allow, compared with the throughput that it had; pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.processes import Spent
from pipeline.core.records import Clocks, Stage
from pipeline.core.run_report import Pace, StagePace

# Core time of the process outside of all stages.
OTHER = "other"
WAITS = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT)
# Stages that also wait for storage, so that core seconds alone do not give their rate.
_ELSEWHERE = (Stage.READ, Stage.WRITE)
# Stages that run on a GPU, although a core waits for them in a busy loop.
_ON_GPU = (Stage.COPY, Stage.ENCODE, Stage.LABEL)
# A smaller share of the limit means time that no stage explains.
NEAR = 0.95
# Images that were decoded before the clock started lift the rate of a short run above its limit.
OVER = 1.05


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


def find_pace(
    clocks: Clocks,
    spent: Spent,
    *,
    images: int,
    steady: float,
    seconds: float,
    cores: int,
    device: str,
    threads: Mapping[str, int],
) -> Pace | None:
    """The rates of a run's stages and its share of their limit; None where nothing was embedded.

    Args:
        clocks: of all stages.
        spent: core seconds from the first read to the last write.
        images: how many were embedded.
        steady: images/s after the start-up; 0 where the run was too short to tell, and the whole run counts.
        seconds: from the first read to the last write.
        cores: that the run may use.
        device: type of the encoder's device, such as ``cpu``.
        threads: parallel threads by stage; one for a stage that is not named.
    """
    if images == 0:
        return None
    used = {name: core for name, core in clocks.cores.items() if name not in WAITS}
    rest = max(0.0, spent.own - sum(used.values()))
    if spent.children:
        used[Stage.DECODE] = used.get(Stage.DECODE, 0.0) + spent.children
    # Of several threads that work on one batch, the clocks count only the first.
    shared = device == "cpu" and cores // threads.get(Stage.ENCODE, 1) > 1 and Stage.ENCODE in used
    where = Stage.ENCODE if shared else OTHER
    used[where] = used.get(where, 0.0) + rest
    total = sum(used.values()) or 1.0
    stages = {}
    for name, core in used.items():
        wall = clocks.seconds.get(name, 0.0)
        alone = images * threads.get(name, 1) / wall if wall > 0 else None
        stages[str(name)] = StagePace(alone, core, core / total)
    limit = find_limit(
        {n: Cost(s.core_seconds / images, s.images_per_second or float("inf")) for n, s in stages.items()},
        cores=cores,
        device=device,
    )
    rate = steady or images / seconds
    return Pace(
        stages=stages,
        cores_busy=spent.total / seconds,
        bound=limit.images_per_second,
        ratio=rate / limit.images_per_second,
        verdict=verdict(
            limit, {n: s.share for n, s in stages.items()}, rate=steady or None, cores=cores, device=device
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
    ratio = min(1.0, rate / limit.images_per_second)
    compared = (
        f"{what} at most {in_words(limit.images_per_second)} images/s; this run had {in_words(rate)} ({ratio:.0%})"
    )
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
