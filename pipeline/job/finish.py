"""The end of a run: its report, its page, the summary in the log, and the errors of a run with failures."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate

from pipeline.config.choices import BACKENDS
from pipeline.config.schema import Config
from pipeline.core import phases
from pipeline.core.errors import ShardsGivenUp, StorageError, TooManyFailures
from pipeline.core.failpoints import failpoint
from pipeline.core.machine import memory, versions
from pipeline.core.processes import cores
from pipeline.core.records import DAMAGED, OK, Timeline, by_status, failed_rows
from pipeline.core.run_report import Pace, RunReport
from pipeline.dataset.commits import Commit
from pipeline.dataset.vectors import VectorFormat
from pipeline.engine.demo.notes import notes_of
from pipeline.engine.engine import Engine
from pipeline.engine.prepare import Prepared
from pipeline.job.cluster.part import Part
from pipeline.manifest.manifest import Manifest
from pipeline.report import summary
from pipeline.report.bottleneck import (
    START_UP,
    Bottleneck,
    LoopFigures,
    ProcessSetup,
    find_bottleneck,
    find_pace,
    gpu_use,
)
from pipeline.report.faster_decoder import faster_decoder
from pipeline.report.history import earlier_runs, is_stale
from pipeline.report.load import REPORT, read_report
from pipeline.report.page import place_of
from pipeline.report.render import PAGE, Pictures, draw, try_to_publish
from pipeline.report.summary import DatasetSummary
from pipeline.storage.base import Storage
from pipeline.telemetry.run_stats import RunStats, WorkerStats

# Phases from the last batch to the report.
ENDING = ("last parts", "marker", "summary")
# Phases of the start-up that the advice names.
LONGEST = 3
# Below this share of busy cores, something else than the model slows the run.
BUSY = 0.6
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Embedded:
    """The work of the loop: rows and images, when it began (seconds since the epoch), seconds, images/s.

    ``rows`` are those that were committed, ``resumed_rows`` those that earlier runs committed. ``images_per_second``
    leaves out the first batch. ``startup`` are seconds by phase from the command to the end of the first batch.
    """

    rows: int
    images: int
    resumed_rows: int
    began: float
    seconds: float
    startup: Mapping[str, float]
    images_per_second: float

    @property
    def loop(self) -> LoopFigures:
        """The figures of the loop alone."""
        return LoopFigures(images=self.images, seconds=self.seconds, steady=self.images_per_second)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run after its last commit; ``began`` and ``ended`` are seconds since the epoch.

    ``phases`` count from the last batch on. ``committed`` are the commits of all parts of the job, ``part`` is the one
    of this run.
    """

    prepared: Prepared
    engine: Engine
    storage: Storage
    part: Part
    run: str
    began: float
    ended: float
    phases: phases.Phases
    embedded: Embedded
    workers: tuple[WorkerStats, ...]
    committed: tuple[Commit, ...]
    given_up: tuple[int, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, ``ok`` first."""
        counts: Counter[str] = Counter()
        for commit in self.committed:
            counts.update(commit.counts)
        return by_status(counts)

    @property
    def manifest(self) -> Manifest:
        """The manifest; the rows of its tars are counted once all are committed."""
        return self.engine.manifest.with_rows([commit.rows for commit in self.committed])

    @property
    def failed(self) -> int:
        """Rows that failed."""
        return failed_rows(self.counts)

    @property
    def too_many_failed(self) -> bool:
        """True if more rows failed than the config allows, or a tar is damaged, which misses an unknown number."""
        return DAMAGED in self.counts or self.failed > self.prepared.config.errors.max_fraction * self.manifest.rows

    @property
    def missing(self) -> int:
        """Shards without a commit."""
        return self.prepared.plan.shards - len(self.committed)

    @property
    def files(self) -> list[tuple[str, int]]:
        """The files of the dataset, each with the number of its first row."""
        size, starts = self.prepared.plan.shard_rows, accumulate((each.rows for each in self.committed), initial=0)
        return [(each.part, each.shard * size or start) for each, start in zip(self.committed, starts, strict=False)]

    @property
    def stats(self) -> RunStats:
        """Statistics of this command."""
        embedded = self.embedded
        return RunStats(self.began, self.ended, embedded.rows, embedded.images, self.workers)


@dataclass(frozen=True, slots=True)
class ReportDraft:
    """The report of a run, the summary of its dataset, and the report that was there before."""

    report: RunReport
    content: DatasetSummary
    previous: bytes | None


def report_of(outcome: Outcome) -> ReportDraft:
    """Summarise the dataset and make the report of a run.

    Some images may be decoded again, to estimate the gain of another decoder.
    """
    config = outcome.prepared.config
    content = summary.summarize(
        config.output.dir, outcome.files, id=outcome.engine.manifest.id, examples=config.report.examples
    )
    ran = outcome.part.merged(outcome.storage, outcome.stats)
    previous = outcome.storage.read(REPORT)
    outcome.phases.ended("summary")
    taken = outcome.phases.take()
    ending = {name: taken[name] for name in ENDING if name in taken}
    report = dataclasses.replace(_report(outcome, ran, content), ending=_rounded(ending))
    return ReportDraft(
        report=dataclasses.replace(report, history=earlier_runs(previous)), content=content, previous=previous
    )


def publish(outcome: Outcome, draft: ReportDraft) -> None:
    """Write the report and its page, unless this run did nothing and those of an earlier one are there."""
    storage, config, report = outcome.storage, outcome.prepared.config, draft.report
    content = report.to_dict()
    if outcome.embedded.rows or outcome.given_up or is_stale(draft.previous, report.counts):
        # A page of another run would contradict it; one that cannot be removed does not prevent a report.
        with suppress(StorageError):
            storage.remove(PAGE)
        storage.write(REPORT, report.to_json())
        failpoint("report.written")
    else:
        content = read_report(draft.previous or b"")
    if config.report.html and storage.size(PAGE) is None:
        engine = outcome.engine
        pictures = Pictures(outcome.manifest, engine.cpu_reader) if engine.has_images else None
        try_to_publish(storage, partial(draw, content, draft.content, config.report.examples, pictures))


def check(outcome: Outcome) -> None:
    """Check a finished dataset for missing shards and for too many failed rows.

    Raises:
        ShardsGivenUp: shards ended every worker that had them.
        TooManyFailures: more rows failed than ``errors.max_fraction``.
    """
    config, wanted, manifest = outcome.prepared.config, outcome.prepared.plan, outcome.manifest
    given_up = outcome.given_up
    if given_up:
        row = f"the rows from {given_up[0] * wanted.shard_rows:,} on"
        raise ShardsGivenUp(
            f"{config.output.dir}: all is committed but {len(given_up)} of {wanted.shards} shards, each of which "
            f"ended every worker that had it: {', '.join(map(str, given_up[:20]))}. Look at "
            f"{row if manifest.counted else manifest.files[given_up[0]].url}; the same command tries them again"
        )
    if outcome.too_many_failed:
        why = ", ".join(f"{status} {count:,}" for status, count in outcome.counts.items() if status != OK)
        place = f"; relative paths start at {manifest.root} (manifest.root)" if outcome.counts.get("not_found") else ""
        limit = f"more than errors.max_fraction={config.errors.max_fraction}"
        limit = "and images of damaged tars have no rows" if DAMAGED in outcome.counts else limit
        raise TooManyFailures(
            f"{config.output.dir}: complete, but {outcome.failed:,} of {manifest.rows:,} rows failed "
            f"({outcome.failed / manifest.rows:.1%}: {why}), {limit}; the column error and {PAGE} say why{place}"
        )


def _report(outcome: Outcome, ran: RunStats, content: DatasetSummary) -> RunReport:
    """The report; ``ran`` are the statistics of all parts of the job."""
    prepared, embedded, bank = outcome.prepared, outcome.embedded, outcome.engine.bank()
    config, whole = prepared.config, outcome.part.whole
    available = (ran.cores if whole else ran.cores_of_hosts) or cores()
    startup = sum(embedded.startup.values())
    # The parts of a job need not run at the same time, and then have no common throughput.
    pace = find_pace(ran, setup_of(prepared), embedded.loop) if whole else None
    bottleneck = _bottleneck(outcome, ran, pace, startup)
    committed = sum(commit.rows for commit in outcome.committed)
    use = gpu_use(outcome.stats, embedded.seconds)
    return RunReport(
        started=datetime.fromtimestamp(ran.began, UTC).isoformat(timespec="milliseconds"),
        rows=ran.rows,
        images=ran.images,
        resumed_rows=embedded.resumed_rows if whole else max(0, committed - ran.rows),
        total_rows=outcome.manifest.rows,
        wall_seconds=round(ran.seconds, 3),
        startup_seconds=round(startup, 3),
        images_per_second=round(ran.images / ran.seconds, 2),
        # The throughput of one part is not that of the job.
        steady_images_per_second=round(embedded.images_per_second, 2) if whole else 0.0,
        stages={name: round(seconds, 3) for name, seconds in ran.clocks.seconds.items()},
        bound=bottleneck.stage,
        advice=bottleneck.advice,
        counts=outcome.counts,
        failures=content.failures,
        labels=content.labels,
        prompts={"labels": len(bank.names) if bank else 0, "cached": bank is not None and bank.cached},
        parity=prepared.parity,
        decoder_parity=prepared.decoder_parity,
        text_parity=prepared.text_parity,
        texts=ran.texts,
        similarity=content.similarity,
        batch_sizes=ran.batch_sizes or (config.loader.batch_size,),
        pace=pace,
        memory=ran.memory or memory(prepared.device),
        machine={**prepared.machine, "cores": available},
        versions=versions(BACKENDS[config.backend.name].packages),
        fingerprints=prepared.plan.fingerprints,
        config=dataclasses.asdict(config),
        exit_code=TooManyFailures.exit_code if outcome.too_many_failed or outcome.given_up else 0,
        workers=tuple(dataclasses.replace(worker, timeline=Timeline()) for worker in ran.workers),
        given_up=outcome.given_up,
        repeats=ran.repeats,
        timeline=ran.timeline,
        scores=content.scores,
        run=outcome.run,
        notes=notes_of(config),
        gpu_busy=None if use is None else round(use.busy, 4),
        startup=_rounded(embedded.startup),
        stored=_stored(outcome, ran),
    )


def _stored(outcome: Outcome, ran: RunStats) -> dict[str, object]:
    """The form of stored embeddings and its recall; empty where it is that of the model's floats."""
    prepared, recall = outcome.prepared, ran.recall
    form = VectorFormat.of(prepared.plan.fingerprints["output"], prepared.dim)
    if form.exact and form.dim == prepared.dim:
        return {}
    measured = {"recall_at_10": round(recall["at_10"], 4), "sample": recall["rows"]} if recall else {}
    return {"dtype": form.dtype, "dim": form.dim, "bytes": form.size, **measured}


def _bottleneck(outcome: Outcome, ran: RunStats, pace: Pace | None, startup: float) -> Bottleneck:
    """The bottleneck of a run, with advice that a few of its images or its idle cores may give."""
    prepared, engine = outcome.prepared, outcome.engine
    setup = setup_of(prepared)
    use = gpu_use(outcome.stats, outcome.embedded.seconds)
    found = find_bottleneck(ran.clocks, setup, startup=startup, wall=ran.seconds, gpu=use)
    if found.stage == START_UP:
        longest = phases.listed(outcome.embedded.startup, most=LONGEST)
        return Bottleneck(found.stage, f"{found.advice}: {longest}")
    available = ran.cores or cores()
    if found.stage == "encoding" and setup.device == "cpu" and pace is not None and pace.cores_busy < BUSY * available:
        advice = (
            f"only {pace.cores_busy:.1f} of {available} cores worked for this run: other programs, or a limit on this "
            "process, held the rest; run it when the machine is quiet before changing anything"
        )
        return Bottleneck(found.stage, advice)
    if found.stage == "decoding" and pace is not None:
        faster = faster_decoder(engine.manifest, engine.cpu_reader, pace, ran, setup)
        return Bottleneck(found.stage, faster.advice) if faster is not None else found
    return found


def log_summary(result: RunReport, config: Config) -> None:
    """Log the report in a few sentences."""
    if not result.rows:
        log.info("%s is complete: %d rows; nothing to do", config.output.dir, result.total_rows)
        return
    where = place_of(result.machine, result.bound)
    rate = result.images_per_second
    headline = summary.headline(result.images, result.wall_seconds, rate, result.bound, where=where)
    log.info("%s", summary.of_texts(headline, result.config))
    steady = result.steady_images_per_second
    after = f"after start-up: {steady:,.1f} images/s; " if steady else ""
    log.info("%s", summary.of_texts(f"{after}{result.advice}", result.config))
    if result.pace is not None:
        log.info("%s", result.pace.verdict)
    if result.stored:
        log.info("%s", summary.stored_as(result.stored))
    if result.repeats:
        log.info("%d rows share the embedding of another row with the same bytes", result.repeats)
    log.info("rows by status: %s", ", ".join(f"{name} {count}" for name, count in result.counts.items()))
    name = PAGE if config.report.html else REPORT
    log.info("dataset: %s   report: %s/%s", config.output.dir, config.output.dir, name)


def log_phases(result: RunReport, after: Mapping[str, float]) -> None:
    """Log the phases of the start-up, and those from the last batch on, to which ``after`` are added."""
    if not result.rows:
        return
    ending = {**result.ending, **after}
    log.info("start-up, %.1f s: %s", sum(result.startup.values()), phases.listed(result.startup) or "nothing")
    log.info("after the last batch, %.1f s: %s", sum(ending.values()), phases.listed(ending) or "nothing")


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def setup_of(prepared: Prepared) -> ProcessSetup:
    """The work of each process of a job, for its report."""
    config, each = prepared.config, int(str(prepared.machine["cores"]))
    return ProcessSetup(
        device=prepared.device.partition(":")[0],
        precision=prepared.precision,
        decoder=config.images.decoder,
        threads=config.loader.workers or each,
        streams=prepared.streams,
        cores=each,
    )
