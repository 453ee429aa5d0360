"""``python -m pipeline.relabel``: label a finished dataset with new prompts, from its embeddings."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from pipeline.config.compose import compose_config
from pipeline.core.cli import ErrorOutput, add_overrides, command_parser, run_command, run_process
from pipeline.core.errors import ConfigError, Problem

EXAMPLES = """\
examples:
  python -m pipeline.relabel outputs/photos output.dir=outputs/photos-animals 'prompts.labels=[cat,dog,horse]'
      the same photos with other labels
  python -m pipeline.relabel outputs/photos output.dir=outputs/photos-things prompts.path=labels.csv labels.top_k=10
      labels from a file, ten for each row
  python -m pipeline.relabel outputs/photos output.dir=outputs/sure labels.threshold=0.5
      the same labels, only where the best one is likely enough

What is not given is as in the source. After an interruption the same command goes on.
exit codes: 0 done, 2 wrong config or another model, 75 the source is not finished, the run was interrupted, or another
run holds the output
"""
# What may differ from the source: whole groups, and single keys.
GROUPS = ("model", "prompts", "labels")
KEYS = ("output.dir", "output.lease_seconds", "report.progress")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, relabel; return the exit code."""
    began = time.time()
    options = _parser().parse_args(arguments)
    errors = ErrorOutput("interrupted; what was committed stays, and the same command goes on from there")
    return run_command(lambda: _act(options, began), errors)


def _act(options: argparse.Namespace, began: float) -> None:
    typed = _check(options.overrides)
    composed = compose_config(options.overrides)
    from pipeline.dataset.dataset import open_dataset
    from pipeline.engine.query import derive
    from pipeline.job.relabel import relabel

    source = open_dataset(options.source)
    relabel(source, derive(source, composed, typed), began=began)


def _check(overrides: Sequence[str]) -> list[str]:
    """Return the groups and keys of the overrides.

    Raises:
        ConfigError: one may not differ from the source, or output.dir is missing.
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
    parser = command_parser(
        "python -m pipeline.relabel",
        "Label the rows of a finished dataset with new prompts, into a new dataset; no image is read.",
        EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", help="the finished dataset: a folder or an fsspec address")
    add_overrides(parser)
    return parser


if __name__ == "__main__":
    run_process(main)
