"""``python -m pipeline.doctor``: check this machine, this installation and the places of a job."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

from pipeline.config.schema import Config
from pipeline.core.cli import ErrorOutput, add_overrides, command_parser, print_showable, run_command, run_process
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.doctor.check import Check, Status, Subject
from pipeline.doctor.format import count, lines, verdict
from pipeline.doctor.probes import PROBES, examine

EXAMPLES = """\
examples:
  python -m pipeline.doctor
      this machine, and the demo job
  python -m pipeline.doctor model=clip_vit_b32 backend=onnx_int8 manifest.path=photos.parquet output.dir=photos
      the job that is run with these settings
  python -m pipeline.doctor --quick --json manifest.path=photos.parquet output.dir=s3://bucket/photos
      a few seconds, for monitors; in a Dockerfile: HEALTHCHECK CMD ["python", "-m", "pipeline.doctor", "--quick"]

Each line is ok, warn (the job runs, but look at it), fail (the job cannot run as it is) or skip (not needed, or left
out); an arrow shows what to do. All files of a check are removed, and nothing is downloaded.
exit codes: 0 the job can run, warnings or not; 2 something fails; 75 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run all checks, print their results, and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    if sys.stdout is None:
        # Started without standard output, for the exit code alone.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return run_command(lambda: _report(options), ErrorOutput("interrupted; nothing was left behind"))


def _report(options: argparse.Namespace) -> int:
    began = time.monotonic()
    checks: list[Check] = []
    heading = ""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    with _scratch() as scratch, closing(_checks(options, scratch)) as found:
        for check in found:
            checks.append(check)
            if options.json:
                continue
            if check.group != heading:
                print_showable(f"{'' if not heading else chr(10)}{check.group}")
                heading = check.group
            print_showable(lines(check, colour=colour))
    seconds = time.monotonic() - began
    counts = count(checks)
    code = ConfigError.exit_code if counts[Status.FAIL] else 0
    if options.json:
        content = {
            "status": next((status for status in (Status.FAIL, Status.WARN) if counts[status]), Status.OK),
            "exit_code": code,
            "seconds": round(seconds, 1),
            "overrides": options.overrides,
            "quick": options.quick,
            "counts": counts,
            "checks": [check.to_json() for check in checks],
        }
        print(json.dumps(content, indent=2))
    else:
        print_showable(f"\n{verdict(checks, seconds)}")
    return code


def _checks(options: argparse.Namespace, scratch: str | None) -> Generator[Check]:
    """Check the config, then run every probe that applies."""
    config, problems = _compose(options.overrides)
    yield from problems
    probes = [probe for probe in PROBES if not (probe.slow and options.quick)]
    subject = Subject(config=config, quick=options.quick, temporary=_temporary(), scratch=scratch)
    chosen = [probe for probe in probes if config is not None or probe.general]
    with closing(examine(chosen, subject, limit=options.timeout)) as found:
        yield from found
    if config is None:
        left = ", ".join(probe.group for probe in probes if not probe.general)
        yield Check("the job", "left out", Status.SKIP, f"{left}: correct the config first")
    elif options.quick:
        left = ", ".join(probe.group for probe in PROBES if probe.slow)
        yield Check("left out", "--quick", Status.SKIP, left)


def _compose(overrides: Sequence[str]) -> tuple[Config | None, list[Check]]:
    """Return the config of the job, or None and a check for each of its problems."""
    group = "config"
    try:
        from pipeline.config.compose import compose_config

        config = compose_config(overrides)
    except ConfigError as error:
        return None, [
            Check(group, problem.key, Status.FAIL, f"{problem.value!r}: {problem.allowed}", problem.hint)
            for problem in error.problems
        ]
    except PipelineError as error:
        return None, [Check(group, "config", Status.FAIL, str(error))]
    except Exception as error:
        # Without Hydra, or with a broken one, the other checks are all the more useful.
        fact = f"cannot be read: {type(error).__name__}: {error}"
        return None, [Check(group, "config", Status.FAIL, fact, "install the packages that the lines below name")]
    job = f"model {config.model.name}, backend {config.backend.name}, output {config.output.dir}"
    return config, [Check(group, "config", Status.OK, job)]


@contextmanager
def _scratch() -> Iterator[str | None]:
    """Make a folder for the files of the checks, and remove it; None where there can be none: see the disks' probe."""
    try:
        folder = tempfile.mkdtemp(prefix="clip-pipeline-doctor-")
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        # Its store of exports has links to those of the job; the files themselves stay.
        shutil.rmtree(folder, ignore_errors=True)


def _temporary() -> str:
    """Return the folder for temporary files, or the one that is configured where none is writable."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR") or "/tmp"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from error
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be more than 0 seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.doctor",
        "Check this machine, this installation and the places of a job, with advice for each problem.",
        EXAMPLES,
    )
    add_overrides(parser)
    parser.add_argument("--quick", action="store_true", help="without decoders, backends and the batch")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="time limit for each group of checks (default: its own, 20 to 1800 s)",
    )
    return parser


if __name__ == "__main__":
    run_process(main)
