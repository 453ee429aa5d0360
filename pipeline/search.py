"""``python -m pipeline.search``: find the rows of a dataset nearest to a text, an image or one of its rows."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import ModelConfig
from pipeline.core.cli import ErrorOutput, command_parser, run_command, run_process, showable
from pipeline.core.errors import ConfigError, PipelineError, Problem
from pipeline.models.lean import import_transformers, load_torch_aside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.dataset.dataset import Dataset
    from pipeline.dataset.search import Hit

EXAMPLES = """\
examples:
  python -m pipeline.search outputs/demo "a red circle"
      the ten images nearest to a text
  python -m pipeline.search outputs/photos --image holiday.jpg --top 50 --json
      those nearest to an image, as JSON
  python -m pipeline.search outputs/demo --id scene-000000
      the neighbours of a row
  python -m pipeline.search outputs/photos --build-index && python -m pipeline.search outputs/photos "a cat" --index
      approximate, from an index (the extra search): for tens of millions of rows

Every embedding is read once, a few parts at a time. Texts are embedded without a template, by the dataset's own model.
exit codes: 0 done, 2 no query, no dataset, another model or no index of it, 75 the dataset is not finished, or
interrupted
"""
WIDTH = 48


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, search or build the index, print; return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _act(options), ErrorOutput("interrupted"))


def _act(options: argparse.Namespace) -> int:
    _check(options)
    if options.text is not None or options.image is not None:
        load_torch_aside()
    from pipeline.core.plain import leave_out_pandas
    from pipeline.dataset.dataset import open_dataset
    from pipeline.dataset.search import fetch, nearest, without
    from pipeline.telemetry.logs import log_to_terminal

    leave_out_pandas()
    dataset = open_dataset(options.dataset)
    if options.column is not None:
        dataset = _with_column(dataset, options)
    with log_to_terminal():
        if options.build_index:
            _build(dataset, options)
            return 0
        if options.index:
            from pipeline.dataset.index import search_index
        itself, query = _query(dataset, options)
        # A row is its own nearest one.
        count = options.top + (itself is not None)
        found = search_index(dataset, query, count) if options.index else nearest(dataset, query[None], count)[0]
        hits = fetch(dataset, without(found, itself, options.top))
    if options.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2, default=str))
    else:
        print("\n".join(table(hits, dataset.id, dataset.kept)))
    return 0


def _with_column(dataset: Dataset, options: argparse.Namespace) -> Dataset:
    from dataclasses import replace

    from pipeline.dataset.parts import VECTORS

    problems = []
    if options.index or options.build_index:
        problems.append(Problem("--column", options.column, "is searched exactly", "leave out the index"))
    there = [name for name in VECTORS if name in dataset.own_columns]
    if options.column not in there:
        problems.append(Problem("--column", options.column, f"must be one of {', '.join(there)} in {dataset.url}"))
    if problems:
        raise ConfigError(problems)
    return replace(dataset, searched=options.column)


def table(hits: Sequence[Hit], id: str, kept: Sequence[str]) -> list[str]:
    """Return the lines of a table, without nested columns, long values and control characters."""
    plain = [name for name in kept if not any(isinstance(hit.kept[name], (dict, list, bytes)) for hit in hits)]
    head = ["rank", "score", id, "label", *plain]
    rows = [
        [
            str(hit.rank),
            f"{hit.score:.4f}",
            # Ids are copied, so they are never cut.
            _shown(hit.id, most=None),
            *(_shown(value) for value in (hit.label, *map(hit.kept.get, plain))),
        ]
        for hit in hits
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]]  # fmt: skip


def _shown(value: Any, *, most: int | None = WIDTH) -> str:
    text = "" if value is None else str(value)
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    text = showable(text)
    # The end of a path says more than its beginning.
    return text if most is None or len(text) <= most else f"...{text[3 - most :]}"


def _query(dataset: Dataset, options: argparse.Namespace) -> tuple[int | None, NDArray[np.float32]]:
    """Return the row that is the query, if it is one, and the vector."""
    from pipeline.dataset.search import find_row
    from pipeline.dataset.vectors import cut
    from pipeline.engine.query import config_of_dataset, embed_image, embed_text, open_model

    if options.id is not None:
        return find_row(dataset, options.id)
    config = config_of_dataset(dataset, _model(dataset, options))
    import_transformers()
    checkpoint = open_model(dataset, config.model)
    if options.image is not None:
        query = embed_image(checkpoint, config, Path(os.path.expanduser(options.image)))
    else:
        query = embed_text(checkpoint, [options.text])[0]
    return None, cut(query[None], dataset.dim)[0]


def _model(dataset: Dataset, options: argparse.Namespace) -> ModelConfig:
    from dataclasses import replace

    from pipeline.engine.query import config_of_dataset

    model = config_of_dataset(dataset).model
    return model if options.model is None else replace(model, name=options.model)


def _build(dataset: Dataset, options: argparse.Namespace) -> None:
    from pipeline.dataset.index import RECALL, build_index
    from pipeline.dataset.vectors import cut
    from pipeline.engine.query import config_of_dataset, embed_text, labels_of, open_model

    def texts() -> NDArray[np.float32] | None:
        config = config_of_dataset(dataset, _model(dataset, options))
        try:
            names = labels_of(config).names
        except PipelineError:
            # The file of the labels may no longer exist.
            names = ()
        return cut(embed_text(open_model(dataset, config.model), list(names)), dataset.dim) if names else None

    made = build_index(dataset, texts)
    recall = ", ".join(f"{value:.3f} for {kind}" for kind, value in made.recall.items())
    print(
        f"{dataset.url}/{made.file}: {made.vectors:,} embeddings, {made.size / 1e6:,.1f} MB, in {made.seconds:.1f} s; "
        f"{made.lists_read} of {made.lists} lists are read per query; recall of the 10 nearest against the exact "
        f"search: {recall} (wanted {RECALL})"
    )


def _check(options: argparse.Namespace) -> None:
    given = [name for name in ("text", "image", "id") if getattr(options, name) is not None]
    problems = []
    if options.build_index and given:
        problems.append(Problem("--build-index", True, "takes no query", "search with a second command"))
    elif not options.build_index and len(given) != 1:
        problems.append(Problem("search", given, "needs one of a text, --image FILE and --id ID"))
    if options.text is not None and not options.text.strip():
        problems.append(Problem("text", options.text, "is empty"))
    if not 1 <= options.top <= 10_000:
        problems.append(Problem("--top", options.top, "must be from 1 to 10000"))
    if problems:
        raise ConfigError(problems)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.search",
        "Find the rows of a finished dataset that are nearest to a text, an image or a row.",
        EXAMPLES,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or an fsspec address")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what the images should show")
    parser.add_argument("--image", metavar="FILE", help="an image to search with")
    parser.add_argument("--id", metavar="ID", help="a row of the dataset to search with")
    parser.add_argument("--column", metavar="NAME", help="search the embeddings of another column: text_embedding")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many rows; default: 10")
    parser.add_argument("--index", action="store_true", help="approximate, from the index of the dataset")
    parser.add_argument("--build-index", action="store_true", help="build that index, and measure its recall")
    parser.add_argument("--model", metavar="NAME", help="where the dataset's model is now, if it was moved")
    parser.add_argument("--json", action="store_true", help="one JSON list, for programs")
    return parser


if __name__ == "__main__":
    run_process(main)
