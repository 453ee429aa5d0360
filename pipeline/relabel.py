"""``python -m pipeline.relabel``: new prompts over a finished dataset, from its embeddings alone."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.compose import compose_config
from pipeline.core.concurrency import own_exit_code
from pipeline.core.errors import ConfigError, Interrupted, PipelineError, Problem

if TYPE_CHECKING:
    pass

EXAMPLES = """\
examples:
  python -m pipeline.relabel outputs/photos output.dir=outputs/photos-animals 'prompts.labels=[cat,dog,horse]'
      the same photos with other labels
  python -m pipeline.relabel outputs/photos output.dir=outputs/photos-things prompts.path=labels.csv labels.top_k=10
      labels from a file, ten for each row
  python -m pipeline.relabel outputs/photos output.dir=outputs/sure labels.threshold=0.5
      the same labels, where the best one is likely enough

What is not given is as in the source. Run the same command again to go on after an interruption.
exit codes: 0 done, 2 wrong config or another model, 75 the source is not finished, or the run was interrupted or the
output is held by another
"""
# What may differ from the source: whole groups, and single keys.
GROUPS = ("model", "prompts", "labels")
KEYS = ("output.dir", "output.lease_seconds", "report.progress")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, relabel; returns the exit code."""
    began = time.time()
    options = _parser().parse_args(arguments)
    try:
        typed = _check(options.overrides)
        composed = compose_config(options.overrides)
        from pipeline.dataset.dataset import open_dataset
        from pipeline.engine.query import derive
        from pipeline.job.relabel import relabel

        source = open_dataset(options.source)
        relabel(source, derive(source, composed, typed), began=began)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; what was committed stays, and the same command goes on from there", file=sys.stderr)
        return Interrupted.exit_code
    return 0


def _check(overrides: Sequence[str]) -> list[str]:
    """The groups and keys that were typed.

    Raises:
        ConfigError: some may not differ from the source, or no output was named.
    """
    typed = [text.partition("=")[0].lstrip("+") for text in overrides]
    allowed = f"must be as in the source; {', '.join(GROUPS)} and {', '.join(KEYS)} may differ"
    problems = [Problem(key, text, allowed) for key, text in zip(typed, overrides, strict=True) if not _may_differ(key)]
    if "output.dir" not in typed:
        problems.append(Problem("output.dir", None, "must name the new dataset's folder"))
    if problems:
        raise ConfigError(problems)
    return typed


def _may_differ(key: str) -> bool:
    return key in KEYS or key.partition(".")[0] in GROUPS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.relabel",
        description="Label a finished dataset's rows with new prompts, into a new dataset; no image is read.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="the finished dataset: a folder or an fsspec address")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="KEY=VALUE or GROUP=OPTION, as for the job")
    return parser


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    with own_exit_code():
        raise SystemExit(main())
