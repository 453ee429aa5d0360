"""The main job, from top to bottom: open, plan, embed, finish."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.config.schema import Config
from pipeline.core.errors import StorageError
from pipeline.core.log_format import new_run
from pipeline.core.phases import Phases, phase
from pipeline.core.records import OK, Shard
from pipeline.core.run_report import RunReport
from pipeline.dataset import commits, lease, plan
from pipeline.engine.demo import folder as demo
from pipeline.engine.demo.notes import log_notes
from pipeline.engine.engine import Engine
from pipeline.engine.prepare import Prepared, job_of, log_labels, write_plan
from pipeline.images.pool.pool import Decoders
from pipeline.job import finish
from pipeline.job.cluster.claims import Claims
from pipeline.job.cluster.executor import Executor, executor_of
from pipeline.job.cluster.main_guard import leave_if_run_again
from pipeline.job.cluster.part import Part
from pipeline.job.finish import Embedded, Outcome
from pipeline.job.unique_ids import UniqueIds
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import cut
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.telemetry.logs import log_to, log_to_terminal, progress_mode
from pipeline.telemetry.monitor import Monitor, monitored
from pipeline.telemetry.progress import EstimatedRows, Progress
from pipeline.telemetry.run_stats import RunStats
from pipeline.telemetry.tracing import shard as shard_span
from pipeline.telemetry.tracing import span

# The phase that is left out.
_SCENES = "scenes"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run that are not part of the job's config.

    Attributes:
        began: time of the command, in seconds since the epoch; None: the time of the call.
        phases: phases of the command so far, with their beginning in place of ``began``.
        decoders: decoder processes that were started before the run, which closes them.
        every_byte: read committed parts in an object store whole, instead of comparing the store's digests (see
            :func:`~pipeline.dataset.commits.find_done`).
        recorded: the model's fingerprint in another dataset whose rows these will be put beside; that of the output's
            own plan comes first.
        run: name of the run in its log and its metrics; empty: a new one.
        notes: log what the readers of the rows must know; False where the caller says it.
        summary: log the summary of the report at the end.
    """

    began: float | None = None
    phases: Phases | None = None
    decoders: Decoders | None = None
    every_byte: bool = False
    recorded: Mapping[str, Any] | None = None
    run: str = ""
    notes: bool = True
    summary: bool = True


@dataclass(frozen=True, slots=True)
class _Output:
    """The output of a run: its storage and lease, the part of the shards that the run embeds, its monitor and its
    phases; with ``cluster.part=auto`` its claims too."""

    storage: Storage
    held: lease.Lease
    part: Part
    monitor: Monitor
    phases: Phases
    claims: Claims | None = None

    def rounds(self, todo: Iterator[Shard]) -> Iterable[Iterator[Shard]]:
        """The shards to do, one round after the other."""
        return [todo] if self.claims is None else self.claims.rounds(todo)


def run_job(config: Config, options: RunOptions | None = None) -> RunReport:
    """Embed and label the shards that have no commit, finish the dataset, write the report.

    Raises:
        PipelineError: one of :mod:`pipeline.core.errors`, each with its exit code.
    """
    leave_if_run_again()
    options = options or RunOptions()
    phases = options.phases or Phases(options.began or time.time())
    with ExitStack() as opened:
        opened.enter_context(phases.counting())
        if options.decoders is not None:
            opened.callback(options.decoders.close)
        # Open: the output with its lease, then manifest, model and prompts.
        config, output = _open_output(config, options, phases, opened)
        if options.notes:
            log_notes(config)
        # Rendering the scenes of the demo is not part of the job.
        with phases.within(_SCENES):
            config, rendering_seconds = with_demo_scenes(config)
        executor = opened.enter_context(executor_of(config, output.storage, output.held.check))
        recorded = plan.recorded(output.storage, "model") or options.recorded
        engine = opened.enter_context(Engine(config, decoders=options.decoders, recorded=recorded))
        if config.cluster.name == "inline":
            engine.start()
        phases.ended("output")
        unique = opened.enter_context(UniqueIds(output.storage, output.part, seconds=config.output.lease_seconds))
        engine.begin(output.storage, unique.check)

        # Plan: written behind the gates, which may look at the first batch; no part is written before the plan.
        with span("prepare"), phase("prepare" if config.cluster.name == "inline" else "workers"):
            prepared = executor.prepare(engine)
        output.monitor.labels["backend"] = prepared.config.backend.name
        if engine.has_images:
            log_labels(engine.bank())
        executor.begin(job_of(engine, prepared), partial(_write_plan, engine, prepared, output, unique))
        find_done = partial(
            commits.find_done, output.storage, prepared.plan, output.held.confirm, every_byte=options.every_byte
        )
        # Processes that claim shards come and go, and do not look at every part.
        done = {} if output.claims else find_done()

        # Embed: what has no commit yet; _SUCCESS is written when the commits cover the plan.
        embedded = _embed(output, executor, engine.manifest, prepared, done)
        prepared, publishes = executor.prepared, output.claims is None or output.claims.end()
        given_up = tuple(sorted({*executor.given_up, *(output.claims.given_up if output.claims else ())}))
        try:
            committed = _finalize(output, given_up, prepared, done) if publishes else []
        except StorageError:
            if output.claims:
                # Clear what is damaged: the next run does it again.
                find_done()
            raise
        phases.ended("marker")

        # Finish: the report of this run, and the errors of a complete dataset.
        outcome = Outcome(
            prepared=prepared,
            engine=engine,
            storage=output.storage,
            part=output.part,
            run=output.monitor.run,
            began=phases.began + (rendering_seconds or 0.0),
            ended=time.time(),
            phases=phases,
            embedded=embedded,
            workers=executor.workers,
            committed=tuple(committed),
            given_up=given_up if publishes else (),
        )
        draft = finish.report_of(outcome)
        output.monitor.finished(draft.report, dataset_bytes=sum(commit.size for commit in committed))
        output.held.confirm()
        if not publishes:
            return draft.report
        if outcome.missing and not outcome.given_up:
            # The part of the job that commits the last shard publishes the report, and counts the failures.
            missing, shards = outcome.missing, prepared.plan.shards
            log.info("%s: %d of %d shards are missing; other parts do them", config.output.dir, missing, shards)
            return draft.report
        finish.publish(outcome, draft)
        if output.claims is not None:
            output.claims.clear()
        phases.ended("report")
        if options.summary:
            finish.log_summary(draft.report, prepared.config)
            finish.log_phases(draft.report, phases.take())
        if rendering_seconds is not None:
            truth = demo.accuracy(config.output.dir, [commit.part for commit in committed])
            log.info("%.1f %% of the scenes got their true label", 100 * truth)
        finish.check(outcome)
        return draft.report


def with_demo_scenes(config: Config) -> tuple[Config, float | None]:
    """Render scenes if the config names no manifest.

    Returns:
        The config with the manifest of the scenes, and the seconds of rendering; or the same config and None.
    """
    if config.manifest.path is not None:
        return config, None
    began, folder = time.time(), demo.scenes_folder(config.output.dir)
    log.info("manifest.path is not set: embedding %d rendered scenes in %s", config.manifest.demo_scenes, folder)
    path = demo.render_folder(folder, config.manifest.demo_scenes)
    return demo.with_scenes(config, path), time.time() - began


def _open_output(config: Config, options: RunOptions, phases: Phases, opened: ExitStack) -> tuple[Config, _Output]:
    """Take the lease of the output and open its log; the config gets the output's full address."""
    storage = open_storage(config.output.dir)
    # All packages can open this address, which has no ~.
    config = config.changed({"output.dir": storage.url})
    part, run = Part.of(config), options.run or new_run()
    # The lease comes before the log and before any memory of a GPU: a run that does not get it changes nothing.
    monitor = opened.enter_context(monitored(config, run, began=phases.began))
    with log_to_terminal(config.log, run):
        held = opened.enter_context(lease.take(storage, seconds=config.output.lease_seconds, folder=part.lease))
        part.refuse_others(storage)
    opened.enter_context(log_to(storage, part.log, form=config.log, run=run))
    if held.taken_over:
        log.warning("took over from %s", held.taken_over)
    claims = None
    if part.token:
        claims = opened.enter_context(Claims(storage, part.lease, config.output.lease_seconds, held.check))
    return config, _Output(storage, held, part, monitor, phases, claims)


def _write_plan(engine: Engine, prepared: Prepared, output: _Output, unique: UniqueIds) -> None:
    """Write the plan behind the check of the ids, for which workers of a cluster do not wait."""
    engine.check_ids()
    write_plan(prepared, output.storage, output.held)
    unique.release()


def _embed(
    output: _Output, executor: Executor, manifest: Manifest, prepared: Prepared, done: Mapping[int, commits.Commit]
) -> Embedded:
    """Run the executor over the shards of this part that have no commit."""
    config = prepared.config
    count, resumed = len(done), sum(commit.rows for commit in done.values())
    if output.claims:
        count = len(commits.listed(output.storage))
        resumed = manifest.rows * count // prepared.plan.shards
        if manifest.counted:
            resumed = min(manifest.rows, count * config.manifest.shard_rows)
    if count:
        log.info("%d of %d shards (%d rows) are done already", count, prepared.plan.shards, resumed)
    shards = cut(manifest, config.manifest.shard_rows)
    todo = (shard for shard in shards if output.part.has(shard.index) and shard.index not in done)
    output.phases.ended("plan")
    startup = output.phases.take()
    startup.pop(_SCENES, None)

    def on_batch(images: int) -> None:
        first = not progress.first_batch_seconds
        progress.embedded(images)
        output.phases.ended("first batch" if first else "batches")
        if first:
            startup.update(output.phases.take())

    rows, images, began = 0, 0, time.time()
    about = None if manifest.counted else EstimatedRows([file.size for file in manifest.files])
    total, mode = manifest.rows, progress_mode(config)
    if about is not None:
        for commit in done.values():
            total = about.count(commit.shard, commit.rows)
    with Progress(total, done=resumed, mode=mode, streams=prepared.streams, about=about is not None) as progress:
        output.monitor.looping(progress.figures, resumed=resumed)
        for shards in output.rounds(todo):
            with closing(executor.run(shards, on_batch)) as reports:
                for report in reports:
                    output.held.check()
                    shard_span(report)
                    rows += report.rows if report.committed else 0
                    # The progress counts the images of a worker that died twice, since they are embedded again.
                    images += report.counts[OK] - report.repeats
                    progress.failed(report.rows - report.counts[OK])
                    progress.shared(report.repeats)
                    if about is not None:
                        progress.expect(about.count(report.shard, report.rows))
                    if output.claims is not None:
                        output.claims.committed(report.shard)
                        # A machine that goes away leaves what it did.
                        done_so_far = RunStats(began, time.time(), rows, images, executor.workers)
                        output.part.record(output.storage, done_so_far)
    output.phases.ended("last parts")
    return Embedded(
        rows=rows,
        images=images,
        resumed_rows=resumed,
        began=began,
        seconds=time.time() - began - executor.prepared.gate_seconds,
        startup=startup,
        images_per_second=progress.steady_images_per_second,
    )


def _finalize(
    output: _Output, given_up: Iterable[int], prepared: Prepared, done: Mapping[int, commits.Commit]
) -> list[commits.Commit]:
    """Return the commits of all parts of the job, after writing ``_SUCCESS`` if they cover the plan.

    Raises:
        StorageError: a shard of this part has lost its commit.
    """
    storage, plan = output.storage, prepared.plan
    committed = commits.read_present(storage, plan, known=done)
    left = {*range(plan.shards)} - {commit.shard for commit in committed} - {*given_up}
    lost = [shard for shard in sorted(left) if output.part.has(shard)]
    if lost:
        raise StorageError(f"{storage.url}: shard {lost[0]} has no commit any more; run the same command again")
    if len(committed) == plan.shards:
        commits.finalize(storage, plan, committed, output.held.confirm)
    return committed
