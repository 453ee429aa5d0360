"""``run.dry=true``: what a job would take, from a few batches of it; nothing is written to its output."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import OutputBusy
from pipeline.core.records import Shard
from pipeline.dataset import commits, lease
from pipeline.dataset.parts import part_format
from pipeline.engine.loop import Job
from pipeline.engine.prepare import Inputs, Prepared, open_inputs, spec_of
from pipeline.images.pool.pool import Decoders
from pipeline.job.cluster.executor import executor_of
from pipeline.job.cluster.inline import Inline
from pipeline.job.cluster.part import Part
from pipeline.job.estimate.extrapolate import figures
from pipeline.job.estimate.format import lines
from pipeline.job.estimate.record import Estimate
from pipeline.job.estimate.sampling import in_shards, spread
from pipeline.job.estimate.scaling import processes_of
from pipeline.job.estimate.scenes import Scenes
from pipeline.job.estimate.trial import BATCHES, Trial, try_out
from pipeline.manifest.shards import cut
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import explained
from pipeline.telemetry.logs import log_to_terminal

log = logging.getLogger(__name__)


def estimate_job(
    config: Config,
    *,
    began: float | None = None,
    decoders: Decoders | None = None,
    every_byte: bool = False,
    run: str = "",
) -> Estimate:
    """Measure a few batches of what is left of a job, and tell what all of it would take.

    The arguments are those of :func:`pipeline.job.main.run_job`. Text features, exported models and a measured batch
    size go to their caches, where the job will find them; a trial's parts go to a temporary folder.

    Raises:
        PipelineError: what refuses the job refuses its estimate.
    """
    began = began or time.time()
    storage = open_storage(config.output.dir)
    config = replace(config, output=replace(config.output, dir=storage.url))
    with ExitStack() as opened:
        if decoders is not None:
            opened.callback(decoders.close)
        opened.enter_context(log_to_terminal(config.log, run))
        # Refuses a cluster for which something is not installed, and opens none.
        executor_of(config, storage, lambda: None, None)
        processes = processes_of(config)
        with explained("a temporary folder for the trial (TMPDIR)"):
            scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="clip-pipeline-")))
        scenes = Scenes(config, storage, scratch / "scenes")
        inputs = open_inputs(scenes.config)
        # Closed before the folder goes.
        crew = opened.enter_context(Inline(scenes.config, storage, decoders))
        prepared = crew.prepare(inputs)
        done, bad = commits.look(storage, prepared.plan, every_byte=every_byte)
        part = Part.of(config)
        shards = cut(inputs.manifest, config.manifest.shard_rows)
        left = [shard for shard in shards if part.has(shard.index) and shard.index not in done]
        startup = time.time() - began - scenes.seconds
        estimate = figures(
            _trial(crew, inputs, prepared, left, scenes, scratch / "trial") if left else None,
            left,
            done,
            prepared,
            processes,
            startup=startup,
            scenes=scenes.to_render,
            damaged=len(bad),
            busy=_busy(storage, part),
        )
        for line in lines(estimate):
            log.info("%s", line)
        for problem in estimate.problems:
            log.warning("%s", problem)
    if config.run.json:
        print(json.dumps(asdict(estimate), indent=2))
    return estimate


def _trial(
    crew: Inline, inputs: Inputs, prepared: Prepared, left: Sequence[Shard], scenes: Scenes, folder: Path
) -> Trial:
    config, manifest, streams = prepared.config, inputs.manifest, prepared.streams
    size, most = config.loader.batch_size, config.manifest.shard_rows
    form = part_format(
        manifest.schema,
        dim=prepared.dim,
        dtype=config.output.dtype,
        compression=config.output.compression,
        fingerprints=prepared.plan.fingerprints,
    )
    storage = LocalStorage(str(folder))
    crew.rehearse(
        Job(
            config=replace(config, output=replace(config.output, dir=storage.url)),
            manifest=manifest,
            spec=spec_of(config, inputs.checkpoint),
            form=form,
            bank=inputs.bank(),
        )
    )
    log.info("measuring a few batches; nothing is written to %s", config.output.dir)
    # The first is soon a part, of which the size is known; a batch of a large model may take a minute.
    first, others = min(most, streams * size), min(most, BATCHES * streams * size)
    return try_out(
        crew,
        in_shards(scenes.sample(spread(manifest, left, rows=size)), first=first, rows=others),
        least=-(-first // size),
        storage=storage,
        form=form,
        streams=streams,
        ahead=config.loader.prefetch + streams + 3,
    )


def _busy(storage: Storage, part: Part) -> str:
    """Who keeps a run out just now; empty if nobody does."""
    for folder, _, holder in lease.holders(storage):
        if folder == part.lease and holder is not None and holder.lives():
            return f"{storage.url} is held by {holder}"
    try:
        part.refuse_others(storage)
    except OutputBusy as error:
        return str(error)
    return ""
