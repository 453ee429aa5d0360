"""The end of a run: all that is known by then, and what is told of it."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.config.schema import Config
from pipeline.core.errors import TooManyFailures
from pipeline.core.processes import Spent, cores
from pipeline.core.records import OK, Stage, TextBank, Timeline
from pipeline.core.run_report import Pace, RunReport
from pipeline.dataset.commits import Commit
from pipeline.engine.prepare import Prepared
from pipeline.images.reader import PixelReader
from pipeline.job import finish
from pipeline.job.cluster.part import Done
from pipeline.manifest.manifest import Manifest
from pipeline.report import summary
from pipeline.report.faster_decoder import faster_decoder
from pipeline.report.page import place_of
from pipeline.report.render import PAGE
from pipeline.report.summary import DatasetSummary
from pipeline.report.throughput import find_pace
from pipeline.telemetry.members import Member, peak_memory, total_clocks, total_cores
from pipeline.telemetry.timeline import merge

REPORT = "_report.json"
# With a smaller share of the cores at work than this, the model is not what to change.
BUSY = 0.6
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known when the last shard is committed; times are in seconds, ``loop_began`` since the epoch.

    ``own`` is what this command did, ``ran`` what all parts of its job did, ``whole`` whether these are the same.
    ``steady`` is in images/s.
    """

    prepared: Prepared
    manifest: Manifest
    bank: TextBank | None
    own: Done
    ran: Done
    whole: bool
    settled: tuple[Commit, ...]
    given_up: tuple[int, ...]
    resumed_rows: int
    loop_began: float
    loop_seconds: float
    first_batch_seconds: float
    steady: float

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, ``ok`` first."""
        counts: Counter[str] = Counter()
        for commit in self.settled:
            counts.update(commit.counts)
        return {OK: counts.pop(OK, 0), **dict(sorted(counts.items()))}

    @property
    def failed(self) -> int:
        """Rows that failed."""
        return sum(count for status, count in self.counts.items() if status != OK)

    @property
    def over(self) -> bool:
        """Whether these are more than the config allows."""
        return self.failed > self.prepared.config.errors.max_fraction * self.manifest.rows


def report_of(
    end: Ending, content: DatasetSummary, reader: PixelReader, *, history: Sequence[Mapping[str, object]], run: str
) -> RunReport:
    """The report of a run.

    Args:
        end: what is known of it.
        content: what its dataset holds.
        reader: of its pictures, some of which may be decoded again to tell what another decoder would have given.
        history: the runs before it.
        run: its name.
    """
    prepared, ran, own, bank = end.prepared, end.ran, end.own, end.bank
    config, wanted = prepared.config, prepared.plan
    places = (total_cores(ran.members) if end.whole else _cores_of_hosts(ran.members)) or cores()
    # A clock may have been set back meanwhile.
    wall, startup = max(ran.ended - ran.began, 1e-3), end.loop_began - own.began + end.first_batch_seconds
    # The parts of a job need not run side by side, so that there is no pace of them all.
    pace = (
        finish.pace_of(own.members, config, prepared, images=own.images, steady=end.steady, seconds=end.loop_seconds)
        if end.whole
        else None
    )
    bound, advice = finish.bound(ran.members, config, prepared, startup=startup, wall=wall)
    if bound == "encoding" and pace is not None and pace.cores_busy < BUSY * places and prepared.device == "cpu":
        advice = (
            f"only {pace.cores_busy:.1f} of {places} cores worked for this run: other programs, or a limit on this "
            "process, held the rest; run it when the machine is quiet before changing anything"
        )
    if bound == "decoding":
        device = prepared.device.partition(":")[0]
        faster = faster_decoder(end.manifest, reader, pace, images=own.images, wall=wall, cores=places, device=device)
        advice = faster.advice if faster is not None else advice
    return RunReport(
        started=datetime.fromtimestamp(ran.began, UTC).isoformat(timespec="milliseconds"),
        rows=ran.rows,
        images=ran.images,
        resumed_rows=end.resumed_rows if end.whole else max(0, sum(c.rows for c in end.settled) - ran.rows),
        total_rows=end.manifest.rows,
        wall_seconds=round(wall, 3),
        startup_seconds=round(startup, 3),
        images_per_second=round(ran.images / wall, 2),
        # That of the last part alone says nothing of the others.
        steady_images_per_second=round(end.steady, 2) if end.whole else 0.0,
        stages={name: round(seconds, 3) for name, seconds in total_clocks(ran.members).seconds.items()},
        bound=bound,
        advice=advice,
        counts=end.counts,
        failures=content.failures,
        labels=content.labels,
        prompts={"labels": len(bank.names) if bank else 0, "cached": bank is not None and bank.cached},
        parity=prepared.parity,
        decoder_parity=prepared.decoder_parity,
        batch_sizes=max((member.batch_sizes for member in ran.members), key=len, default=())
        or (config.loader.batch_size,),
        pace=pace,
        memory=peak_memory(ran.members) or summary.memory(),
        machine={**prepared.machine, "cores": places},
        versions=summary.versions(),
        fingerprints=wanted.fingerprints,
        config=dataclasses.asdict(config),
        exit_code=TooManyFailures.exit_code if end.over or end.given_up else 0,
        workers=tuple(dataclasses.replace(member, timeline=Timeline()) for member in ran.members),
        given_up=end.given_up,
        repeats=sum(member.repeats for member in ran.members),
        timeline=merge(member.timeline for member in ran.members),
        scores=content.scores,
        history=tuple(history),
        run=run,
    )


def _cores_of_hosts(members: Sequence[Member]) -> int:
    """Parts of a job may have run one after the other on the same cores."""
    return sum({host: max(m.cores for m in members if m.host == host) for host in {m.host for m in members}}.values())


def say_labels(bank: TextBank | None) -> None:
    """What the labels of a run are."""
    if bank is None:
        log.warning(
            "no labels: the columns label and score stay null; prompts.labels=[cat,dog] or prompts.path fills them"
        )
    else:
        features = "from the cache" if bank.cached else "embedded and cached"
        log.info("%d labels, text features %s", len(bank.names), features)


def say(result: RunReport, config: Config) -> None:
    """The report in a few sentences."""
    if not result.rows:
        log.info("%s is complete: %d rows; nothing to do", config.output.dir, result.total_rows)
        return
    where = place_of(result.machine, result.bound)
    rate = result.images_per_second
    log.info("%s", summary.headline(result.images, result.wall_seconds, rate, result.bound, where=where))
    steady = result.steady_images_per_second
    log.info("%s%s", f"after start-up: {steady:,.1f} images/s; " if steady else "", result.advice)
    if result.pace is not None:
        log.info("%s", result.pace.verdict)
    if result.repeats:
        log.info("%d rows share the embedding of another row with the same bytes", result.repeats)
    log.info("rows by status: %s", ", ".join(f"{name} {count}" for name, count in result.counts.items()))
    name = PAGE if config.report.html else REPORT
    log.info("dataset: %s   report: %s/%s", config.output.dir, config.output.dir, name)


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
