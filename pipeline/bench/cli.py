"""What the benchmarks' doors share: how they end, where their temporary files lie, and the three files they write."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError


def answer(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, work: Callable[[argparse.Namespace, str], str]
) -> int:
    """Parse the command line, print what ``work`` returns for the options and the command; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(given)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(work(options, shlex.join([*parser.prog.split(), *given])), end="")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A temporary folder within ``out``.

    Raises:
        PipelineError: there can be none.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out, prefix=".work-", ignore_cleanup_errors=True)
    except OSError as error:
        raise PipelineError(f"--out {out}: {error}") from error
    with folder as name:
        yield Path(name).resolve()


def write(name: str, bench: Any, out: Path, *, markdown: str, html: bytes) -> None:
    """Write the figures, a dataclass, as ``name``.json, .html and .md."""
    from pipeline.storage.local import LocalStorage

    storage = LocalStorage(str(out))
    storage.write(f"{name}.json", (json.dumps(dataclasses.asdict(bench), indent=1) + "\n").encode())
    storage.write(f"{name}.html", html)
    storage.write(f"{name}.md", markdown.encode())
    say(f"written: {out}/{name}.md, {name}.json, {name}.html")


def say(text: str) -> None:
    """Tell how far it is; the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)
