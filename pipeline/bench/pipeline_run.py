"""Measure the pipeline: rounds over the stages and the whole job, one at a time.

This process holds the stages, and waits while the job runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pipeline.bench import command
from pipeline.bench.command import quoted
from pipeline.bench.pipeline_records import JobRounds, PipelineBench, StageRounds
from pipeline.config.compose import compose_config
from pipeline.config.schema import Config
from pipeline.core.child import Child
from pipeline.core.errors import PipelineError
from pipeline.core.processes import spent
from pipeline.core.records import Stage

# Number and size of the rendered scenes.
SCENES, SIZE = 256, (512, 384)


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of a measurement.

    ``images`` of the manifest, or scenes of ``size`` (width, height) without one; ``decoders`` besides the
    config's own; ``seconds`` of one stage in one round.
    """

    images: int | None
    size: tuple[int, int]
    decoders: tuple[str, ...]
    repeats: int
    seconds: float
    timeout: float


@dataclass(frozen=True, slots=True)
class _Entry:
    """A stage, with another decoder than the job's or not, or the job; and the figures of the rounds so far."""

    name: str
    measure: Callable[[], dict[str, float]]
    decoder: str | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)

    def column(self, name: str) -> tuple[float, ...]:
        return tuple(figures[name] for figures in self.rounds)

    def stage(self) -> StageRounds:
        return StageRounds(
            name=self.name,
            threads=int(self.rounds[0]["threads"]),
            images_per_second=self.column("images_per_second"),
            core_seconds=self.column("core_seconds"),
            decoder=self.decoder,
        )


def measure(overrides: Sequence[str], plan: Plan, out: Path, *, line: str) -> PipelineBench:
    """Measure the stages and the job of a config; ``line`` is the command line as typed.

    Raises:
        PipelineError: a stage or the job cannot run.
    """
    from pipeline.bench.report import model_title
    from pipeline.core.machine import versions

    started = datetime.now(UTC).isoformat(timespec="seconds")
    config = compose_config(list(overrides))
    with command.work_folder(out) as work:
        scenes = render(work, plan) if config.manifest.path is None else []
        source = "rendered scenes" if scenes else "images of the manifest"
        overrides = merged(overrides, [*defaults(config), *scenes])
        command.progress("decoding the images once, opening the model")
        from pipeline.bench.stages import NAMES, Stages

        others = [name for name in dict.fromkeys(plan.decoders) if name != config.images.decoder]
        given = compose_config(overrides)
        with Stages(given, work, plan.images, others) as stages:
            alone = [_Entry(name, partial(stages.measure, name, plan.seconds)) for name in map(str, NAMES)]
            decoders = [
                _Entry(str(Stage.DECODE), partial(stages.measure, Stage.DECODE, plan.seconds, other), other)
                for other in others
            ]
            of_job = merged(overrides, stages.images.overrides())
            job = _Entry("the job", partial(run_job, of_job, work, streams=stages.stream_count, timeout=plan.timeout))
            _rounds([*alone, *decoders, job], plan.repeats)
            images = stages.images.describe(source)
            machine = stages.machine()
    return PipelineBench(
        started=started,
        command=line,
        model=model_title(config),
        images=images,
        backend=f"{stages.encoder.name} {stages.encoder.precision}",
        decoder=config.images.decoder,
        labels=len(stages.bank.names),
        batch=stages.batch,
        streams=stages.stream_count,
        padding=padding(stages.images.count, given.manifest.shard_rows, stages.batch),
        repeats=plan.repeats,
        seconds=plan.seconds,
        machine=machine,
        versions=versions(),
        stages=tuple(entry.stage() for entry in alone),
        decoders=tuple(entry.stage() for entry in decoders),
        job=JobRounds(
            steady=job.column("images_per_second"),
            command=job.column("command"),
            startup=job.column("startup"),
            core_seconds=job.column("core_seconds"),
            peak_mib=max(job.column("peak_mib")),
            peak_decoder_mib=max(job.column("peak_decoder_mib")),
            peak_gpu_mib=max(job.column("peak_gpu_mib")),
        ),
    )


def render(work: Path, plan: Plan) -> list[str]:
    """Render scenes; return overrides that name their manifest."""
    from pipeline.engine.demo.folder import render_folder

    count, (width, height) = plan.images or SCENES, plan.size
    command.progress(f"rendering {count} scenes of {width} x {height} pixels")
    path = render_folder(work / "scenes", count, width=width, height=height)
    return [f"manifest.path={quoted(str(path))}", "manifest.id=id", "manifest.image=path", "manifest.keep=[]"]


def defaults(config: Config) -> list[str]:
    """Return overrides for labels, a batch size and shards where the config has none, and for embedding every image."""
    # Images of a manifest that is too short are repeated.
    more = ["images.repeats=each"]
    if not config.prompts.labels and config.prompts.path is None:
        from pipeline.engine.demo.folder import label_names

        more.append(f"prompts.labels=[{','.join(map(quoted, label_names()[:10]))}]")
    from pipeline.engine.batch_size import SIZES, is_default_of_cuda
    from pipeline.engine.shard_size import LEAST

    # The stages do not choose sizes as a job does.
    if not config.loader.batch_size or is_default_of_cuda(config):
        more.append(f"loader.batch_size={64 if not config.loader.batch_size else SIZES['cuda'][0]}")
    if not config.manifest.shard_rows:
        more.append(f"manifest.shard_rows={LEAST}")
    return more


def run_job(overrides: Sequence[str], work: Path, *, streams: int, timeout: float) -> dict[str, float]:
    """Run the whole job, which encodes ``streams`` batches side by side, in a process of its own.

    Raises:
        ChildEnded: it failed, or exceeded ``timeout`` seconds.
    """
    output = work / "dataset"
    own = [f"output.dir={quoted(str(output))}", "report.progress=none"]
    started = [sys.executable, "-m", "pipeline.run", *merged(overrides, own)]
    # A job would refuse, or resume, the output of an earlier round.
    shutil.rmtree(output, ignore_errors=True)
    before, began = spent(), time.perf_counter()
    with Child(started, log=work / "job.log", answers=False) as child:
        child.wait(timeout=timeout)
    seconds = time.perf_counter() - began
    report = json.loads((output / "_report.json").read_bytes())
    images, memory = report["images"], report["memory"]
    # Batches side by side end together; the clock starts with the first of them.
    first = min(images - 1, streams * report["batch_sizes"][0])
    return {
        "images_per_second": (images - first) / (report["wall_seconds"] - report["startup_seconds"]),
        "command": images / seconds,
        "startup": report["startup_seconds"],
        # The decoder processes of the stages wait meanwhile, and spend next to nothing.
        "core_seconds": (spent() - before).children / images,
        "peak_mib": memory["peak_rss_mib"],
        "peak_decoder_mib": memory.get("peak_decoder_mib", 0.0),
        "peak_gpu_mib": memory.get("peak_gpu_mib", 0.0),
    }


def padding(images: int, shard_rows: int, batch: int) -> float:
    """Return the share of padding among the encoder's rows, where no image fails."""
    whole, rest = divmod(images, shard_rows)
    batches = whole * -(-shard_rows // batch) + -(-rest // batch)
    return 1 - images / (batches * batch)


def merged(overrides: Sequence[str], more: Sequence[str]) -> list[str]:
    """Return the overrides with ``more``, which replace those of the same key."""
    keys = {text.partition("=")[0] for text in more}
    return [*(text for text in overrides if text.partition("=")[0] not in keys), *more]


def _rounds(entries: Sequence[_Entry], repeats: int) -> None:
    for number in range(repeats):
        for entry in command.rotated(entries, number):
            title = f"{entry.name} ({entry.decoder})" if entry.decoder else entry.name
            try:
                entry.rounds.append(entry.measure())
            except PipelineError as error:
                raise PipelineError(f"{title}: {error}") from error
            rate = entry.rounds[-1]["images_per_second"]
            command.progress(f"round {number + 1} of {repeats}: {title} {rate:,.1f} images/s")
