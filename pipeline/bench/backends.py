"""``python -m pipeline.bench backends``: every backend measured with one model, as a table, a page and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.bench.records import Bench, Row
from pipeline.bench.rounds import Plan, run
from pipeline.bench.rows import ROWS, read_batches, read_only
from pipeline.config import AUTO, BackendConfig, Config, LoaderConfig
from pipeline.errors import ConfigError, PipelineError, Problem
from pipeline.overrides import compose_config

# Packages whose versions decide the speed, beside those of every report.
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "onnx", "torchao", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "triton")
COMMAND = ("python", "-m", "pipeline.bench", "backends")
EXAMPLES = """\
examples:
  python -m pipeline.bench
  python -m pipeline.bench backends model=clip_vit_b32 model.weights=random
  python -m pipeline.bench backends --only torch:bf16,onnx_int8 --batches 1,32 manifest.path=photos.parquet
  python -m pipeline.bench backends --only torch:fp16:compiled,tensorrt backend.device=cuda:1

torch:fp32, uncompiled, is always there: all others are compared with it. Each start of a row exports and
compiles anew, unless backend.artifacts names a folder to keep. Temporary files of several GiB may be
needed for large models; they lie in --out while it runs.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write, print the table; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_intermixed_args(given)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config, plan = read(options)
        bench = measure(config, plan, options.out, command=shlex.join([*COMMAND, *given]))
        print(write(bench, options.out), end="")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def read(options: argparse.Namespace) -> tuple[Config, Plan]:
    """The config and the plan of a command line.

    Raises:
        ConfigError: with every problem of both.
    """
    rows, problems = read_only(options.only) if options.only is not None else (list(ROWS), [])
    batches: list[int] | None = None
    if options.batches is not None:
        batches, found = read_batches(options.batches)
        problems += found
    for name, lowest in (("repeats", 1), ("seconds", 0.0), ("timeout", 1.0)):
        value = getattr(options, name)
        if not lowest <= value < float("inf"):
            problems.append(Problem(f"--{name}", value, f"must be a number from {lowest} on"))
    try:
        config = compose_config(options.overrides)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    problems += _set_by_row(config)
    if problems:
        raise ConfigError(problems)
    return config, Plan(
        rows=rows, batches=batches, repeats=options.repeats, seconds=options.seconds, timeout=options.timeout
    )


def measure(config: Config, plan: Plan, out: Path, *, command: str) -> Bench:
    """Run the plan; ``command`` is what was typed.

    Raises:
        PipelineError: the reference cannot run.
    """
    from pipeline.report.summary import versions

    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out, prefix=".work-", ignore_cleanup_errors=True)
    except OSError as error:
        raise PipelineError(f"--out {out}: {error}") from error
    with folder as work:
        results, facts = run(config, plan, Path(work).resolve(), say=_say)
    weights = "random weights" if config.model.weights == "random" else "pretrained"
    return Bench(
        started=started,
        command=command,
        model=f"{config.model.name} ({weights})",
        sample=facts["sample"],
        images=facts["images"],
        labels=facts["labels"],
        repeats=plan.repeats,
        seconds=plan.seconds,
        machine=facts["machine"],
        versions={**versions(), **_versions()},
        parity=config.parity,
        results=tuple(results),
    )


def write(bench: Bench, out: Path) -> str:
    """Write the three files; returns the Markdown."""
    from pipeline.bench import page, tables
    from pipeline.storage.local import LocalStorage

    text = tables.to_markdown(bench)
    storage = LocalStorage(str(out))
    storage.write("backends.json", (json.dumps(dataclasses.asdict(bench), indent=1) + "\n").encode())
    storage.write("backends.html", page.to_html(bench))
    storage.write("backends.md", text.encode())
    _say(f"written: {out}/backends.md, backends.json, backends.html")
    return text


def _set_by_row(config: Config) -> list[Problem]:
    """Keys that the table itself goes through."""
    backend, default, problems = config.backend, BackendConfig(), []
    for name in ("name", "precision", "compile", "quantization"):
        value = getattr(backend, name)
        if value != getattr(default, name):
            key = "backend" if name == "name" else f"backend.{name}"
            problems.append(Problem(key, value, "goes by row here", "choose rows with --only torch:bf16,onnx_int8"))
    if config.loader.batch_size != LoaderConfig().batch_size:
        size = config.loader.batch_size or AUTO
        problems.append(Problem("loader.batch_size", size, "goes by column here", "choose with --batches"))
    return problems


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=" ".join(COMMAND),
        description="Measure every backend with one model on this machine: speed, memory, distance from torch fp32.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for the job")
    parser.add_argument("--only", metavar="ROWS", help=f"rows such as {','.join(_short(row) for row in ROWS[1:4])}")
    parser.add_argument("--batches", metavar="SIZES", help="batch sizes (default: 1,8,32,64, on CUDA also 128,256)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds over all rows (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="seconds of one measurement, about (default: 2)"
    )
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="S", help="longest wait for one answer, exports too (900)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    return parser


def _short(row: Row) -> str:
    return ":".join([row.backend, row.precision, *([row.compile] if row.compile != "none" else [])])
