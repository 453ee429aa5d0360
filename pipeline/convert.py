"""``python -m pipeline.convert``: export embeddings to NumPy, FAISS, Hugging Face ``datasets`` or Lance."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.cli import ErrorOutput, command_parser, run_command, run_process
from pipeline.core.errors import ConfigError, Problem

FORMATS = ("numpy", "faiss", "datasets", "lance")
EXAMPLES = """\
examples:
  python -m pipeline.convert outputs/demo --to numpy --out demo-numpy
      embeddings.npy, ids.npy and metadata.parquet, with the same order of rows
  python -m pipeline.convert outputs/demo --to faiss --out demo-faiss
      vectors.faiss (exact; --ivf for an inverted file) and metadata.parquet; the extra search
  python -m pipeline.convert outputs/demo --to datasets --out demo-hf
      a folder for datasets.load_dataset("demo-hf") and the Hugging Face hub
  python -m pipeline.convert outputs/demo --to lance --out demo-lance
      vectors.lance; the extra lance

Rows without an embedding are left out, and counted. The folder appears once all of it is written.
exit codes: 0 done, 2 the folder exists, a package is missing or there is no dataset, 75 the dataset is not finished,
or interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, print a summary; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _act(options), ErrorOutput("interrupted; nothing was left behind"))


def _act(options: argparse.Namespace) -> int:
    if options.ivf and options.to != "faiss":
        raise ConfigError([Problem("--ivf", True, "goes with --to faiss")])
    from pipeline.dataset.convert import convert
    from pipeline.dataset.dataset import open_dataset
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal():
        made = convert(open_dataset(options.dataset), options.to, Path(options.out), ivf=options.ivf)
    print(
        f"{options.out}: {made.rows:,} embeddings of length {made.dim}, {made.dtype}, in {len(made.files)} files; "
        f"{made.left_out:,} rows have no embedding and are left out"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.convert",
        "Write the embeddings of a finished dataset in a format that other tools load.",
        EXAMPLES,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or an fsspec address")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format")
    parser.add_argument("--out", metavar="DIR", required=True, help="a local folder that does not exist yet")
    parser.add_argument("--ivf", action="store_true", help="for FAISS: an inverted file, instead of an exact index")
    return parser


if __name__ == "__main__":
    run_process(main)
