"""What the clocks of a run's processes come to: what bound it, and how near to that it ran."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import Config
from pipeline.core.processes import Spent
from pipeline.core.records import Stage
from pipeline.core.run_report import Pace
from pipeline.engine.prepare import Prepared
from pipeline.report import summary
from pipeline.report.throughput import find_pace
from pipeline.telemetry.members import Member, total_clocks, total_cores


def bound(
    members: Sequence[Member], config: Config, prepared: Prepared, *, startup: float, wall: float
) -> tuple[str, str]:
    """See :func:`pipeline.report.summary.find_bound`; the advice is for each process."""
    return summary.find_bound(
        total_clocks(members),
        startup=startup,
        wall=wall,
        workers=_threads(config, prepared),
        decoder=config.images.decoder,
        streams=prepared.streams,
        device=prepared.device.partition(":")[0],
        precision=prepared.precision,
        cores=_cores(prepared),
    )


def pace_of(
    members: Sequence[Member], config: Config, prepared: Prepared, *, images: int, steady: float, seconds: float
) -> Pace | None:
    """See :func:`pipeline.report.throughput.find_pace`; processes that worked side by side count together."""
    spent = Spent(
        own=sum(member.own_core_seconds for member in members),
        children=sum(member.child_core_seconds for member in members),
    )
    processes = len({(member.host, member.name) for member in members})
    reading, encoding = processes * _threads(config, prepared), processes * prepared.streams
    return find_pace(
        total_clocks(members),
        spent,
        images=images if members else 0,
        steady=steady,
        seconds=seconds,
        cores=total_cores(members),
        device=prepared.device.partition(":")[0],
        threads={Stage.READ: reading, Stage.DECODE: reading, Stage.ENCODE: encoding, Stage.LABEL: encoding},
    )


def _threads(config: Config, prepared: Prepared) -> int:
    """Threads that read and decode in each process."""
    return config.loader.workers or _cores(prepared)


def _cores(prepared: Prepared) -> int:
    return int(str(prepared.machine["cores"]))
