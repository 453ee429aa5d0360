"""``python -m pipeline.doctor``: whether this machine, this installation and a job's places are what it needs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

from pipeline.config.schema import Config
from pipeline.core.cli import run_process, showable
from pipeline.core.errors import ConfigError, Interrupted, PipelineError
from pipeline.doctor.check import Check, Status
from pipeline.doctor.format import count, lines, verdict
from pipeline.doctor.probe_process import to_json
from pipeline.doctor.probes import PROBES
from pipeline.doctor.supervisor import examine

EXAMPLES = """\
examples:
  python -m pipeline.doctor
      this machine, and the demo job
  python -m pipeline.doctor model=clip_vit_b32 backend=onnx_int8 manifest.path=photos.parquet output.dir=photos
      the job that is run with these settings
  python -m pipeline.doctor --quick --json manifest.path=photos.parquet output.dir=s3://bucket/photos
      a few seconds, for monitors; in a Dockerfile: HEALTHCHECK CMD ["python", "-m", "pipeline.doctor", "--quick"]

Each line is ok, warn (the job runs, but look at it), fail (the job cannot run as it is) or skip (not needed, or left
out); an arrow leads to what to do. Nothing that is written for a check stays, and nothing is downloaded.
exit codes: 0 the job can run, warnings or not; 2 something fails; 75 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, look at everything, print; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    if sys.stdout is None:
        # Started without one, for the exit code alone.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for what is left of the process
    try:
        return _act(options)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left behind", file=sys.stderr)
        return Interrupted.exit_code


def _act(options: argparse.Namespace) -> int:
    began = time.monotonic()
    checks: list[Check] = []
    heading = ""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for check in _look(options):
        checks.append(check)
        if options.json:
            continue
        if check.group != heading:
            _say(f"{'' if not heading else chr(10)}{check.group}")
            heading = check.group
        _say(lines(check, colour=colour))
    seconds = time.monotonic() - began
    failed = any(check.status is Status.FAIL for check in checks)
    code = ConfigError.exit_code if failed else 0
    if options.json:
        worst = next(
            (status for status in (Status.FAIL, Status.WARN) if any(check.status is status for check in checks)),
            Status.OK,
        )
        content = {
            "status": worst,
            "exit_code": code,
            "seconds": round(seconds, 1),
            "overrides": options.overrides,
            "quick": options.quick,
            "counts": count(checks),
            "checks": [to_json(check) for check in checks],
        }
        print(json.dumps(content, indent=2))
    else:
        _say(f"\n{verdict(checks, seconds)}")
    return code


def _look(options: argparse.Namespace) -> Iterator[Check]:
    """The config, then every probe that is wanted and can be had."""
    config, problems = _compose(options.overrides)
    yield from problems
    probes = [probe for probe in PROBES if not (probe.slow and options.quick)]
    yield from examine(
        config,
        [probe for probe in probes if config is not None or probe.general],
        quick=options.quick,
        limit=options.timeout,
    )
    if config is None:
        left = ", ".join(probe.group for probe in probes if not probe.general)
        yield Check("the job", "left out", Status.SKIP, f"{left}: the config must be mended first")
    elif options.quick:
        left = ", ".join(probe.group for probe in PROBES if probe.slow)
        yield Check("left out", "--quick", Status.SKIP, f"{left}, the speed of disks")


def _compose(overrides: Sequence[str]) -> tuple[Config | None, list[Check]]:
    """The job's config; None where it has problems, with a line for each."""
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
        # Without Hydra, or with a broken one, the other lines are all the more wanted.
        fact = f"cannot be read: {type(error).__name__}: {error}"
        return None, [Check(group, "config", Status.FAIL, fact, "install the packages that the lines below name")]
    job = f"model {config.model.name}, backend {config.backend.name}, output {config.output.dir}"
    return config, [Check(group, "config", Status.OK, job)]


def _say(text: str) -> None:
    """Print text that names files; a name that the terminal cannot show is escaped."""
    print(showable(text), flush=True)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from error
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be more than 0 seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.doctor",
        description="Check this machine, this installation and the places of a job, and say what to do about each.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for the job")
    parser.add_argument("--quick", action="store_true", help="without backends, decoders, disk speed and the batch")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="longest wait for each group of checks (default: its own, 20 to 1800)",
    )
    return parser


if __name__ == "__main__":
    run_process(main)
