"""Functions that both benchmark commands share: common options, exit codes, and the temporary folder."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.core.cli import ErrorOutput, add_overrides, command_parser, run_command
from pipeline.core.errors import PipelineError, Problem

_Entry = TypeVar("_Entry")


def new_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser that takes overrides of the job's config and the folder of the results."""
    parser = command_parser(command, description, examples)
    add_overrides(parser)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    return parser


def too_small(options: argparse.Namespace, lowest: Mapping[str, float]) -> list[Problem]:
    """Return the options below their lowest value, or not finite; options that are not set are skipped."""
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
    line = shlex.join([*parser.prog.split(), *arguments])

    def measure() -> None:
        try:
            print(work(options, line), end="")
        except KeyboardInterrupt:
            # Exit code 1: the same command would not go on, but begin anew.
            raise PipelineError("interrupted; nothing was written") from None

    return run_command(measure, ErrorOutput("interrupted"))


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


def rotated(entries: Sequence[_Entry], number: int) -> list[_Entry]:
    """Return the entries for round ``number``: each begins with another one, so that none always follows the same."""
    turn = number % len(entries)
    return [*entries[turn:], *entries[:turn]]


def quoted(text: str) -> str:
    """Return a value in the quotes of Hydra's grammar, with any character in it."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return f"'{escaped}'"
