"""The main job, top to bottom: manifest, model, prompts, plan, shards, dataset, report."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.concurrency import in_order
from pipeline.core.errors import ShardsGivenUp, StorageError, TooManyFailures
from pipeline.core.failpoints import failpoint
from pipeline.core.log_format import new_run
from pipeline.core.records import OK
from pipeline.core.run_report import RunReport
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.parts import part_format
from pipeline.engine.demo import folder as demo
from pipeline.engine.loop import Job
from pipeline.engine.prepare import open_inputs, settle, spec_of
from pipeline.images.pool.pool import Decoders
from pipeline.job.cluster.executor import Crew, crew_of
from pipeline.job.cluster.part import Done, Share
from pipeline.job.finish import REPORT, Ending, report_of, say, say_labels
from pipeline.manifest.shards import cut
from pipeline.report import summary
from pipeline.report.history import earlier_runs, is_stale
from pipeline.report.page import to_dict, to_json
from pipeline.report.render import PAGE, draw, try_to_publish
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import is_local, local_path
from pipeline.telemetry.logs import log_to, log_to_terminal, progress_mode
from pipeline.telemetry.monitor import Monitor, monitored
from pipeline.telemetry.progress import Progress
from pipeline.telemetry.tracing import shard as shard_span
from pipeline.telemetry.tracing import span

log = logging.getLogger(__name__)


def run_job(
    config: Config,
    *,
    began: float | None = None,
    decoders: Decoders | None = None,
    every_byte: bool = False,
    run: str = "",
    closing_words: bool = True,
) -> RunReport:
    """Embed and label what is not done yet, finish the dataset, write the report.

    ``began`` is when the command was given, in seconds since the epoch; without it, the start-up that the report shows
    begins with this call. ``decoders`` are those of :func:`~pipeline.images.factory.open_decoders`, if the caller has
    started them by now; they are closed here. ``every_byte`` reads what is done already in an object store whole, and
    does not take the store's word for it, see :func:`~pipeline.dataset.commits.find_done`. ``run`` is the name of the
    run in its log and its metrics; without it, it gets one. ``closing_words`` are said at the end.

    Raises:
        PipelineError: one of :mod:`pipeline.core.errors`, each with its exit code.
    """
    storage = open_storage(config.output.dir)
    # From here on the one address that all rooms can open, without a ~.
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=storage.url))
    share, run = Share.of(config), run or new_run()
    # Before the log of the output, and before a GPU's memory is taken: a run that is refused disturbs nothing.
    with ExitStack() as opened:
        if decoders is not None:
            opened.callback(decoders.close)
        monitor = opened.enter_context(monitored(config, run, began=began or time.time()))
        with log_to_terminal(config.log, run):
            seconds = config.output.lease_seconds
            held = opened.enter_context(lease.take(storage, seconds=seconds, folder=share.lease))
            share.refuse_others(storage)
        opened.enter_context(log_to(storage, share.log, form=config.log, run=run))
        if held.taken_over:
            log.warning("took over from %s", held.taken_over)
        before = time.time()
        rendered = with_demo_scenes(config)
        # Rendering the demo's pictures is no part of embedding them.
        began = (began or before) + time.time() - before
        crew = crew_of(rendered, storage, held.check, decoders)
        opened.push(crew)
        work = partial(_run, rendered, storage, held, crew, share, monitor)
        return work(began=began, every_byte=every_byte, demo_scenes=rendered is not config, closing_words=closing_words)


def with_demo_scenes(config: Config) -> Config:
    """The config itself, or one whose manifest is freshly rendered scenes if it names none."""
    if config.manifest.path is not None:
        return config
    output = config.output.dir
    where = Path(local_path(output)).parent / "scenes" if is_local(output) else Path("outputs/scenes")
    log.info("manifest.path is not set: embedding %d rendered scenes in %s", config.manifest.demo_scenes, where)
    path = demo.render_folder(where, config.manifest.demo_scenes)
    manifest = dataclasses.replace(config.manifest, path=str(path), id="id", image="path", keep=[demo.TRUTH], root=None)
    return dataclasses.replace(config, manifest=manifest)


def _run(
    config: Config,
    storage: Storage,
    held: lease.Lease,
    crew: Crew,
    share: Share,
    monitor: Monitor,
    *,
    began: float,
    every_byte: bool,
    demo_scenes: bool,
    closing_words: bool,
) -> RunReport:
    inputs = open_inputs(config)
    with span("prepare"):
        prepared = crew.prepare(inputs)
    settle(prepared, storage, held)
    config, wanted, manifest, bank = prepared.config, prepared.plan, inputs.manifest, inputs.bank()
    say_labels(bank)
    form = part_format(
        manifest.schema,
        dim=prepared.dim,
        dtype=config.output.dtype,
        compression=config.output.compression,
        fingerprints=wanted.fingerprints,
    )
    spec = spec_of(config, inputs.checkpoint)
    crew.begin(Job(config=config, manifest=manifest, spec=spec, form=form, bank=bank))
    done = commits.find_done(storage, wanted, held.confirm, every_byte=every_byte)
    resumed_rows = sum(commit.rows for commit in done.values())
    if done:
        log.info("%d of %d shards (%d rows) are done already", len(done), wanted.shards, resumed_rows)

    shards = cut(manifest, config.manifest.shard_rows)
    todo = (shard for shard in shards if share.has(shard.index) and shard.index not in done)
    rows, images, looped = 0, 0, time.time()
    with (
        Progress(manifest.rows, done=resumed_rows, mode=progress_mode(config), streams=prepared.streams) as progress,
        closing(crew.run(todo, progress.embedded)) as reports,
    ):
        monitor.looping(progress.figures, resumed=resumed_rows)
        for report in reports:
            held.check()
            shard_span(report)
            rows += report.rows if report.committed else 0
            # Not those of the progress: what a worker that died had embedded is embedded again.
            images += report.counts[OK] - report.repeats
            progress.failed(report.rows - report.counts[OK])
            progress.shared(report.repeats)
    ended = time.time()
    settled = _settled(storage, wanted, done)
    left = {*range(wanted.shards)} - {commit.shard for commit in settled} - {*crew.given_up}
    if any(map(share.has, left)):
        raise StorageError(
            f"{storage.url}: shard {min(filter(share.has, left))} has no commit any more; run the same command again"
        )
    if len(settled) == wanted.shards:
        commits.finalize(storage, wanted, settled, held.confirm)
    own = Done(began=began, ended=time.time(), rows=rows, images=images, members=crew.members)
    parts = [(commit.part, commit.shard * wanted.shard_rows) for commit in settled]
    content = summary.summarize(config.output.dir, parts, id=manifest.id, examples=config.report.examples)
    end = Ending(
        prepared=prepared,
        manifest=manifest,
        bank=bank,
        own=own,
        ran=share.merged(storage, own),
        whole=share.whole,
        settled=tuple(settled),
        given_up=crew.given_up,
        resumed_rows=resumed_rows,
        loop_began=looped,
        loop_seconds=ended - looped,
        first_batch_seconds=progress.first_batch_seconds,
        steady=progress.steady_images_per_second,
    )
    previous = storage.read(REPORT)
    result = report_of(end, content, crew.reader, history=earlier_runs(previous), run=monitor.run)
    monitor.finished(result, dataset_bytes=sum(commit.size for commit in settled))
    held.confirm()
    missing = wanted.shards - len(settled)
    if missing and not crew.given_up:
        log.info("%s: %d of %d shards are missing; other parts do them", config.output.dir, missing, wanted.shards)
        return result
    told = to_dict(result)
    if rows or crew.given_up or is_stale(previous, result.counts):
        # A page of another run would contradict it; one that cannot be removed is no reason to end without a report.
        with suppress(StorageError):
            storage.remove(PAGE)
        storage.write(REPORT, to_json(result))
        failpoint("report.written")
    else:
        told = json.loads(previous or b"null")
    if config.report.html and storage.size(PAGE) is None:
        what = partial(draw, content=content, parts=parts, manifest=manifest, reader=crew.reader)
        try_to_publish(storage, partial(what, told, output=config.output.dir, examples=config.report.examples))
    if closing_words:
        say(result, config)
    if crew.given_up:
        raise ShardsGivenUp(
            f"{config.output.dir}: all is committed but {len(crew.given_up)} of {wanted.shards} shards, each of which "
            f"ended every worker that had it: {', '.join(map(str, crew.given_up[:20]))}. Look at the rows from "
            f"{crew.given_up[0] * wanted.shard_rows:,} on; the same command tries them again"
        )
    if demo_scenes:
        truth = demo.accuracy(config.output.dir, [part for part, _ in parts])
        log.info("%.1f %% of the scenes got their true label", 100 * truth)
    if end.over:
        why = ", ".join(f"{status} {count:,}" for status, count in result.counts.items() if status != OK)
        place = f"; relative paths start at {manifest.root} (manifest.root)" if "not_found" in result.counts else ""
        raise TooManyFailures(
            f"{config.output.dir}: complete, but {end.failed:,} of {manifest.rows:,} rows failed "
            f"({end.failed / manifest.rows:.1%}: {why}), more than errors.max_fraction={config.errors.max_fraction}; "
            f"the column error and {PAGE} say why{place}"
        )
    return result


def _settled(storage: Storage, wanted: plan.Plan, done: Mapping[int, commits.Commit]) -> list[commits.Commit]:
    """The commits that are there, by shard."""
    there = storage.sizes(commits.FOLDER)
    names = [f"{shard:05d}.json" for shard in range(wanted.shards)]
    if all(name in there for name in names):
        return commits.read_commits(storage, wanted, known=done)
    read = in_order(
        partial(commits.read_commit, storage), (name for name in names if name in there), threads=storage.threads
    )
    return [commit for commit in read if commit is not None]
