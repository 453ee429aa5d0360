"""The main job, top to bottom: manifest, model, prompts, plan, shards, dataset, report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

from pipeline.addresses import is_local, local_path
from pipeline.cluster import inline
from pipeline.config import Config
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.parts import part_format
from pipeline.demo import folder as demo
from pipeline.errors import TooManyFailures
from pipeline.failpoints import failpoint
from pipeline.gallery import gallery
from pipeline.images.decoders import Decoders
from pipeline.images.reader import PixelReader
from pipeline.manifest.shards import cut
from pipeline.manifest.source import Manifest
from pipeline.processes import cores
from pipeline.reading import worker_threads
from pipeline.records import OK, RunReport, Stage
from pipeline.report import pace, page, summary
from pipeline.report.clocks import StageClocks
from pipeline.report.logs import log_to, log_to_terminal
from pipeline.report.progress import Progress
from pipeline.report.spent import spent
from pipeline.setup import Opened, open_run
from pipeline.storage.base import Storage
from pipeline.storage.opening import open_storage
from pipeline.worker import Job

REPORT, PAGE = "_report.json", "_report.html"
log = logging.getLogger(__name__)


def run_job(
    config: Config,
    *,
    began: float | None = None,
    decoders: Decoders | None = None,
    every_byte: bool = False,
) -> RunReport:
    """Embed and label what is not done yet, finish the dataset, write the report.

    ``began`` is when the command was given, in seconds since the epoch; without it, the start-up that the
    report shows begins with this call. ``decoders`` are those of :func:`~pipeline.reading.open_decoders`, if the caller
    has started them by now; they are closed here. ``every_byte`` reads what is done already in an object store whole,
    and does not take the store's word for it, see :func:`~pipeline.dataset.commits.find_done`.

    Raises:
        PipelineError: one of :mod:`pipeline.errors`, each with its exit code.
    """
    storage = open_storage(config.output.dir)
    # From here on the one address that all rooms can open, without a ~.
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=storage.url))
    # Before the log of the output, and before a GPU's memory is taken: a run that is refused disturbs nothing.
    with ExitStack() as opened:
        if decoders is not None:
            opened.callback(decoders.close)
        with log_to_terminal():
            held = opened.enter_context(lease.take(storage, seconds=config.output.lease_seconds))
        opened.enter_context(log_to(storage))
        if held.taken_over:
            log.warning("took over from %s", held.taken_over)
        before = time.time()
        rendered = with_demo_scenes(config)
        # Rendering the demo's pictures is no part of embedding them.
        began = (began or before) + time.time() - before
        run = open_run(rendered, storage, held, opened, decoders)
        return _run(run, storage, held, began=began, every_byte=every_byte, demo_scenes=rendered is not config)


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
    run: Opened, storage: Storage, held: lease.Lease, *, began: float, every_byte: bool, demo_scenes: bool
) -> RunReport:
    config, manifest, encoder, bank, reader = run.config, run.manifest, run.encoder, run.bank, run.reader
    done = commits.find_done(storage, run.plan, held.confirm, every_byte=every_byte)
    resumed_rows = sum(commit.rows for commit in done.values())
    if done:
        log.info("%d of %d shards (%d rows) are done already", len(done), run.plan.shards, resumed_rows)

    form = part_format(
        manifest.schema,
        dim=encoder.dim,
        dtype=config.output.dtype,
        compression=config.output.compression,
        fingerprints=run.plan.fingerprints,
    )
    job = Job(config=config, manifest=manifest, spec=run.spec, form=form, bank=bank)
    todo = (shard for shard in cut(manifest, config.manifest.shard_rows) if shard.index not in done)
    clocks, rows = StageClocks(), 0
    before, looped = spent(), time.time()
    with (
        Progress(manifest.rows, done=resumed_rows, mode=config.report.progress, streams=encoder.streams) as progress,
        closing(inline.run(todo, job, encoder, clocks=clocks, on_batch=progress.embedded, reader=reader)) as reports,
    ):
        for report in reports:
            held.check()
            rows += report.rows if report.committed else 0
            progress.failed(report.rows - report.counts[OK])
    used, looping = spent() - before, time.time() - looped
    counts, parts = _finish(storage, run.plan, held, done)
    startup, wall = looped - began + progress.first_batch_seconds, time.time() - began

    bound, advice = summary.find_bound(
        clocks.total(),
        startup=startup,
        wall=wall,
        workers=worker_threads(config),
        decoder=config.images.decoder,
        streams=encoder.streams,
        device=encoder.device.type,
        precision=encoder.precision,
        cores=cores(),
    )
    content = summary.summarize(config.output.dir, parts, id=manifest.id, examples=config.report.examples)
    failed = sum(count for status, count in counts.items() if status != OK)
    over = failed > config.errors.max_fraction * manifest.rows
    result = RunReport(
        started=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        rows=rows,
        images=progress.images,
        resumed_rows=resumed_rows,
        total_rows=manifest.rows,
        wall_seconds=round(wall, 3),
        startup_seconds=round(startup, 3),
        images_per_second=round(progress.images / wall, 2),
        steady_images_per_second=round(progress.steady_images_per_second, 2),
        stages={name: round(seconds, 3) for name, seconds in clocks.total().seconds.items()},
        bound=bound,
        advice=advice,
        counts=counts,
        failures=content.failures,
        labels=content.labels,
        prompts={"labels": len(bank.names) if bank else 0, "cached": bank is not None and bank.cached},
        parity=run.parity,
        decoder_parity=run.decoder_parity,
        batch_sizes=tuple(encoder.batch_sizes),
        pace=pace.find_pace(
            clocks.total(),
            used,
            images=progress.images,
            steady=progress.steady_images_per_second,
            seconds=looping,
            cores=cores(),
            device=encoder.device.type,
            threads={
                Stage.READ: worker_threads(config),
                Stage.DECODE: worker_threads(config),
                Stage.ENCODE: encoder.streams,
                Stage.LABEL: encoder.streams,
            },
        ),
        memory={**summary.memory(), **reader.memory()},
        machine=summary.machine(str(encoder.device), cores()),
        versions=summary.versions(),
        fingerprints=run.plan.fingerprints,
        config=dataclasses.asdict(config),
        exit_code=TooManyFailures.exit_code if over else 0,
    )
    held.confirm()
    if rows or storage.read(REPORT) is None:
        _publish(storage, result, config, manifest, reader, parts)
        failpoint("report.written")
    _say(result, config)
    if demo_scenes:
        log.info("%.1f %% of the scenes got their true label", 100 * demo.accuracy(config.output.dir, parts))
    if over:
        raise TooManyFailures(
            f"{config.output.dir}: complete, but {failed:,} of {manifest.rows:,} rows failed "
            f"({failed / manifest.rows:.1%}), more than "
            f"errors.max_fraction={config.errors.max_fraction}; see the column status, or {PAGE}"
        )
    return result


def _finish(
    storage: Storage, wanted: plan.Plan, held: lease.Lease, done: Mapping[int, commits.Commit]
) -> tuple[Mapping[str, int], list[str]]:
    """Write ``_SUCCESS``; rows by status with ``ok`` first, and the parts in order."""
    settled = commits.read_commits(storage, wanted, known=done)
    counts = commits.finalize(storage, wanted, settled, held.confirm)
    ordered = {OK: counts.pop(OK, 0), **dict(sorted(counts.items()))}
    return ordered, [commit.part for commit in settled]


def _publish(
    storage: Storage, result: RunReport, config: Config, manifest: Manifest, reader: PixelReader, parts: list[str]
) -> None:
    if config.report.html:
        examples = gallery(
            manifest,
            reader,
            part=f"{config.output.dir.rstrip('/')}/{parts[0]}",
            shard_rows=config.manifest.shard_rows,
            count=config.report.examples,
        )
        storage.write(PAGE, page.to_html(result, examples, output=config.output.dir, model=config.model.name))
    # Last: a run that finds it has nothing left to write.
    storage.write(REPORT, page.to_json(result))


def _say(result: RunReport, config: Config) -> None:
    if not result.rows:
        log.info("%s is complete: %d rows; nothing to do", config.output.dir, result.total_rows)
        return
    log.info("%s", summary.headline(result.images, result.wall_seconds, result.images_per_second, result.bound))
    log.info("steady %.1f images/s; %s", result.steady_images_per_second, result.advice)
    if result.pace is not None:
        log.info("%s", result.pace.verdict)
    log.info("rows by status: %s", ", ".join(f"{name} {count}" for name, count in result.counts.items()))
    log.info("dataset: %s   report: %s/%s", config.output.dir, config.output.dir, PAGE)
