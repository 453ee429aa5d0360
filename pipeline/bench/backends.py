"""``python -m pipeline.bench backends``: every backend measured with one model, as a table, a page and JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.bench import cli
from pipeline.bench.backends_run import Plan, run
from pipeline.bench.cli import answer, say, work_folder
from pipeline.bench.records import Bench, Row
from pipeline.bench.selection import ROWS, read_batches, read_only
from pipeline.config.compose import compose_config
from pipeline.config.ranges import AUTO
from pipeline.config.schema import BackendConfig, Config, LoaderConfig
from pipeline.core.errors import ConfigError, Problem

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
needed for large models; they lie in --out while it runs. The whole job, its stages and other tools: see
python -m pipeline.bench pipeline --help.
exit codes: 0 done, 2 wrong config, manifest or machine, 1 interrupted or anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write, print the table; returns the exit code."""

    def work(options: argparse.Namespace, command: str) -> str:
        config, plan = read(options)
        return write(measure(config, plan, options.out, command=command), options.out)

    return answer(_parser(), arguments, work)


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
    with work_folder(out) as work:
        results, facts = run(config, plan, work, say=say)
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
        versions=versions(PACKAGES),
        parity=config.parity,
        results=tuple(results),
    )


def write(bench: Bench, out: Path) -> str:
    """Write the three files; returns the Markdown."""
    from pipeline.bench import backends_report, page

    text = backends_report.to_markdown(bench)
    cli.write("backends", bench, out, markdown=text, html=page.to_html(bench))
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
