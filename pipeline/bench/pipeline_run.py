"""Measure the pipeline: rounds over the stages and the whole job, one at a time.

One child process holds the stages, and waits while the job runs in another one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.bench.child import Child
from pipeline.bench.command import progress
from pipeline.bench.pipeline_records import JobRounds, StageRounds
from pipeline.config.compose import compose_config
from pipeline.core.errors import PipelineError
from pipeline.core.processes import spent
from pipeline.core.records import Stage

STAGES = ("rows", Stage.READ, Stage.DECODE, Stage.COPY, Stage.ENCODE, Stage.LABEL, Stage.WRITE)


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
class Measured:
    """The rounds of the stages, of other decoders and of the job, and the facts of the machine and the images."""

    stages: tuple[StageRounds, ...]
    decoders: tuple[StageRounds, ...]
    job: JobRounds
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A stage or the job: one measurement, and the answers of the rounds so far."""

    title: str
    measure: Callable[[], dict[str, Any]]
    answers: list[dict[str, Any]] = field(default_factory=list)

    def column(self, name: str) -> tuple[float, ...]:
        return tuple(answer[name] for answer in self.answers)


def run(overrides: Sequence[str], plan: Plan, work: Path) -> Measured:
    """Measure the stages and the job of a config.

    Raises:
        PipelineError: one of them cannot run.
    """
    config = compose_config(list(overrides))
    decoders = [name for name in dict.fromkeys(plan.decoders) if name != config.images.decoder]
    with closing(Child([sys.executable, "-m", "pipeline.bench.worker"], log=work / "stages.log")) as child:
        progress("decoding the images once, opening the model")
        images = {"work": str(work), "images": plan.images, "decoders": decoders}
        child.ask({"kind": "stages", "config": asdict(config), **images}, timeout=plan.timeout)
        facts = child.ask({"do": "facts"}, timeout=plan.timeout)

        def stage(name: str, decoder: str | None = None) -> _Entry:
            request = {"do": "measure", "stage": name, "seconds": plan.seconds, "decoder": decoder}
            title = f"{name} ({decoder})" if decoder else name
            return _Entry(title, partial(child.ask, request, timeout=plan.timeout))

        stages = {str(name): stage(str(name)) for name in STAGES}
        others = {name: stage(Stage.DECODE, name) for name in decoders}
        job = _Entry("the job", partial(run_job, overrides, facts, work, timeout=plan.timeout))
        _measure([*stages.values(), *others.values(), job], plan.repeats)
    return Measured(
        stages=tuple(_stage_rounds(name, entry) for name, entry in stages.items()),
        decoders=tuple(_stage_rounds(Stage.DECODE, entry, decoder=name) for name, entry in others.items()),
        job=JobRounds(
            steady=job.column("images_per_second"),
            command=job.column("command"),
            startup=job.column("startup"),
            core_seconds=job.column("core_seconds"),
            peak_mib=max(job.column("peak_mib")),
            peak_decoder_mib=max(job.column("peak_decoder_mib")),
            peak_gpu_mib=max(job.column("peak_gpu_mib")),
        ),
        facts=facts,
    )


def run_job(overrides: Sequence[str], facts: Mapping[str, Any], work: Path, *, timeout: float) -> dict[str, Any]:
    """Run the whole job on the copied manifest, in a process of its own.

    Raises:
        Died: it failed, or exceeded ``timeout`` seconds.
    """
    output = work / "dataset"
    own = [f"manifest.{key}={quoted(str(value))}" for key, value in facts["manifest"].items() if key != "keep"]
    own += ["manifest.keep=[]", f"output.dir={quoted(str(output))}", "report.progress=none"]
    command = [sys.executable, "-m", "pipeline.run", *merged(overrides, own)]
    # A job would refuse, or resume, the output of an earlier round.
    shutil.rmtree(output, ignore_errors=True)
    before, began = spent(), time.perf_counter()
    with closing(Child(command, log=work / "job.log", answers=False)) as child:
        child.wait(timeout=timeout)
    seconds = time.perf_counter() - began
    report = json.loads((output / "_report.json").read_bytes())
    images, memory = report["images"], report["memory"]
    # Batches side by side end together; the clock starts with the first of them.
    first = min(images - 1, facts["streams"] * report["batch_sizes"][0])
    return {
        "images_per_second": (images - first) / (report["wall_seconds"] - report["startup_seconds"]),
        "command": images / seconds,
        "startup": report["startup_seconds"],
        # The other child waits meanwhile, and spends next to nothing.
        "core_seconds": (spent() - before).children / images,
        "peak_mib": memory["peak_rss_mib"],
        "peak_decoder_mib": memory.get("peak_decoder_mib", 0.0),
        "peak_gpu_mib": memory.get("peak_gpu_mib", 0.0),
    }


def padding(images: int, shard_rows: int, batch: int) -> float:
    """The share of padding among the encoder's rows, where no image fails."""
    whole, rest = divmod(images, shard_rows)
    batches = whole * -(-shard_rows // batch) + -(-rest // batch)
    return 1 - images / (batches * batch)


def merged(overrides: Sequence[str], more: Sequence[str]) -> list[str]:
    """The overrides with ``more``, which replace those of the same key."""
    keys = {text.partition("=")[0] for text in more}
    return [*(text for text in overrides if text.partition("=")[0] not in keys), *more]


def quoted(text: str) -> str:
    """A value in the quotes of Hydra's grammar, with any character in it."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return f"'{escaped}'"


def _measure(entries: Sequence[_Entry], repeats: int) -> None:
    for number in range(repeats):
        # Each round begins with another entry, so that none always follows the same one.
        turn = number * len(entries) // repeats
        for entry in [*entries[turn:], *entries[:turn]]:
            try:
                entry.answers.append(entry.measure())
            except PipelineError as error:
                raise PipelineError(f"{entry.title}: {error}") from error
            rate = entry.answers[-1]["images_per_second"]
            progress(f"round {number + 1} of {repeats}: {entry.title} {rate:,.1f} images/s")


def _stage_rounds(name: str, entry: _Entry, decoder: str | None = None) -> StageRounds:
    return StageRounds(
        name=name,
        threads=entry.answers[0]["threads"],
        images_per_second=entry.column("images_per_second"),
        core_seconds=entry.column("core_seconds"),
        decoder=decoder,
    )
