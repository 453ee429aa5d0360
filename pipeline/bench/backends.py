"""``python -m pipeline.bench backends``: every backend with one model, as a table, a page and JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.bench import command
from pipeline.bench.backends_run import Plan
from pipeline.bench.records import Bench
from pipeline.bench.selection import ROWS, read_batches, read_only
from pipeline.config.choices import BACKENDS
from pipeline.config.compose import compose_config
from pipeline.config.ranges import AUTO
from pipeline.config.schema import BackendConfig, Config, LoaderConfig
from pipeline.core.errors import ConfigError, Problem

# Packages whose versions decide the speed, besides those of every report.
PACKAGES = tuple(dict.fromkeys([name for info in BACKENDS.values() for name in info.packages] + ["onnx", "triton"]))
EXAMPLES = """\
examples:
  python -m pipeline.bench
  python -m pipeline.bench backends model=clip_vit_b32 model.weights=random
  python -m pipeline.bench backends --only torch:bf16,onnx_int8 --batches 1,32 manifest.path=photos.parquet
  python -m pipeline.bench backends --only torch:fp16:compiled,tensorrt backend.device=cuda:1

torch:fp32, uncompiled, is always measured: all others are compared with it. Each start of a row exports and compiles
anew, unless backend.artifacts names a folder to keep. Large models may need temporary files of several GiB, which are
within --out until the end. For the whole job and its stages, see python -m pipeline.bench pipeline --help.
exit codes: 0 done, 2 wrong config, manifest or machine, 1 interrupted or anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write the files, print the table; return the exit code."""

    def work(options: argparse.Namespace, line: str) -> str:
        config, plan = read(options)
        return write(measure(config, plan, options.out, line=line), options.out)

    return command.run(_parser(), arguments, work)


def read(options: argparse.Namespace) -> tuple[Config, Plan]:
    """The config and the plan of a command line.

    Raises:
        ConfigError: with all problems of both.
    """
    rows, problems = read_only(options.only) if options.only is not None else (list(ROWS), [])
    batches: list[int] | None = None
    if options.batches is not None:
        batches, found = read_batches(options.batches)
        problems += found
    problems += command.too_small(options, {"repeats": 1, "seconds": 0.0, "timeout": 1.0})
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


def measure(config: Config, plan: Plan, out: Path, *, line: str) -> Bench:
    """Run the plan; ``line`` is the command line as typed.

    Raises:
        PipelineError: the reference cannot run.
    """
    from pipeline.bench.backends_run import run
    from pipeline.bench.report import model_title
    from pipeline.core.machine import versions

    started = datetime.now(UTC).isoformat(timespec="seconds")
    if not config.prompts.labels and config.prompts.path is None:
        from pipeline.engine.demo.folder import label_names

        config = config.changed({"prompts.labels": label_names()})
    with command.work_folder(out) as work:
        results, facts = run(config, plan, work)
    return Bench(
        started=started,
        command=line,
        model=model_title(config),
        **{name: facts[name] for name in ("sample", "images", "labels", "machine")},
        repeats=plan.repeats,
        seconds=plan.seconds,
        versions=versions(PACKAGES),
        parity=config.parity,
        results=tuple(results),
    )


def write(bench: Bench, out: Path) -> str:
    """Write the three files; return the Markdown."""
    from pipeline.bench import report
    from pipeline.bench.backends_report import to_report

    return report.write(to_report(bench), out, name="backends")


def _set_by_row(config: Config) -> list[Problem]:
    """Problems of keys that differ from row to row, or from column to column, and are set for all."""
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
    parser = command.new_parser(
        "python -m pipeline.bench backends",
        "Measure every backend with one model on this machine: speed, memory, distance from torch fp32.",
        EXAMPLES,
    )
    parser.add_argument(
        "--only", metavar="ROWS", help="rows such as torch:fp32:compiled,onnx_int8:static; fewer take less memory"
    )
    parser.add_argument("--batches", metavar="SIZES", help="batch sizes (default: 1,8,32,64, on CUDA also 128,256)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds over all rows (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="seconds of one measurement, about (default: 2)"
    )
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="S", help="longest wait for one answer, exports too (900)"
    )
    return parser
