"""``python -m pipeline.search``: the rows of a dataset nearest to a text, a picture or one of its rows."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.options import showable
from pipeline.config.schema import ModelConfig
from pipeline.core.concurrency import own_exit_code
from pipeline.core.errors import ConfigError, Interrupted, PipelineError, Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.dataset.dataset import Dataset
    from pipeline.dataset.search import Hit

EXAMPLES = """\
examples:
  python -m pipeline.search outputs/demo "a red circle"
      the ten images nearest to a text, among all of them
  python -m pipeline.search outputs/photos --image holiday.jpg --top 50 --json
      those nearest to a picture, for programs
  python -m pipeline.search outputs/demo --id scene-000000
      the neighbours of a row
  python -m pipeline.search outputs/photos --build-index && python -m pipeline.search outputs/photos "a cat" --index
      approximate, from an index (the extra search): for tens of millions of rows

Every embedding is read once, a few parts at a time. Texts are embedded as they are, by the model that made the dataset.
exit codes: 0 done, 2 nothing to search with, no dataset, another model, no index that fits, 75 the dataset is not
finished
"""
WIDTH = 48


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, search or build the index, print; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _act(options)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return Interrupted.exit_code


def _act(options: argparse.Namespace) -> int:
    _check(options)
    from pipeline.dataset.dataset import open_dataset
    from pipeline.dataset.search import fetch, nearest, without
    from pipeline.telemetry.logs import log_to_terminal

    dataset = open_dataset(options.dataset)
    with log_to_terminal():
        if options.build_index:
            _build(dataset, options)
            return 0
        if options.index:
            from pipeline.dataset.index import search_index
        itself, query = _query(dataset, options)
        # The row itself is found too.
        count = options.top + (itself is not None)
        found = search_index(dataset, query, count) if options.index else nearest(dataset, query[None], count)[0]
        hits = fetch(dataset, without(found, itself, options.top))
    if options.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2, default=str))
    else:
        print("\n".join(table(hits, dataset.id, dataset.kept)))
    return 0


def table(hits: Sequence[Hit], id: str, kept: Sequence[str]) -> list[str]:
    """The lines of a table; nested columns are left out, long values cut, and nothing in it controls a terminal."""
    plain = [name for name in kept if not any(isinstance(hit.kept[name], (dict, list, bytes)) for hit in hits)]
    head = ["rank", "score", id, "label", *plain]
    rows = [
        [
            str(hit.rank),
            f"{hit.score:.4f}",
            # An id is there to be copied.
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
    # The end of a path tells more than its beginning.
    return text if most is None or len(text) <= most else f"...{text[3 - most :]}"


def _query(dataset: Dataset, options: argparse.Namespace) -> tuple[int | None, NDArray[np.float32]]:
    """The row that is searched with, if it is one, and the vector."""
    from pipeline.dataset.search import find_row
    from pipeline.engine.query import config_of_dataset, embed_image, embed_text, open_model

    if options.id is not None:
        return find_row(dataset, options.id)
    config = config_of_dataset(dataset, _model(dataset, options))
    checkpoint = open_model(dataset, config.model)
    if options.image is not None:
        return None, embed_image(checkpoint, config, Path(os.path.expanduser(options.image)))
    return None, embed_text(checkpoint, [options.text])[0]


def _model(dataset: Dataset, options: argparse.Namespace) -> ModelConfig:
    from dataclasses import replace

    from pipeline.engine.query import config_of_dataset

    model = config_of_dataset(dataset).model
    return model if options.model is None else replace(model, name=options.model)


def _build(dataset: Dataset, options: argparse.Namespace) -> None:
    from pipeline.dataset.index import RECALL, build_index
    from pipeline.engine.query import config_of_dataset, embed_text, labels_of, open_model

    def texts() -> NDArray[np.float32] | None:
        config = config_of_dataset(dataset, _model(dataset, options))
        try:
            names = labels_of(config).names
        except PipelineError:
            # The file of the labels may be gone by now.
            names = ()
        return embed_text(open_model(dataset, config.model), list(names)) if names else None

    card = build_index(dataset, texts)
    recall = ", ".join(f"{value:.3f} for {kind}" for kind, value in card.recall.items())
    print(
        f"{dataset.url}/{card.file}: {card.vectors:,} embeddings, {card.size / 1e6:,.1f} MB, in {card.seconds:.1f} s; "
        f"{card.lists_read} of {card.lists} lists are read per query; recall of the 10 nearest against the exact "
        f"search: {recall} (wanted {RECALL})"
    )


def _check(options: argparse.Namespace) -> None:
    given = [name for name in ("text", "image", "id") if getattr(options, name) is not None]
    problems = []
    if options.build_index and given:
        problems.append(Problem("--build-index", True, "stands alone", "search with a second command"))
    elif not options.build_index and len(given) != 1:
        problems.append(Problem("search", given, "wants one of a text, --image FILE and --id ID"))
    if options.text is not None and not options.text.strip():
        problems.append(Problem("text", options.text, "is empty"))
    if not 1 <= options.top <= 10_000:
        problems.append(Problem("--top", options.top, "must be from 1 to 10000"))
    if problems:
        raise ConfigError(problems)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.search",
        description="Find the rows of a finished dataset that are nearest to a text, a picture or a row.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder or an fsspec address")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what the images should show")
    parser.add_argument("--image", metavar="FILE", help="a picture to search with")
    parser.add_argument("--id", metavar="ID", help="a row of the dataset to search with")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many rows; default: 10")
    parser.add_argument("--index", action="store_true", help="approximate, from the index within the dataset")
    parser.add_argument("--build-index", action="store_true", help="build that index, and measure its recall")
    parser.add_argument("--model", metavar="NAME", help="where the dataset's model lies now, if it was moved")
    parser.add_argument("--json", action="store_true", help="one JSON list, for programs")
    return parser


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    with own_exit_code():
        raise SystemExit(main())
