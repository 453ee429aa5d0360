"""``python -m pipeline.dedup``: find the near duplicates of a dataset, and the row of each group to keep."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from pipeline.core.cli import ErrorOutput, command_parser, print_showable, run_command, run_process

EXAMPLES = """\
examples:
  python -m pipeline.dedup outputs/photos
      groups of photos with a cosine of at least 0.95, into outputs/photos.duplicates.parquet
  python -m pipeline.dedup outputs/photos --threshold 1
      copies alone: embeddings that are equal to the last bit
  python -m pipeline.dedup outputs/photos --keep max:width --output copies.parquet --json
      keep the widest photo of each group, if the manifest has a column width and manifest.keep names it

Every row that would be dropped has a cosine of at least the threshold with the kept row of its group. More than 100,000
different embeddings are searched with FAISS (the extra search), which misses a few; --exact compares all.
The file has the columns id, group, size, keep, kept_id, similarity and reason. Nothing is removed from the dataset.
exit codes: 0 done, 2 a wrong option, no dataset, FAISS is missing or another program's file is in the way, 75 the
dataset is not finished, or interrupted
"""
SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, find duplicates, write the file, print a summary; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _act(options), ErrorOutput("interrupted; nothing was written"))


def _act(options: argparse.Namespace) -> int:
    from pipeline.core.plain import leave_out_pandas
    from pipeline.dataset.analysis import check_output, writing
    from pipeline.dataset.dataset import open_dataset
    from pipeline.dataset.near_duplicates import find_duplicates
    from pipeline.telemetry.logs import log_to_terminal

    leave_out_pandas()
    dataset = open_dataset(options.dataset)
    url = check_output(dataset, "duplicates", options.output)
    with log_to_terminal():
        found = find_duplicates(dataset, options.threshold, options.keep, exact=options.exact)
        about = {"parameters": found.parameters, "counts": found.counts}
        with writing(url, "duplicates", dataset, found.table.schema, **about) as writer:
            writer.write_table(found.table)
    kept = found.table.filter(found.table["keep"]).slice(0, SHOWN).select(["kept_id", "size"]).to_pylist()
    if options.json:
        print(json.dumps({"output": url, **about, "largest": kept}, indent=2, default=str))
        return 0
    counts = found.counts
    noun = "group" if counts["groups"] == 1 else "groups"
    print_showable(
        f"{url}: {counts['groups']:,} {noun}; keeping one row of each drops {counts['dropped']:,} of "
        f"{counts['rows']:,} rows\n{counts['embeddings']:,} embeddings, {counts['different']:,} different; "
        f"{counts['left_out']:,} rows without one are left out; search: {found.parameters['search']}"
    )
    for group in kept:
        print_showable(f"  {group['size']:,} rows like {group['kept_id']!a}")
    if counts["groups"] > len(kept):
        print(f"  ... {counts['groups'] - len(kept):,} smaller groups")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.dedup",
        "Find the near duplicates of a finished dataset by their embeddings, and which row of each group to keep.",
        EXAMPLES,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or an fsspec address")
    parser.add_argument(
        "--threshold", type=float, default=0.95, metavar="COSINE", help="smallest cosine; default: 0.95"
    )
    parser.add_argument(
        "--keep", default="first", metavar="RULE", help="first (default), or max:COLUMN or min:COLUMN, then the first"
    )
    parser.add_argument("--output", metavar="FILE", help="default: DATASET.duplicates.parquet, beside the dataset")
    parser.add_argument("--exact", action="store_true", help="compare all embeddings, however many there are")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, for programs")
    return parser


if __name__ == "__main__":
    run_process(main)
