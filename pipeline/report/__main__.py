"""``python -m pipeline.report``: redraw the page of a dataset, compare two runs, or draw the nights of a store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.cli import ErrorOutput, command_parser, run_command, run_process
from pipeline.storage.urls import explained

EXAMPLES = """\
examples:
  python -m pipeline.report outputs/demo
      draw outputs/demo/_report.html again
  python -m pipeline.report s3://bucket/photos --out photos.html --examples 100
      write the page to another file, with more pictures
  python -m pipeline.report --compare outputs/monday outputs/tuesday --out compare.html
      two runs side by side
  python -m pipeline.report --history nights/runs.parquet --out nights.html
      every night of a store
exit codes: 0 written, 2 no dataset or an unfinished one, 75 interrupted, 1 anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write a page; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    given = [options.dataset is not None, options.compare is not None, options.history is not None]
    if sum(given) != 1:
        parser.error("give a dataset, or --compare A B, or --history RUNS")
    return run_command(lambda: _write(options), ErrorOutput("interrupted; nothing was written"))


def _write(options: argparse.Namespace) -> None:
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal():
        if options.compare is not None:
            from pipeline.report.compare import compare_page

            one, other = options.compare
            place = _save(options.out or "compare.html", compare_page(_report(one), _report(other), names=(one, other)))
        elif options.history is not None:
            from pipeline.report.nights import history_page

            place = _save(options.out or "nights.html", history_page(options.history))
        else:
            from pipeline.report.render import PAGE, redraw

            page = redraw(options.dataset, examples=options.examples)
            place = _save(options.out, page) if options.out else _put(options.dataset, PAGE, page)
    print(place)


def _report(url: str) -> dict[str, Any]:
    """The report of a dataset."""
    from pipeline.core.errors import NoDataset
    from pipeline.dataset.plan import NAME
    from pipeline.report.load import report_of
    from pipeline.storage.factory import open_storage

    storage = open_storage(url)
    if storage.size(NAME) is None:
        raise NoDataset(f"{storage.url}: no dataset is here; give the output.dir of a job")
    return report_of(storage)


def _save(path: str, page: bytes) -> str:
    with explained(path):
        Path(path).write_bytes(page)
    return path


def _put(url: str, name: str, page: bytes) -> str:
    from pipeline.storage.factory import open_storage

    storage = open_storage(url)
    storage.write(name, page)
    return f"{storage.url.rstrip('/')}/{name}"


def _count(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1000")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.report",
        "Redraw the page of a dataset, compare two runs, or draw the nights of a store.",
        EXAMPLES,
    )
    parser.add_argument("dataset", metavar="DATASET", nargs="?", help="a finished dataset: a folder or an address")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two datasets whose runs are compared")
    parser.add_argument("--history", metavar="RUNS", help="the runs.parquet of a store of nights, or the store")
    parser.add_argument(
        "--out", metavar="FILE", help="where the page goes [DATASET/_report.html, compare.html or nights.html]"
    )
    parser.add_argument("--examples", type=_count, metavar="N", help="number of example rows; 0 reads no picture")
    return parser


if __name__ == "__main__":
    run_process(main)
