"""How fast the stages would let a run be, and how near to that it came; pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.core.processes import Spent
from pipeline.core.records import Clocks, Stage
from pipeline.core.run_report import Pace, StagePace

# What the process spent outside of every stage's clock.
OTHER = "other"
WAITS = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT)
# Stages that wait for something besides the cores, so that their core seconds do not tell how fast they can be.
_ELSEWHERE = (Stage.READ, Stage.WRITE)
# Stages that a GPU does, though the core that starts them turns round meanwhile.
_ON_GPU = (Stage.COPY, Stage.ENCODE, Stage.LABEL)
# Below this share of the bound the run lost time that no stage explains.
NEAR = 0.95
# Above this a run was too short for its figures.
OVER = 1.05


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage takes: ``core_seconds`` of one image, and ``images_per_second`` of the stage alone, as parallel as
    it is in the job (infinite where nobody waits for it)."""

    core_seconds: float
    images_per_second: float


@dataclass(frozen=True, slots=True)
class Limit:
    """The bound in images/s, the stage ``by`` which it is set, and whether the ``cores`` together set it."""

    images_per_second: float
    by: str
    cores: bool


def find_limit(costs: Mapping[str, Cost], *, cores: int, device: str) -> Limit:
    """The bound of a run whose stages cost ``costs``.

    The cores share all stages, so that together they do ``cores / sum of core seconds``; on a CPU ``by`` is then the
    stage with the largest share. What a GPU does (decoding may be done by it, too), and what waits for disk or network,
    binds by itself if it is slower.
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
    """The paces of a run's stages, and how near to their bound it ran; None where nothing was embedded.

    Args:
        clocks: of all stages.
        spent: core seconds from the first read to the last write.
        images: how many were embedded.
        steady: images/s once the run was under way; 0 where that is not known, and all of it counts.
        seconds: from the first read to the last write.
        cores: that the run may use.
        device: type of the encoder's device, such as ``cpu``.
        threads: how many work side by side, by stage; one where a stage is not named.
    """
    if images == 0:
        return None
    used = {name: core for name, core in clocks.cores.items() if name not in WAITS}
    rest = max(0.0, spent.own - sum(used.values()))
    if spent.children:
        used[Stage.DECODE] = used.get(Stage.DECODE, 0.0) + spent.children
    # Where several threads work on a batch, the clocks see the first of them only.
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
        verdict=verdict(limit, {n: s.share for n, s in stages.items()}, rate=rate, cores=cores, device=device),
    )


def verdict(limit: Limit, shares: Mapping[str, float], *, rate: float, cores: int, device: str) -> str:
    """What binds, what the stages take of the core time, and how near ``rate`` (images/s) comes, as one sentence."""
    ranked = sorted(shares, key=lambda name: -shares[name])
    takers = [f"{name} {shares[name]:.0%}" for name in ranked if shares[name] >= 0.01]
    core_time = f"of the core time {', '.join(takers)}" if takers else "no core time was measured"
    places = "1 core" if cores == 1 else f"{cores} cores"
    bound = in_words(limit.images_per_second)
    if limit.cores:
        binds = f"all stages together allow {bound} images/s on {places}"
        if device != "cpu":
            binds = f"the stages on the cores allow {bound} images/s on {places}, less than the GPU"
    else:
        who = "the GPU" if device != "cpu" and limit.by == Stage.ENCODE else "that stage alone"
        binds = f"{limit.by} binds: {who} does {bound} images/s"
    ratio = rate / limit.images_per_second
    near = f"the whole ran at {in_words(rate)}, {ratio:.0%} of that"
    if ratio > OVER:
        near += "; more than all of it, since images that were decoded before the clock began count in a short run"
    if ratio < NEAR:
        near += f"; the other {1 - ratio:.0%} went to waiting, to contention, or to other programs"
    return f"{binds}; {near} ({core_time})"


def in_words(rate: float) -> str:
    """Images per second with the digits that mean something."""
    return f"{rate:,.1f}" if rate < 1000 else f"{rate:,.0f}"
