"""``python -m pipeline.bench``: measure, and print a table to choose by."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from pipeline.core.cli import own_exit_code

# First word to the module whose ``main`` takes the rest; the first one where the word is missing.
DOORS = {"backends": "pipeline.bench.backends", "pipeline": "pipeline.bench.pipeline"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first word names; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words and words[0] in DOORS else next(iter(DOORS))
    code: int = import_module(DOORS[name]).main(words)
    return code


if __name__ == "__main__":
    with own_exit_code():
        raise SystemExit(main())
