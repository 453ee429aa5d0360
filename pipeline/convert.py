"""``python -m pipeline.convert``: export embeddings to files of other tools, or to PostgreSQL or Qdrant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.cli import ErrorOutput, command_parser, run_command, run_process
from pipeline.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pipeline.dataset.dataset import Dataset

FORMATS = ("numpy", "faiss", "datasets", "lance")
DATABASES = ("pgvector", "qdrant")
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
  python -m pipeline.convert outputs/demo --to pgvector --out postgresql://me@localhost/images --table demo
      a table of PostgreSQL with pgvector (--index for an HNSW index); password in PGPASSWORD; the extra pgvector
  python -m pipeline.convert outputs/demo --to qdrant --out http://localhost:6333 --table demo
      a collection of Qdrant, or of its embedded mode in a local folder; key in QDRANT_API_KEY; the extra qdrant

Rows without an embedding are left out, and counted. A folder appears once all of it is written. A table of a database
is filled part by part: the same command goes on where it ended, and writes no row twice.
exit codes: 0 done, 1 the storage or the database failed, 2 the target exists, a package is missing or there is no
dataset, 75 the dataset is not finished, another command fills the table, or interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, print a summary; return the exit code."""
    options = _parser().parse_args(arguments)
    rest = "the same command goes on" if options.to in DATABASES else "nothing was left behind"
    return run_command(lambda: _act(options), ErrorOutput(f"interrupted; {rest}"))


def _act(options: argparse.Namespace) -> int:
    _check(options)
    from pipeline.dataset.dataset import open_dataset
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal():
        dataset = open_dataset(options.dataset)
        return _to_database(dataset, options) if options.to in DATABASES else _to_files(dataset, options)


def _to_files(dataset: Dataset, options: argparse.Namespace) -> int:
    from pipeline.dataset.convert import convert

    made = convert(dataset, options.to, Path(options.out), ivf=options.ivf)
    print(
        f"{options.out}: {made.rows:,} embeddings of length {made.dim}, {made.dtype}, in {len(made.files)} files; "
        f"{made.left_out:,} rows have no embedding and are left out"
    )
    return 0


def _to_database(dataset: Dataset, options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pipeline.dataset.databases import fill
    from pipeline.dataset.pgvector import PgTable
    from pipeline.dataset.qdrant import QdrantCollection

    target: PgTable | QdrantCollection
    if options.to == "pgvector":
        target = PgTable(dataset, options.out, options.table, index=options.index)
    else:
        target = QdrantCollection(dataset, options.out, options.table)
    with closing(target), tqdm(total=dataset.vectors, unit="row", disable=None) as bar:
        made = fill(dataset, target, replace=options.replace, on_rows=bar.update)
        if isinstance(target, PgTable) and options.index:
            target.build_index()
    print(
        f"{target.shown}, {options.table}: {made.rows:,} embeddings of length {dataset.dim}, {made.written:,} of them "
        f"written now; {made.left_out:,} rows have no embedding and are left out"
    )
    return 0


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.ivf and options.to != "faiss":
        problems.append(Problem("--ivf", True, "goes with --to faiss"))
    if options.index and options.to != "pgvector":
        problems.append(Problem("--index", True, "goes with --to pgvector; Qdrant builds its index itself"))
    if options.replace and options.to not in DATABASES:
        problems.append(Problem("--replace", True, "goes with --to pgvector and --to qdrant"))
    if (options.table is None) == (options.to in DATABASES):
        goes = "is needed: the name of the table" if options.table is None else "goes with --to pgvector and qdrant"
        problems.append(Problem("--table", options.table, goes))
    if problems:
        raise ConfigError(problems)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.convert",
        "Write the embeddings of a finished dataset in a format that other tools load.",
        EXAMPLES,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or an fsspec address")
    parser.add_argument("--to", choices=(*FORMATS, *DATABASES), required=True, help="the format, or the database")
    parser.add_argument(
        "--out", metavar="PLACE", required=True, help="a local folder that does not exist yet, or the URL of a database"
    )
    parser.add_argument("--ivf", action="store_true", help="for FAISS: an inverted file, instead of an exact index")
    parser.add_argument("--table", metavar="NAME", help="for a database: the table ([SCHEMA.]NAME) or the collection")
    parser.add_argument("--index", action="store_true", help="for pgvector: an HNSW index of the embeddings")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="for a database: drop a table of another dataset, or of an earlier state",
    )
    return parser


if __name__ == "__main__":
    run_process(main)
