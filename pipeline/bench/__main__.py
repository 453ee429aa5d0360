"""``python -m pipeline.bench``: measure backends, the stages of a job, a GPU, or what feeds one, on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from pipeline.core.cli import run_process

# The benchmarks by the first argument; the first one is the default.
COMMANDS = {
    "backends": "pipeline.bench.backends",
    "pipeline": "pipeline.bench.pipeline",
    "gpu": "pipeline.bench.gpu",
    "feed": "pipeline.bench.feed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names; return the exit code."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    name = rest.pop(0) if rest and rest[0] in COMMANDS else next(iter(COMMANDS))
    code: int = import_module(COMMANDS[name]).main(rest)
    return code


if __name__ == "__main__":
    run_process(main)
