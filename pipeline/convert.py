"""``python -m pipeline.convert``: a dataset's embeddings for NumPy, FAISS, Hugging Face ``datasets`` or Lance."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.concurrency import own_exit_code
from pipeline.core.errors import ConfigError, Interrupted, PipelineError, Problem

FORMATS = ("numpy", "faiss", "datasets", "lance")
EXAMPLES = """\
examples:
  python -m pipeline.convert outputs/demo --to numpy --out demo-numpy
      embeddings.npy, ids.npy and metadata.parquet, row by row the same
  python -m pipeline.convert outputs/demo --to faiss --out demo-faiss
      vectors.faiss (exact; --ivf for an inverted file) and metadata.parquet; the extra search
  python -m pipeline.convert outputs/demo --to datasets --out demo-hf
      what datasets.load_dataset("demo-hf") and the Hugging Face hub read
  python -m pipeline.convert outputs/demo --to lance --out demo-lance
      vectors.lance; the extra lance

Rows without an embedding are left out, and counted. The folder appears when all of it is written.
exit codes: 0 done, 2 the place is taken, a package is missing or there is no dataset, 75 it is not finished
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, say what was made; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _act(options)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left behind", file=sys.stderr)
        return Interrupted.exit_code


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
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.convert",
        description="Write a finished dataset's embeddings in a format that other tools load.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or an fsspec address")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format")
    parser.add_argument("--out", metavar="DIR", required=True, help="a local folder that is not there yet")
    parser.add_argument("--ivf", action="store_true", help="for FAISS: an inverted file, instead of the exact index")
    return parser


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    with own_exit_code():
        raise SystemExit(main())
