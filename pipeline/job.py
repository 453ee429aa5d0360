"""The main job, top to bottom: manifest, model, prompts, plan, shards, dataset, report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import PIL

from pipeline.addresses import is_local, local_path
from pipeline.backends.base import ImageEncoder
from pipeline.backends.parity import pass_gate, record
from pipeline.cluster import inline
from pipeline.config import DEMO_MODEL, Config
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.parts import part_format
from pipeline.dataset.recipe import recipe_of
from pipeline.demo import folder as demo
from pipeline.errors import TooManyFailures
from pipeline.failpoints import failpoint
from pipeline.gallery import gallery
from pipeline.images.reader import PixelReader
from pipeline.images.sample import draw_sample
from pipeline.manifest.ids import check_ids
from pipeline.manifest.places import check_places
from pipeline.manifest.shards import count_shards, cut
from pipeline.manifest.source import Manifest, open_manifest
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.text import build_bank, read_labels
from pipeline.records import OK, RunReport, Sample, TextBank
from pipeline.report import page, summary
from pipeline.report.clocks import StageClocks
from pipeline.report.logs import log_to, log_to_terminal
from pipeline.report.progress import Progress
from pipeline.storage.base import Storage
from pipeline.storage.opening import open_storage
from pipeline.worker import Job, cores, open_for_job, pixel_reader, worker_threads

REPORT, PAGE = "_report.json", "_report.html"
log = logging.getLogger(__name__)


def run_job(config: Config, *, began: float | None = None) -> RunReport:
    """Embed and label what is not done yet, finish the dataset, write the report.

    ``began`` is when the command was given, in seconds since the epoch; without it, the start-up that the
    report shows begins with this call.

    Raises:
        PipelineError: one of :mod:`pipeline.errors`, each with its exit code.
    """
    storage = open_storage(config.output.dir)
    # From here on the one address that all rooms can open, without a ~.
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=storage.url))
    # Before the log of the output, and before a GPU's memory is taken: a run that is refused disturbs nothing.
    with ExitStack() as opened:
        with log_to_terminal():
            held = opened.enter_context(lease.take(storage, seconds=config.output.lease_seconds))
        opened.enter_context(log_to(storage))
        if held.taken_over:
            log.warning("took over from %s", held.taken_over)
        before = time.time()
        rendered = with_demo_scenes(config)
        # Rendering the demo's pictures is no part of embedding them.
        began = (began or before) + time.time() - before
        return _run(rendered, storage, held, opened, began=began, demo_scenes=rendered is not config)


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


def with_batch_that_fits(config: Config, rows: int) -> Config:
    """The config with no batch larger than its largest shard: what is over would be padding in every batch."""
    size = min(config.loader.batch_size, config.manifest.shard_rows, rows)
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, batch_size=size))


def _run(
    config: Config, storage: Storage, held: lease.Lease, opened: ExitStack, *, began: float, demo_scenes: bool
) -> RunReport:
    started = datetime.now(UTC)
    manifest = open_manifest(config.manifest)
    check_places(config, manifest)
    check_ids(manifest)
    config = with_batch_that_fits(config, manifest.rows)
    log.info("%s: %d rows in %d files", config.manifest.path, manifest.rows, len(manifest.files))

    checkpoint = open_checkpoint(config.model)
    bank = _bank(config, checkpoint)
    spec = dataclasses.replace(checkpoint.spec, corner=config.images.crop_corner)
    reader = opened.enter_context(pixel_reader(config, manifest, spec))
    sample = cache(partial(_sample, config, manifest, reader))
    encoder = open_for_job(config, checkpoint, sample, bank)
    log.info("model %s with %s on %s in %s", config.model.name, encoder.name, encoder.device, encoder.precision)

    prints = fingerprints(config, manifest, checkpoint, encoder, bank)
    wanted = plan.Plan(
        rows=manifest.rows,
        shards=count_shards(manifest.rows, config.manifest.shard_rows),
        shard_rows=config.manifest.shard_rows,
        fingerprints=prints,
        about={"model": config.model.name, "manifest": config.manifest.path},
        config=recipe_of(config),
    )
    # A wrong output.dir is told at once, a backend that misses leaves no plan behind.
    plan.compare(storage, wanted)
    limits = config.parity
    parity = pass_gate(encoder, checkpoint, sample, bank=bank, limits=limits, fingerprints=prints, storage=storage)
    held.confirm()
    plan.settle(storage, wanted)
    failpoint("plan.settled")
    if parity is not None:
        record(parity, encoder, limits=limits, fingerprints=prints, storage=storage)
    done = commits.find_done(storage, wanted, held.confirm)
    resumed_rows = sum(commit.rows for commit in done.values())
    if done:
        log.info("%d of %d shards (%d rows) are done already", len(done), wanted.shards, resumed_rows)

    form = part_format(
        manifest.schema,
        dim=encoder.dim,
        dtype=config.output.dtype,
        compression=config.output.compression,
        fingerprints=prints,
    )
    job = Job(config=config, manifest=manifest, spec=spec, form=form, bank=bank)
    todo = (shard for shard in cut(manifest, config.manifest.shard_rows) if shard.index not in done)
    clocks, rows = StageClocks(), 0
    looped = time.time()
    with (
        Progress(manifest.rows, done=resumed_rows, mode=config.report.progress) as progress,
        closing(inline.run(todo, job, encoder, clocks=clocks, on_batch=progress.embedded, reader=reader)) as reports,
    ):
        for report in reports:
            held.check()
            rows += report.rows if report.committed else 0
            progress.failed(report.rows - report.counts[OK])
    counts, parts = _finish(storage, wanted, held)
    startup, wall = looped - began + progress.first_batch_seconds, time.time() - began

    bound, advice = summary.find_bound(
        clocks.total(),
        startup=startup,
        wall=wall,
        workers=worker_threads(config),
        device=encoder.device.type,
        precision=encoder.precision,
        cores=cores(),
    )
    content = summary.summarize(config.output.dir, parts, id=manifest.id, examples=config.report.examples)
    failed = sum(count for status, count in counts.items() if status != OK)
    over = failed > config.errors.max_fraction * manifest.rows
    result = RunReport(
        started=started.isoformat(timespec="seconds"),
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
        parity=parity,
        batch_sizes=tuple(encoder.batch_sizes),
        memory={**summary.memory(), **reader.memory()},
        machine=summary.machine(str(encoder.device), cores()),
        versions=summary.versions(),
        fingerprints=prints,
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


def fingerprints(
    config: Config, manifest: Manifest, checkpoint: Checkpoint, encoder: ImageEncoder, bank: TextBank | None
) -> dict[str, Any]:
    """Everything that the rows follow from; two runs belong to one dataset if these are equal."""
    labels = None
    if bank is not None:
        labels = {
            "text": bank.fingerprint,
            "count": len(bank.names),
            "scoring": bank.scoring,
            "top_k": config.labels.top_k,
            "threshold": config.labels.threshold,
        }
    return {
        "model": checkpoint.fingerprint,
        "images": {**dataclasses.asdict(config.images), "library": f"Pillow {PIL.__version__}"},
        "backend": encoder.fingerprint,
        "batch_size": config.loader.batch_size,
        "prompts": labels,
        "manifest": manifest.fingerprint,
        "output": {"dtype": config.output.dtype, "compression": config.output.compression},
    }


def _bank(config: Config, checkpoint: Checkpoint) -> TextBank | None:
    prompts = config.prompts
    if not prompts.labels and prompts.path is None and config.model.name == DEMO_MODEL:
        prompts = dataclasses.replace(prompts, labels=demo.label_names())
    labels = read_labels(prompts)
    if not labels.names:
        log.warning(
            "no labels: the columns label and score stay null; prompts.labels=[cat,dog] or prompts.path fills them"
        )
        return None
    bank = build_bank(checkpoint, labels, prompts, config.labels)
    log.info("%d labels, text features %s", len(bank.names), "from the cache" if bank.cached else "embedded and cached")
    return bank


def _sample(config: Config, manifest: Manifest, reader: PixelReader) -> Sample:
    """Images of the job for its backend to be compared on; twice as many where one half is for calibration."""
    count = config.parity.images * (2 if config.backend.quantization == "static" else 1)
    sample = draw_sample(manifest, reader, count)
    if sample is None:
        log.warning("none of the images that were tried can be read; the backend is compared on rendered scenes")
        return demo.rendered_sample(reader.spec, count)
    return sample


def _finish(storage: Storage, wanted: plan.Plan, held: lease.Lease) -> tuple[Mapping[str, int], list[str]]:
    """Write ``_SUCCESS``; rows by status with ``ok`` first, and the parts in order."""
    settled = commits.read_commits(storage, wanted)
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
    log.info("rows by status: %s", ", ".join(f"{name} {count}" for name, count in result.counts.items()))
    log.info("dataset: %s   report: %s/%s", config.output.dir, config.output.dir, PAGE)
