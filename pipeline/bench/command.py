"""Functions that both benchmark commands share: common options, exit codes, and the temporary folder."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import PipelineError, Problem


def new_parser(prog: str, *, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser that takes overrides of the job's config and the folder of the results."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for the job")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    return parser


def too_small(options: argparse.Namespace, lowest: Mapping[str, float]) -> list[Problem]:
    """The options below their lowest value, or not finite; options that are not set are skipped."""
    return [
        Problem(f"--{name}", value, f"must be a number from {low} on")
        for name, low in lowest.items()
        if (value := getattr(options, name)) is not None and not low <= value < float("inf")
    ]


def run(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, work: Callable[[argparse.Namespace, str], str]
) -> int:
    """Parse the command line, print the result of ``work(options, command)``, and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(arguments)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(work(options, shlex.join([*parser.prog.split(), *arguments])), end="")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder within ``out``, and remove it at the end.

    Raises:
        PipelineError: the folder cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out, prefix=".work-", ignore_cleanup_errors=True)
    except OSError as error:
        raise PipelineError(f"--out {out}: {error}") from error
    with folder as name:
        yield Path(name).resolve()


def progress(text: str) -> None:
    """Print a line to standard error; standard output is for the result alone."""
    print(text, file=sys.stderr, flush=True)
