"""The main job, top to bottom: manifest, model, prompts, plan, shards, dataset, report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pipeline import measured
from pipeline.addresses import is_local, local_path
from pipeline.cluster.crew import Crew, crew_of
from pipeline.cluster.share import Done, Share
from pipeline.config import Config
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.parts import part_format
from pipeline.demo import folder as demo
from pipeline.errors import ShardsGivenUp, StorageError, TooManyFailures
from pipeline.failpoints import failpoint
from pipeline.gallery import gallery
from pipeline.images.decoders import Decoders
from pipeline.images.reader import PixelReader
from pipeline.manifest.shards import cut
from pipeline.manifest.source import Manifest
from pipeline.members import peak_memory, total_clocks, total_cores
from pipeline.processes import cores
from pipeline.records import OK, RunReport, TextBank
from pipeline.report import page, summary
from pipeline.report.logs import log_to, log_to_terminal
from pipeline.report.progress import Progress
from pipeline.setup import open_inputs, settle, spec_of
from pipeline.storage.base import Storage
from pipeline.storage.opening import open_storage
from pipeline.threads import in_order
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
    share = Share.of(config)
    # Before the log of the output, and before a GPU's memory is taken: a run that is refused disturbs nothing.
    with ExitStack() as opened:
        if decoders is not None:
            opened.callback(decoders.close)
        with log_to_terminal():
            seconds = config.output.lease_seconds
            held = opened.enter_context(lease.take(storage, seconds=seconds, folder=share.lease))
            share.refuse_others(storage)
        opened.enter_context(log_to(storage, share.log))
        if held.taken_over:
            log.warning("took over from %s", held.taken_over)
        before = time.time()
        rendered = with_demo_scenes(config)
        # Rendering the demo's pictures is no part of embedding them.
        began = (began or before) + time.time() - before
        crew = crew_of(rendered, storage, held.check, decoders)
        opened.push(crew)
        run = partial(_run, rendered, storage, held, crew, share)
        return run(began=began, every_byte=every_byte, demo_scenes=rendered is not config)


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
    *,
    began: float,
    every_byte: bool,
    demo_scenes: bool,
) -> RunReport:
    inputs = open_inputs(config)
    prepared = crew.prepare(inputs)
    settle(prepared, storage, held)
    config, wanted, manifest, bank = prepared.config, prepared.plan, inputs.manifest, inputs.bank()
    _say_labels(bank)
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
        Progress(manifest.rows, done=resumed_rows, mode=config.report.progress, streams=prepared.streams) as progress,
        closing(crew.run(todo, progress.embedded)) as reports,
    ):
        for report in reports:
            held.check()
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
    counts = _count(settled)
    own = Done(began=began, ended=time.time(), rows=rows, images=images, members=crew.members)
    ran = share.merged(storage, own)
    wall, startup = ran.ended - ran.began, looped - began + progress.first_batch_seconds
    steady = progress.steady_images_per_second
    places = total_cores(ran.members) or cores()
    bound, advice = measured.bound(ran.members, config, prepared, startup=startup, wall=wall)
    parts = [commit.part for commit in settled]
    content = summary.summarize(config.output.dir, parts, id=manifest.id, examples=config.report.examples)
    failed = sum(count for status, count in counts.items() if status != OK)
    over = failed > config.errors.max_fraction * manifest.rows
    result = RunReport(
        started=datetime.fromtimestamp(ran.began, UTC).isoformat(timespec="seconds"),
        rows=ran.rows,
        images=ran.images,
        resumed_rows=resumed_rows if share.whole else max(0, sum(commit.rows for commit in settled) - ran.rows),
        total_rows=manifest.rows,
        wall_seconds=round(wall, 3),
        startup_seconds=round(startup, 3),
        images_per_second=round(ran.images / wall, 2),
        steady_images_per_second=round(steady, 2),
        stages={name: round(seconds, 3) for name, seconds in total_clocks(ran.members).seconds.items()},
        bound=bound,
        advice=advice,
        counts=counts,
        failures=content.failures,
        labels=content.labels,
        prompts={"labels": len(bank.names) if bank else 0, "cached": bank is not None and bank.cached},
        parity=prepared.parity,
        decoder_parity=prepared.decoder_parity,
        batch_sizes=max((member.batch_sizes for member in ran.members), key=len, default=())
        or (config.loader.batch_size,),
        # The parts of a job need not run side by side, so that there is no pace of them all.
        pace=measured.pace_of(own.members, config, prepared, images=own.images, steady=steady, seconds=ended - looped)
        if share.whole
        else None,
        memory=peak_memory(ran.members) or summary.memory(),
        machine={**prepared.machine, "cores": places},
        versions=summary.versions(),
        fingerprints=wanted.fingerprints,
        config=dataclasses.asdict(config),
        exit_code=TooManyFailures.exit_code if over or crew.given_up else 0,
        workers=ran.members,
        given_up=crew.given_up,
        repeats=sum(member.repeats for member in ran.members),
    )
    held.confirm()
    missing = wanted.shards - len(settled)
    if missing and not crew.given_up:
        log.info("%s: %d of %d shards are missing; other parts do them", config.output.dir, missing, wanted.shards)
        return result
    if rows or crew.given_up or storage.read(REPORT) is None:
        first = parts[0] if settled and settled[0].shard == 0 else None
        _publish(storage, result, config, manifest, crew.reader, first)
        failpoint("report.written")
    _say(result, config)
    if crew.given_up:
        raise ShardsGivenUp(
            f"{config.output.dir}: all is committed but {len(crew.given_up)} of {wanted.shards} shards, each of which "
            f"ended every worker that had it: {', '.join(map(str, crew.given_up[:20]))}. Look at the rows from "
            f"{crew.given_up[0] * wanted.shard_rows:,} on; the same command tries them again"
        )
    if demo_scenes:
        log.info("%.1f %% of the scenes got their true label", 100 * demo.accuracy(config.output.dir, parts))
    if over:
        raise TooManyFailures(
            f"{config.output.dir}: complete, but {failed:,} of {manifest.rows:,} rows failed "
            f"({failed / manifest.rows:.1%}), more than "
            f"errors.max_fraction={config.errors.max_fraction}; see the column status, or {PAGE}"
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


def _count(settled: Sequence[commits.Commit]) -> dict[str, int]:
    """Rows by status, ``ok`` first."""
    counts: Counter[str] = Counter()
    for commit in settled:
        counts.update(commit.counts)
    return {OK: counts.pop(OK, 0), **dict(sorted(counts.items()))}


def _publish(
    storage: Storage, result: RunReport, config: Config, manifest: Manifest, reader: PixelReader, first: str | None
) -> None:
    """Write the page and the report; ``first`` is the part of the first shard, if there is one."""
    if config.report.html:
        examples = []
        if first is not None:
            examples = gallery(
                manifest,
                reader,
                part=f"{config.output.dir.rstrip('/')}/{first}",
                shard_rows=config.manifest.shard_rows,
                count=config.report.examples,
            )
        storage.write(PAGE, page.to_html(result, examples, output=config.output.dir, model=config.model.name))
    # Last: a run that finds it has nothing left to write.
    storage.write(REPORT, page.to_json(result))


def _say_labels(bank: TextBank | None) -> None:
    if bank is None:
        log.warning(
            "no labels: the columns label and score stay null; prompts.labels=[cat,dog] or prompts.path fills them"
        )
    else:
        features = "from the cache" if bank.cached else "embedded and cached"
        log.info("%d labels, text features %s", len(bank.names), features)


def _say(result: RunReport, config: Config) -> None:
    if not result.rows:
        log.info("%s is complete: %d rows; nothing to do", config.output.dir, result.total_rows)
        return
    log.info("%s", summary.headline(result.images, result.wall_seconds, result.images_per_second, result.bound))
    log.info("steady %.1f images/s; %s", result.steady_images_per_second, result.advice)
    if result.pace is not None:
        log.info("%s", result.pace.verdict)
    if result.repeats:
        log.info("%d rows share the embedding of another row with the same bytes", result.repeats)
    log.info("rows by status: %s", ", ".join(f"{name} {count}" for name, count in result.counts.items()))
    log.info("dataset: %s   report: %s/%s", config.output.dir, config.output.dir, PAGE)
