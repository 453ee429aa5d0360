"""``python -m pipeline.bench pipeline``: each stage of the job alone, their bound, and the whole job."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench import command
from pipeline.bench.pipeline_records import PipelineBench
from pipeline.bench.pipeline_run import SIZE, Plan, measure
from pipeline.config.compose import compose_config
from pipeline.config.ranges import AUTO
from pipeline.config.validate import CHOICES
from pipeline.core.errors import ConfigError, Problem

EXAMPLES = """\
examples:
  python -m pipeline.bench pipeline
  python -m pipeline.bench pipeline model=clip_vit_b32 model.weights=random --images 256 --size 4000x3000
  python -m pipeline.bench pipeline model=clip_vit_b32 manifest.path=photos.parquet --decoders exact,fast,scaled

Images that cannot be decoded are left out. Temporary files are within --out until the end.
exit codes: 0 done, 2 wrong config, manifest or machine, 1 interrupted or anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write the files, print the table; return the exit code."""

    def work(options: argparse.Namespace, line: str) -> str:
        overrides, plan = read(options)
        return write(measure(overrides, plan, options.out, line=line), options.out)

    return command.run(_parser(), arguments, work)


def read(options: argparse.Namespace) -> tuple[list[str], Plan]:
    """Return the overrides and the plan of a command line.

    Raises:
        ConfigError: with all problems of both.
    """
    problems = command.too_small(options, {"repeats": 1, "seconds": 0.0, "timeout": 1.0, "images": 1})
    size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", options.size or "{}x{}".format(*SIZE))
    if size is None:
        problems.append(Problem("--size", options.size, "must be WIDTHxHEIGHT in pixels, such as 512x384"))
    decoders = tuple(filter(None, (options.decoders or "").split(",")))
    known = CHOICES["images.decoder"]
    allowed = f"is no decoder; choose among {', '.join(known)}"
    problems += [Problem("--decoders", name, allowed) for name in decoders if name not in known]
    try:
        config = compose_config(options.overrides)
        if config.backend.name == AUTO:
            allowed = "may take one for the stages and another for the job; name a backend"
            problems.append(Problem("backend", AUTO, allowed, "such as backend=torch"))
        if config.manifest.path is not None and options.size is not None:
            problems.append(Problem("--size", options.size, "is of rendered scenes, and manifest.path names images"))
    except ConfigError as error:
        problems += error.problems
    if problems or size is None:
        raise ConfigError(problems)
    width, height = map(int, size.groups())
    plan = Plan(options.images, (width, height), decoders, options.repeats, options.seconds, options.timeout)
    return list(options.overrides), plan


def write(bench: PipelineBench, out: Path) -> str:
    """Write the three files; return the Markdown."""
    from pipeline.bench import report
    from pipeline.bench.pipeline_report import to_report

    return report.write(to_report(bench), out, name="pipeline")


def _parser() -> argparse.ArgumentParser:
    parser = command.new_parser(
        "python -m pipeline.bench pipeline",
        "Measure each stage of the job alone, and the whole job against their bound, on the same images.",
        EXAMPLES,
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="number of images, repeated where the manifest is shorter (default: its rows, up to 1000)",
    )
    parser.add_argument(
        "--size", metavar="WxH", help=f"of rendered scenes, where manifest.path is not set ({SIZE[0]}x{SIZE[1]})"
    )
    parser.add_argument("--decoders", metavar="NAMES", help="measure these too, such as exact,fast,scaled")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds over everything (default: 3)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, metavar="S", help="seconds of a stage in a round, about (default: 4)"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S", help="longest wait for one run or answer (1800)"
    )
    return parser
