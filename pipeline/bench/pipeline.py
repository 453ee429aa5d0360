"""``python -m pipeline.bench pipeline``: each stage of the job alone, their bound, and the whole job."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.bench import command
from pipeline.bench.pipeline_records import PipelineBench
from pipeline.bench.pipeline_run import Plan, merged, padding, quoted, run
from pipeline.config.compose import compose_config
from pipeline.config.schema import Config
from pipeline.config.validate import CHOICES
from pipeline.core.errors import ConfigError, Problem

SCENES, SIZE = 256, (512, 384)
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
    """The overrides and the plan of a command line.

    Raises:
        ConfigError: with all problems of both.
    """
    problems = command.too_small(options, {"repeats": 1, "seconds": 0.0, "timeout": 1.0, "images": 1})
    size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", options.size or "{}x{}".format(*SIZE))
    if size is None:
        problems.append(Problem("--size", options.size, "must be WIDTHxHEIGHT in pixels, such as 512x384"))
    decoders = tuple(filter(None, (options.decoders or "").split(",")))
    known = CHOICES["images.decoder"]
    problems += [
        Problem("--decoders", name, f"is no decoder; choose among {', '.join(known)}")
        for name in decoders
        if name not in known
    ]
    try:
        if compose_config(options.overrides).manifest.path is not None and options.size is not None:
            problems.append(Problem("--size", options.size, "is of rendered scenes, and manifest.path names images"))
    except ConfigError as error:
        problems += error.problems
    if problems or size is None:
        raise ConfigError(problems)
    return list(options.overrides), Plan(
        images=options.images,
        size=(int(size[1]), int(size[2])),
        decoders=decoders,
        repeats=options.repeats,
        seconds=options.seconds,
        timeout=options.timeout,
    )


def measure(overrides: Sequence[str], plan: Plan, out: Path, *, line: str) -> PipelineBench:
    """Run the plan; ``line`` is the command line as typed.

    Raises:
        PipelineError: a stage or the job cannot run.
    """
    from pipeline.bench.report import model_title
    from pipeline.core.machine import versions

    started = datetime.now(UTC).isoformat(timespec="seconds")
    config = compose_config(list(overrides))
    with command.work_folder(out) as work:
        scenes = render(work, plan) if config.manifest.path is None else []
        measured = run(merged(overrides, [*defaults(config), *scenes]), plan, work)
    facts = measured.facts
    source = "rendered scenes" if scenes else "images of the manifest"
    left_out = f", {facts['bad']} bad ones left out" if facts["bad"] else ""
    return PipelineBench(
        started=started,
        command=line,
        model=model_title(config),
        images=(
            f"{facts['images']:,} {source} (median {facts['megapixels']:.2f} megapixels, {facts['kilobytes']:,.0f} kB"
            f"{left_out}; {facts['held']:,} in memory for the stages alone)"
        ),
        backend=facts["backend"],
        decoder=config.images.decoder,
        labels=facts["labels"],
        batch=facts["batch"],
        streams=facts["streams"],
        padding=padding(facts["images"], config.manifest.shard_rows, facts["batch"]),
        repeats=plan.repeats,
        seconds=plan.seconds,
        machine=facts["machine"],
        versions=versions(),
        stages=measured.stages,
        decoders=measured.decoders,
        job=measured.job,
    )


def render(work: Path, plan: Plan) -> list[str]:
    """Render scenes; return overrides that name their manifest."""
    from pipeline.engine.demo.folder import render_folder

    count, (width, height) = plan.images or SCENES, plan.size
    command.progress(f"rendering {count} scenes of {width} x {height} pixels")
    path = render_folder(work / "scenes", count, width=width, height=height)
    return [f"manifest.path={quoted(str(path))}", "manifest.id=id", "manifest.image=path", "manifest.keep=[]"]


def defaults(config: Config) -> list[str]:
    """Overrides for labels and a batch size, where the config has none, and for embedding every image."""
    # Images of a manifest that is too short are repeated.
    more = ["images.repeats=each"]
    if not config.prompts.labels and config.prompts.path is None:
        from pipeline.engine.demo.folder import label_names

        more.append(f"prompts.labels=[{','.join(map(quoted, label_names()[:10]))}]")
    # Without a fixed size, the stages would have to measure one as well.
    if not config.loader.batch_size:
        more.append("loader.batch_size=64")
    return more


def write(bench: PipelineBench, out: Path) -> str:
    """Write the three files; return the Markdown."""
    from pipeline.bench import report
    from pipeline.bench.pipeline_report import to_report

    return report.write(to_report(bench), out, name="pipeline")


def _parser() -> argparse.ArgumentParser:
    parser = command.new_parser(
        "python -m pipeline.bench pipeline",
        description="Measure each stage of the job alone, and the whole job against their bound, on the same images.",
        epilog=EXAMPLES,
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
