"""``python -m pipeline.sample``: choose rows of a dataset that cover its embeddings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from pipeline.core.cli import ErrorOutput, command_parser, print_showable, run_command, run_process
from pipeline.core.errors import ConfigError, Problem

EXAMPLES = """\
examples:
  python -m pipeline.sample outputs/photos --rows 500
      the rows nearest to the centres of 500 clusters, into outputs/photos.sample.parquet
  python -m pipeline.sample outputs/photos --per-label 20 --method kcenter
      20 rows of each label that are as different as possible
  python -m pipeline.sample outputs/photos --rows 200 --clusters --json
      also the cluster of every row, in outputs/photos.clusters.parquet

The sample has the columns id, label, cluster, distance (1 - cosine with the centre) and size (rows of the cluster), in
the order of the dataset. The same seed gives the same sample of the same dataset.
exit codes: 0 done, 2 a wrong option, no dataset or another program's file is in the way, 75 the dataset is not
finished, or interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, choose rows, write the files, print a summary; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _act(options), ErrorOutput("interrupted; the same command begins again"))


def _act(options: argparse.Namespace) -> int:
    if options.clusters is not None and options.method == "random":
        raise ConfigError([Problem("--clusters", True, "has no clusters to write with --method random")])
    from pipeline.core.plain import leave_out_pandas
    from pipeline.dataset.analysis import check_output, writing
    from pipeline.dataset.coverage import Choice, draw_sample, write_clusters
    from pipeline.dataset.dataset import open_dataset
    from pipeline.telemetry.logs import log_to_terminal

    leave_out_pandas()
    dataset = open_dataset(options.dataset)
    outputs = {"sample": check_output(dataset, "sample", options.output)}
    if options.clusters is not None:
        outputs["clusters"] = check_output(dataset, "clusters", options.clusters)
    with log_to_terminal():
        sample = draw_sample(dataset, Choice(options.method, options.rows, options.per_label, options.seed))
        about = {"parameters": sample.parameters, "counts": sample.counts}
        if "clusters" in outputs:
            write_clusters(dataset, sample, outputs["clusters"])
        with writing(outputs["sample"], "sample", dataset, sample.table.schema, **about) as writer:
            writer.write_table(sample.table)
    if options.json:
        print(json.dumps({"outputs": outputs, **about}, indent=2))
        return 0
    counts = sample.counts
    print_showable(
        f"{outputs['sample']}: {counts['sampled']:,} rows of {counts['embeddings']:,} with an embedding; "
        f"{counts['left_out']:,} without one are left out"
    )
    if "clusters" in outputs:
        print_showable(f"{outputs['clusters']}: the cluster of each")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.sample",
        "Choose rows of a finished dataset that cover its embeddings, or those of each label.",
        EXAMPLES,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or an fsspec address")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--rows", type=int, default=1000, metavar="N", help="rows to choose; default: 1000")
    number.add_argument("--per-label", type=int, metavar="N", help="rows of each label, or all that it has")
    parser.add_argument(
        "--method",
        choices=("kmeans", "kcenter", "random"),
        default="kmeans",
        help="kmeans (default): nearest to centres; kcenter: farthest from each other; random",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one gives another sample; default: 0")
    parser.add_argument("--output", metavar="FILE", help="default: DATASET.sample.parquet, beside the dataset")
    parser.add_argument(
        "--clusters", nargs="?", const="", metavar="FILE", help="write all clusters; default: DATASET.clusters.parquet"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, for programs")
    return parser


if __name__ == "__main__":
    run_process(main)
