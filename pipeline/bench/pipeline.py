"""``python -m pipeline.bench pipeline``: the stages alone, the whole job, and what people use today, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.bench import cli
from pipeline.bench.cli import answer, say, work_folder
from pipeline.bench.pipeline_records import PipelineBench, Plan, merged, quoted
from pipeline.config.compose import compose_config
from pipeline.config.schema import Config
from pipeline.config.validate import CHOICES
from pipeline.core.errors import ConfigError, Problem

COMMAND = ("python", "-m", "pipeline.bench", "pipeline")
SCENES, SIZE = 256, (512, 384)
EXAMPLES = """\
examples:
  python -m pipeline.bench pipeline
  python -m pipeline.bench pipeline model=clip_vit_b32 model.weights=random --images 256 --size 4000x3000 --no-tools
  python -m pipeline.bench pipeline model=clip_vit_b32 manifest.path=photos.parquet --decoders exact,fast,scaled
  python -m pipeline.bench pipeline model=clip_vit_b32 manifest.path=photos.parquet images.decoder=fast \\
      --ours backend.precision=bf16 --ours "backend=onnx_int8 loader.batch_size=32"

Images that cannot be decoded are left out, for every tool alike. The model is saved once more for the other tools,
and their images are files: both lie in --out while it runs.
exit codes: 0 done, 2 wrong config, manifest or machine, 1 interrupted or anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write, print the tables; returns the exit code."""

    def work(options: argparse.Namespace, command: str) -> str:
        overrides, plan = read(options)
        return write(measure(overrides, plan, options.out, command=command), options.out)

    return answer(_parser(), arguments, work)


def read(options: argparse.Namespace) -> tuple[list[str], Plan]:
    """The overrides and the plan of a command line.

    Raises:
        ConfigError: with every problem of both.
    """
    problems = []
    for name, lowest in (("repeats", 1), ("seconds", 0.0), ("timeout", 1.0), ("tool_batch", 1), ("images", 1)):
        value = getattr(options, name)
        if value is not None and not lowest <= value < float("inf"):
            problems.append(Problem(f"--{name.replace('_', '-')}", value, f"must be a number from {lowest} on"))
    size = SIZE
    if options.size is not None:
        found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", options.size)
        size = (int(found[1]), int(found[2])) if found else SIZE
        if not found:
            problems.append(Problem("--size", options.size, "must be WIDTHxHEIGHT in pixels, such as 512x384"))
    decoders = tuple(filter(None, (options.decoders or "").split(",")))
    known = CHOICES["images.decoder"]
    problems += [
        Problem("--decoders", name, f"is no decoder; choose among {', '.join(known)}")
        for name in decoders
        if name not in known
    ]
    ours = tuple(tuple(text.split()) for text in options.ours)
    for more in ((), *ours):
        try:
            config = compose_config(merged(options.overrides, more))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        if more == () and config.manifest.path is not None and options.size is not None:
            problems.append(Problem("--size", options.size, "is of rendered scenes, and manifest.path names images"))
    if problems:
        raise ConfigError(problems)
    return list(options.overrides), Plan(
        images=options.images,
        size=size,
        decoders=decoders,
        ours=ours,
        tools=options.tools,
        tool_batch=options.tool_batch,
        repeats=options.repeats,
        seconds=options.seconds,
        timeout=options.timeout,
    )


def measure(overrides: Sequence[str], plan: Plan, out: Path, *, command: str) -> PipelineBench:
    """Run the plan; ``command`` is what was typed.

    Raises:
        PipelineError: the stages or the job cannot run.
    """
    from pipeline.bench.pipeline_run import run
    from pipeline.engine.demo.folder import render_folder
    from pipeline.report.summary import versions

    started = datetime.now(UTC).isoformat(timespec="seconds")
    with work_folder(out) as work:
        more, words = with_labels(compose_config(list(overrides))), "images of the manifest"
        if compose_config(list(overrides)).manifest.path is None:
            width, height = plan.size
            count = plan.images or SCENES
            say(f"rendering {count} scenes of {width} x {height} pixels")
            scenes = render_folder(work / "scenes", count, width=width, height=height)
            more += [
                f"manifest.path={quoted(str(scenes))}",
                "manifest.id=id",
                "manifest.image=path",
                "manifest.keep=[]",
            ]
            words = "rendered scenes"
        bench = run(merged(overrides, more), plan, work, say=say)
    return dataclasses.replace(
        bench,
        started=started,
        command=command,
        images=bench.images.replace("@", words),
        versions=versions(),
    )


def with_labels(config: Config) -> list[str]:
    """Overrides for what the bench wants to be known: labels, where the config names none, and the size of batches."""
    # A manifest that is too short is begun again, and other tools embed every image.
    more = ["images.repeats=each"]
    if not config.prompts.labels and config.prompts.path is None:
        from pipeline.engine.demo.folder import label_names

        more.append(f"prompts.labels=[{','.join(map(quoted, label_names()[:10]))}]")
    # 0 is automatic: the stages would have to find it by measuring, too.
    if not config.loader.batch_size:
        more.append("loader.batch_size=64")
    return more


def write(bench: PipelineBench, out: Path) -> str:
    """Write the three files; returns the Markdown."""
    from pipeline.bench import pipeline_report

    text = pipeline_report.to_markdown(bench)
    cli.write("pipeline", bench, out, markdown=text, html=pipeline_report.to_html(bench))
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=" ".join(COMMAND),
        description="Measure the stages alone, the whole job, and what people use today, on the same images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for the job")
    parser.add_argument(
        "--images", type=int, metavar="N", help="images, begun again where the manifest ends (its rows, up to 1000)"
    )
    parser.add_argument(
        "--size", metavar="WxH", help=f"of rendered scenes, where manifest.path is not set ({SIZE[0]}x{SIZE[1]})"
    )
    parser.add_argument("--decoders", metavar="NAMES", help="measure these too, such as exact,fast,scaled")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="OVERRIDES", help="one more run of the job, with these as well"
    )
    parser.add_argument(
        "--tools", action=argparse.BooleanOptionalAction, default=True, help="measure today's tools beside the job"
    )
    parser.add_argument("--tool-batch", type=int, default=32, metavar="N", help="their batch size (default: 32)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds over everything (default: 3)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, metavar="S", help="seconds of a stage in a round, about (default: 4)"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S", help="longest wait for one run or answer (1800)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    return parser
