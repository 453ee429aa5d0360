"""``run.dry=true``: an estimate of a job from a few of its batches; nothing is written to its output."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import OutputBusy
from pipeline.core.records import Piece
from pipeline.dataset import commits, lease
from pipeline.engine.demo.notes import log_notes
from pipeline.engine.engine import Engine
from pipeline.engine.loop import Job
from pipeline.engine.prepare import Prepared, job_of
from pipeline.images.pool.pool import Decoders
from pipeline.job.cluster.executor import executor_of
from pipeline.job.cluster.inline import Inline
from pipeline.job.cluster.part import Part
from pipeline.job.estimate.extrapolate import Work, figures
from pipeline.job.estimate.record import Estimate, lines
from pipeline.job.estimate.sample import Scenes, expected, in_shards, spread
from pipeline.job.estimate.scaling import processes_of
from pipeline.job.estimate.trial import BATCHES, Limits, Sample, Trial, measure
from pipeline.manifest.manifest import Manifest
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.local import temporary_folder
from pipeline.telemetry.logs import log_to_terminal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Manifest and engine of a job, trial of it (None where no shard is left), and the estimate that follows."""

    manifest: Manifest
    prepared: Prepared
    trial: Trial | None
    estimate: Estimate


def estimate_job(
    config: Config,
    *,
    began: float | None = None,
    decoders: Decoders | None = None,
    run: str = "",
    limits: Limits | None = None,
) -> Estimate:
    """Measure a few batches of a job, and log and return an estimate of all of it.

    Text features, exported models, a measured batch size and rates of backends go to their caches, where the job finds
    them; with ``backend=auto`` all backends are measured.

    Args:
        config: config of the job.
        began: time of the command, in seconds since the epoch; now by default.
        decoders: decoder processes that were started before.
        run: id of the run in the lines of the log.
        limits: length of the trial.

    Raises:
        PipelineError: the errors of the job itself.
    """
    with ExitStack() as opened:
        if decoders is not None:
            opened.callback(decoders.close)
        opened.enter_context(log_to_terminal(config.log, run))
        log_notes(config)
        estimate = rehearse(config, began or time.time(), limits or Limits(), decoders).estimate
        for line in lines(estimate):
            log.info("%s", line)
        for problem in estimate.problems:
            log.warning("%s", problem)
    if config.run.json:
        print(json.dumps(asdict(estimate), indent=2))
    return estimate


def rehearse(config: Config, began: float, limits: Limits, decoders: Decoders | None = None) -> Rehearsal:
    """Prepare a job, embed a sample of it into a temporary folder, and extrapolate.

    The caller closes ``decoders``.

    Raises:
        PipelineError: the errors of the job itself.
    """
    storage = open_storage(config.output.dir)
    config = config.changed({"output.dir": storage.url})
    # Refuses a cluster for which something is not installed, and starts none.
    executor_of(config, storage, lambda: None)
    processes = processes_of(config)
    with ExitStack() as opened:
        scratch = opened.enter_context(temporary_folder("a temporary folder for the trial"))
        scenes = Scenes(config, storage, scratch / "scenes")
        executor = Inline(storage)
        # Closed before the folder is removed.
        engine = opened.enter_context(Engine(scenes.config, decoders=decoders))
        engine.start()
        engine.begin(storage)
        executor.prepare(engine)
        prepared = executor.settle()
        done, damaged = commits.look(storage, prepared.plan, every_byte=False)
        part = Part.of(config)
        shards = list(expected(engine.manifest, prepared.config.manifest.shard_rows))
        left = [shard for shard in shards if part.has(shard.index) and shard.index not in done]
        startup = time.time() - began - scenes.seconds
        trial = None
        if left:
            log.info("measuring a few batches; nothing is written to %s", config.output.dir)
            runs = spread(engine.manifest, left, rows=prepared.config.loader.batch_size)
            job = _job(engine, prepared, scratch / "trial")
            executor.rehearse(job)
            trial = measure(executor, _sample(prepared, scenes.sample(runs)), job, limits)
        work = Work(
            left=left,
            done=done,
            damaged=len(damaged),
            startup_seconds=startup,
            scenes_seconds=scenes.seconds_to_render,
            processes=processes,
            busy=_busy(storage, part),
            expected_rows=sum(done[each.index].rows if each.index in done else each.rows for each in shards),
        )
        return Rehearsal(engine.manifest, prepared, trial, figures(trial, work, prepared))


def _job(engine: Engine, prepared: Prepared, folder: Path) -> Job:
    """Return the job with its output in ``folder``."""
    job = job_of(engine, prepared)
    return replace(job, config=job.config.changed({"output.dir": str(folder)}))


def _sample(prepared: Prepared, runs: Sequence[Piece]) -> Sample:
    """Return the shards of a trial.

    The first is small, so that it is soon a part whose size is known: a batch of a large model may take a minute.
    """
    loader, streams = prepared.config.loader, prepared.streams
    batch, most = loader.batch_size, prepared.config.manifest.shard_rows
    first, others = min(most, streams * batch), min(most, BATCHES * streams * batch)
    shards = in_shards(runs, first=first, rows=others)
    return Sample(shards, least=-(-first // batch), streams=streams, ahead=loader.prefetch + streams + 3)


def _busy(storage: Storage, part: Part) -> str:
    """Return a message about the run that holds the output now, or an empty string."""
    for folder, _, holder in lease.holders(storage):
        if folder == part.lease and holder is not None and holder.lives():
            return f"{storage.url} is held by {holder}"
    try:
        part.refuse_others(storage)
    except OutputBusy as error:
        return str(error)
    return ""
