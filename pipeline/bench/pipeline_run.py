"""The order of a benchmark of the pipeline: rounds over stages, runs of the job and other tools, one at a time.

The stages live in one child, which waits while the others run, each in a new process.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bench import baselines
from pipeline.bench.pipeline_records import PipelineBench, Plan, RunRounds, StageRounds, merged, quoted
from pipeline.bench.subprocesses import run_command
from pipeline.bench.worker_process import Child
from pipeline.config.compose import compose_config
from pipeline.config.schema import Config
from pipeline.core.errors import PipelineError
from pipeline.core.records import Stage

STAGES = ("rows", Stage.READ, Stage.DECODE, Stage.COPY, Stage.ENCODE, Stage.LABEL, Stage.WRITE)
Say = Callable[[str], None]


@dataclass(slots=True)
class _Entry:
    """One turn of every round: what does it, and what came of it so far."""

    title: str
    turn: Callable[[int], dict[str, Any]]
    unit: str = "images_per_second"
    answers: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    def column(self, name: str) -> tuple[float, ...]:
        return tuple(answer[name] for answer in self.answers)

    def most(self, name: str) -> float:
        return max((answer.get(name, 0.0) for answer in self.answers), default=0.0)


def run(overrides: Sequence[str], plan: Plan, work: Path, *, say: Say) -> PipelineBench:
    """Measure everything; in ``images`` an @ stands for what the images are.

    Raises:
        PipelineError: the stages or the job as given cannot run.
    """
    config = compose_config(list(overrides))
    decoders = [name for name in dict.fromkeys(plan.decoders) if name != config.images.decoder]
    command = [sys.executable, "-m", "pipeline.bench.worker"]
    with closing(Child(command, complaints=work / "stages.log", environment={})) as child:
        say("decoding the images once, opening the model" + (", saving it for the other tools" if plan.tools else ""))
        setup = {"config": dataclasses.asdict(config), "work": str(work), "images": plan.images, "decoders": decoders}
        child.ask({"kind": "stages", **setup, "tools": plan.tools}, timeout=plan.timeout)
        facts = child.ask({"do": "facts"}, timeout=plan.timeout)
        job = _Job(work, facts, plan.timeout)

        def stage(name: str, decoder: str | None) -> Callable[[int], dict[str, Any]]:
            request = {"do": "measure", "stage": name, "seconds": plan.seconds, "decoder": decoder}
            return lambda number: child.ask(request, timeout=plan.timeout)

        stages = [_Entry(str(name), stage(str(name), None)) for name in STAGES]
        others = [_Entry(f"decode ({name})", stage(Stage.DECODE, name)) for name in decoders]
        ours = []
        for more in ((), *plan.ours):
            every = merged(overrides, more)
            title = " ".join(more) or "as given"
            ours.append(_Entry(f"the job, {title}", job.turn(every), "steady"))
            if more:
                say(f"opening once: {title}")
                child.ask({"do": "warm", "config": dataclasses.asdict(compose_config(every))}, timeout=plan.timeout)
        theirs = [_Entry(name, job.tool(name, plan)) for name in baselines.installed()] if plan.tools else []
        for entry in theirs:
            entry.unit = "steady"
        _rounds([*stages, *others, *ours, *theirs], plan.repeats, say)
        for entry in (*stages, *others, ours[0]):
            if entry.failure is not None:
                raise PipelineError(f"{entry.title}: {entry.failure}")
    return _bench(config, plan, facts, stages, others, ours, theirs)


def _rounds(entries: Sequence[_Entry], repeats: int, say: Say) -> None:
    for number in range(repeats):
        # Each round begins elsewhere, so that nothing always follows the same.
        turn = number * len(entries) // repeats
        for entry in [*entries[turn:], *entries[:turn]]:
            if entry.failure is not None:
                continue
            try:
                entry.answers.append(entry.turn(number))
            except PipelineError as error:
                entry.failure, entry.answers = str(error), []
                say(f"round {number + 1} of {repeats}: {entry.title} failed: {error}")
                continue
            say(f"round {number + 1} of {repeats}: {entry.title} {entry.answers[-1][entry.unit]:,.1f} images/s")


class _Job:
    """Runs of the job and of other tools on the copied images."""

    def __init__(self, work: Path, facts: dict[str, Any], timeout: float) -> None:
        self._work, self._facts, self._timeout = work, facts, timeout

    def turn(self, overrides: Sequence[str]) -> Callable[[int], dict[str, Any]]:
        """A run of the job with ``overrides`` on the copied manifest."""
        manifest, output = self._facts["manifest"], self._work / "dataset"
        own = [f"manifest.{key}={quoted(str(value))}" for key, value in manifest.items() if key != "keep"]
        own += ["manifest.keep=[]", f"output.dir={quoted(str(output))}", "report.progress=none"]
        command = [sys.executable, "-m", "pipeline.run", *merged(overrides, own)]

        def run(number: int) -> dict[str, Any]:
            # A run that failed may have left its own, which another would refuse, or go on with.
            shutil.rmtree(output, ignore_errors=True)
            ran = run_command(command, log=self._work / "job.log", timeout=self._timeout)
            report = json.loads((output / "_report.json").read_bytes())
            images, memory = report["images"], report["memory"]
            # Streams end their first batches together; the clock starts with the first of them.
            wanted = report["config"]["backend"]["streams"]
            on_cpu = report["machine"]["device"] == "cpu"
            streams = (wanted or self._facts["streams"]) if on_cpu else 1
            first = min(images - 1, streams * report["batch_sizes"][0])
            return {
                "steady": (images - first) / (report["wall_seconds"] - report["startup_seconds"]),
                "command": images / ran.seconds,
                "startup": report["startup_seconds"],
                "core_seconds": ran.core_seconds / images,
                "peak_mib": memory["peak_rss_mib"],
                "peak_decoder_mib": memory.get("peak_decoder_mib", 0.0),
                "peak_gpu_mib": memory.get("peak_gpu_mib", 0.0),
            }

        return run

    def tool(self, name: str, plan: Plan) -> Callable[[int], dict[str, Any]]:
        """A run of another tool on the same files."""
        work, device = self._work, str(self._facts["machine"]["device"])
        dtypes = {"bf16": "bfloat16", "fp16": "float16", "int8": "float16", "fp8": "float16"}
        asked = {
            "tool": name,
            "model": str(work / "model"),
            "files": str(work / "files.json"),
            "prompts": json.loads((work / "prompts.json").read_text()),
            "batch": plan.tool_batch,
            "workers": self._facts["machine"]["cores"],
            "device": device,
            "dtype": "float32" if device == "cpu" else dtypes.get(self._facts["precision"], "float32"),
            "out": str(work / "tool.parquet"),
        }
        request, answer = work / "request.json", work / "answer.json"

        def run(number: int) -> dict[str, Any]:
            request.write_text(json.dumps(asked))
            command = [sys.executable, "-m", "pipeline.bench.baselines", str(request), str(answer)]
            ran = run_command(command, log=work / "tool.log", timeout=self._timeout)
            told, images = json.loads(answer.read_text()), self._facts["images"]
            first = min(images - 1, plan.tool_batch)
            return {
                "steady": (images - first) / (told["written"] - told["first"]),
                "command": images / ran.seconds,
                "startup": told["first"] - ran.began,
                "core_seconds": ran.core_seconds / images,
                "peak_mib": told["peak_mib"],
            }

        return run


def _bench(
    config: Config,
    plan: Plan,
    facts: dict[str, Any],
    stages: Sequence[_Entry],
    others: Sequence[_Entry],
    ours: Sequence[_Entry],
    theirs: Sequence[_Entry],
) -> PipelineBench:
    def rounds(entry: _Entry, name: str, chosen: str | None) -> StageRounds:
        return StageRounds(
            name=name,
            threads=entry.answers[0]["threads"],
            images_per_second=entry.column("images_per_second"),
            core_seconds=entry.column("core_seconds"),
            decoder=chosen,
        )

    def whole(entry: _Entry, title: str, note: str) -> RunRounds:
        return RunRounds(
            title=title,
            note=note,
            steady=entry.column("steady"),
            command=entry.column("command"),
            startup=entry.column("startup"),
            core_seconds=entry.column("core_seconds"),
            peak_mib=entry.most("peak_mib"),
            peak_decoder_mib=entry.most("peak_decoder_mib"),
            peak_gpu_mib=entry.most("peak_gpu_mib"),
            failure=entry.failure,
        )

    left_out = f", {facts['bad']} bad ones left out" if facts["bad"] else ""
    return PipelineBench(
        started="",
        command="",
        model=f"{config.model.name} ({'random weights' if config.model.weights == 'random' else 'pretrained'})",
        images=f"{facts['images']:,} @ (median {facts['megapixels']:.2f} megapixels, {facts['kilobytes']:,.0f} kB"
        f"{left_out}; {facts['held']:,} in memory for the stages alone)",
        backend=facts["backend"],
        decoder=config.images.decoder,
        labels=facts["labels"],
        batch=facts["batch"],
        streams=facts["streams"],
        padding=padding(facts["images"], config.manifest.shard_rows, facts["batch"]),
        repeats=plan.repeats,
        seconds=plan.seconds,
        machine=facts["machine"],
        versions={},
        stages=tuple(rounds(entry, entry.title, None) for entry in stages),
        decoders=tuple(rounds(entry, Stage.DECODE, entry.title.split("(")[1][:-1]) for entry in others),
        ours=tuple(whole(entry, entry.title, "") for entry in ours),
        tools=tuple(whole(entry, entry.title, baselines.NOTES[entry.title]) for entry in theirs),
    )


def padding(images: int, shard_rows: int, batch: int) -> float:
    """The share of the encoder's places that hold no image of their own, where all images are good."""
    whole, rest = divmod(images, shard_rows)
    batches = whole * -(-shard_rows // batch) + -(-rest // batch)
    return 1 - images / (batches * batch)
