"""``python -m pipeline.bench gpu``: everything that a card has to prove, in the minutes that one has it."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pipeline.bench import command
from pipeline.bench.gpu_records import GROUPS, GpuBench, Outcome
from pipeline.core.cli import command_parser
from pipeline.core.errors import BackendUnavailable, ConfigError, PipelineError, Problem

EXAMPLES = """\
examples:
  python -m pipeline.bench gpu --minutes 9 --out results
  python -m pipeline.bench gpu --minutes 3 --only pipeline,forward
  python -m pipeline.bench gpu --device cpu --rows 64

Needs no network and no extras: what is not installed is a row that says so. Each step writes STEP.json into --out as
soon as it ends; gpu.md, gpu.html, gpu.json and gpu.png come last, also after an interruption or when the time is up.
Temporary files (6 GiB for 65,536 rows) are within --out until the end.
exit codes: 0 done, also with rows that failed, 2 no GPU or wrong options, 1 interrupted or anything else
"""
# Packages whose versions decide the speed, besides those of every report.
PACKAGES = ("triton", "simplejpeg", "nvidia-nvimgcodec-cu13", "torchao", "onnxruntime-gpu", "tensorrt", "distributed")
ROWS = {"cuda": 65_536, "cpu": 64}
_FACTS = ("uuid", "name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the steps, write the files, print the table; return the exit code."""
    return command.run(_parser(), arguments, lambda options, line: measure(options, line=line))


def measure(options: argparse.Namespace, *, line: str) -> str:
    """Run the steps, write the files, and print the Markdown; ``line`` is the command line as typed.

    Raises:
        ConfigError: an option is wrong.
        BackendUnavailable: there is no GPU.
        PipelineError: it was interrupted, after all of that.
    """
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    groups = _check(options)
    facts = card_facts()
    if options.device == "cuda":
        _require_gpu()
    from pipeline.bench import report
    from pipeline.bench.gpu_run import Budget, run_step, run_steps, write
    from pipeline.bench.gpu_steps import Plan, steps
    from pipeline.bench.gpu_table import to_report
    from pipeline.core.machine import machine, versions
    from pipeline.core.processes import cores

    out: Path = options.out
    with command.work_folder(out) as work:
        logs = out / "logs"
        logs.mkdir(exist_ok=True)
        rows = options.rows or ROWS[options.device]
        every = steps(Plan(options.device, rows, out, work, names_of_card(facts)))
        reading = not {"pipeline", "backends", "cluster"}.isdisjoint(groups)
        chosen = [step for step in every if step.group in groups or (step.name == "images" and reading)]
        # Of an earlier run into the same folder.
        for name in ("tests.xml", "gpu.png", *(f"{step.name}.json" for step in every)):
            (out / name).unlink(missing_ok=True)
        budget = Budget(60 * options.minutes, began)
        run = partial(run_step, logs=logs)
        outcomes, interrupted = run_steps(chosen, budget, run, keep=lambda outcome: write(outcome, out))
        card = facts[0] if facts and options.device == "cuda" else {}
        bench = GpuBench(
            started=started,
            command=line,
            minutes=options.minutes,
            rows=rows,
            machine={**machine("cpu", cores()), **card, "device": options.device},
            versions=versions(PACKAGES),
            outcomes=(*outcomes, picture(tuple(outcomes), out)),
        )
        # Before the temporary files are removed, which takes seconds.
        print(report.write(to_report(bench), out, name="gpu"), end="", flush=True)
    if interrupted:
        raise PipelineError(f"interrupted; {out}/gpu.md has the steps that were done")
    return ""


def picture(outcomes: tuple[Outcome, ...], out: Path) -> Outcome:
    """Draw the best run over time into ``gpu.png``; return the row that says so."""
    from importlib.util import find_spec

    from pipeline.bench.gpu_table import best_run, draw

    title, name = "a picture of the fastest job", "picture"
    best = best_run(outcomes)
    if best is None or not best.figures.get("curve"):
        return Outcome(name, "pipeline", title, "absent", "no job was long enough to have samples")
    if find_spec("matplotlib") is None:
        return Outcome(name, "pipeline", title, "absent", "matplotlib is not installed")
    draw(best, out / "gpu.png")
    return Outcome(name, "pipeline", title, "done", figures={"of": best.name})


def card_facts() -> list[dict[str, str]]:
    """Return what the driver's own tool says of every GPU; empty where it is not there."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_FACTS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in said.splitlines()]
    names = ["gpu" if name == "name" else name for name in _FACTS]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def names_of_card(facts: Sequence[dict[str, str]]) -> tuple[str, str]:
    """The first GPU by two names for CUDA_VISIBLE_DEVICES.

    CUDA reads a list of names up to the first one of another kind: a process that is given both sees one GPU, and
    ``cluster=cuda`` counts two.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    uuids = [row["uuid"] for row in facts]
    if given.isdecimal():
        return given, uuids[int(given)] if int(given) < len(uuids) else given
    numbers = [str(number) for number, uuid in enumerate(uuids) if uuid.startswith(given)]
    return given, numbers[0] if numbers else given


def _check(options: argparse.Namespace) -> list[str]:
    problems = command.too_small(options, {"minutes": 0.5, "rows": 16})
    groups = options.only.split(",") if options.only is not None else list(GROUPS)
    allowed = f"must be some of {', '.join(GROUPS)}"
    problems += [Problem("--only", name, allowed) for name in groups if name not in GROUPS]
    if problems:
        raise ConfigError(problems)
    return groups


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailable(
            f"torch {torch.__version__} sees no GPU, and python -m pipeline.bench gpu measures one; --device cpu "
            "rehearses the steps on this machine with a tiny model"
        )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.bench gpu",
        "Measure a GPU within some minutes: whole jobs, the gpu tests, the forward, the backends, clusters.",
        EXAMPLES,
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="M", help="time for everything, the table too (default: 9)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-gpu"), help="folder (outputs/bench-gpu)")
    parser.add_argument("--rows", type=int, metavar="N", help="images of the largest job (65536; with --device cpu 64)")
    parser.add_argument("--device", choices=tuple(ROWS), default="cuda", help="cpu: a rehearsal with a tiny model")
    parser.add_argument("--only", metavar="GROUPS", help=f"of {','.join(GROUPS)}")
    return parser
