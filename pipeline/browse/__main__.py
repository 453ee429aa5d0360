"""``python -m pipeline.browse DATASET...``: a web page over finished datasets, or the export of a selection."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.core.cli import ErrorOutput, command_parser, run_command, run_process
from pipeline.core.errors import ConfigError, Problem, install_hint
from pipeline.core.machine import is_loopback
from pipeline.models.lean import load_torch_aside

EXAMPLES = """\
examples:
  python -m pipeline.browse outputs/demo
      a page on http://127.0.0.1:PORT; the first line has its address with the token
  python -m pipeline.browse outputs/photos nights --port 8500 --memory 8
      two datasets, or a dataset and a store of nights; up to 8 GiB of columns are held in memory
  python -m pipeline.browse outputs/demo --select 'column=score&op=lt&value=0.5' --export unsure.csv
      the rows of a selection, whose words are those of the page's address, as CSV, Parquet or a manifest

Whoever has the address with its token sees all rows and pictures. The page loads nothing from the network.
exit codes: 0 ended by a signal, or written; 2 no dataset, or wrong options; 75 the dataset is not finished
"""
LOOPBACK = "127.0.0.1"
FORMATS = ("parquet", "csv", "manifest", "datasets")
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line; serve the page until a signal, or export; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _act(options), ErrorOutput("interrupted"))


def _act(options: argparse.Namespace) -> int:
    _check(options)
    load_torch_aside()
    from pipeline.core.plain import leave_out_pandas
    from pipeline.telemetry.logs import log_to_terminal

    leave_out_pandas()
    with log_to_terminal():
        return _export(options) if options.export is not None else _serve(options)


def _serve(options: argparse.Namespace) -> int:
    try:
        import jinja2  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        from pipeline.serve.settings import ExtraMissing

        raise ExtraMissing(f"the page needs the extra serve ({error}): {install_hint('serve')}") from error
    from pipeline.browse.app import Page
    from pipeline.browse.collection import Collection
    from pipeline.browse.guard import LOOPBACK as HOSTS
    from pipeline.browse.guard import Guard
    from pipeline.serve.bind import bind_to

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            # It waits for the requests that it answers, of which an export may take long.
            page.stop()
            await super().shutdown(sockets)

    collection = Collection(options.dataset, int(options.memory * 2**30), options.model)
    page = Page(collection)
    try:
        with bind_to(options.host, options.port, names=("--host", "--port")) as listening:
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            token = secrets.token_urlsafe(24)
            hosts = (*HOSTS, *({shown, options.host} - {*HOSTS}))
            if not is_loopback(options.host):
                log.warning(
                    "--host %s: whoever has the address with its token sees every row and picture", options.host
                )
            # The first line, for people and programs.
            print(f"http://{shown}:{port}/?token={token}", flush=True)
            names = tuple(options.allow_host)
            app: Any = Guard(page.app(), hosts=hosts, port=port, token=token, names=names)
            settings = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False,
                                      server_header=False)  # fmt: skip
            # Its server raises the signal again that ended it.
            with suppress(KeyboardInterrupt):
                Server(settings).run(sockets=[listening])
    finally:
        page.close()
    return 0


def _export(options: argparse.Namespace) -> int:
    from urllib.parse import parse_qsl

    from pipeline.browse.collection import Collection
    from pipeline.browse.exports import export
    from pipeline.browse.selection import Selection

    collection = Collection(options.dataset, int(options.memory * 2**30), options.model)
    try:
        opened = collection.open(0)
        selection = Selection.parse(parse_qsl(options.select or "", keep_blank_values=True), opened.dataset)
        rows = export(opened, selection, options.format or _format_of(options.export), Path(options.export))
    finally:
        collection.close()
    print(f"{options.export}: {rows:,} rows", file=sys.stderr)
    return 0


def _format_of(path: str) -> str:
    return "csv" if path.endswith(".csv") else "parquet"


def _check(options: argparse.Namespace) -> None:
    problems = []
    if not 0 <= options.port <= 65_535:
        problems.append(Problem("--port", options.port, "must be from 0, a free one, to 65535"))
    if not 0.0625 <= options.memory <= 4096:
        problems.append(Problem("--memory", options.memory, "must be from 0.0625 to 4096 GiB"))
    if options.export is None and (options.select is not None or options.format is not None):
        problems.append(Problem("--select", options.select, "selects rows to export", "give --export FILE too"))
    if options.export is not None and len(options.dataset) > 1:
        problems.append(Problem("--export", options.export, "takes one dataset"))
    if problems:
        raise ConfigError(problems)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.browse",
        "Show finished datasets and stores of nights on a web page: search, filter, labels, failures, export.",
        EXAMPLES,
    )
    parser.add_argument("dataset", metavar="DATASET", nargs="+", help="a folder or an fsspec address")
    parser.add_argument("--host", default=LOOPBACK, metavar="ADDRESS", help=f"default: {LOOPBACK}")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="another name of this machine, as in a proxy's Host header")  # fmt: skip
    parser.add_argument("--memory", type=float, default=2.0, metavar="GIB", help="columns held in memory; default: 2")
    parser.add_argument("--model", metavar="NAME", help="where the datasets' model is now, if it was moved")
    parser.add_argument("--export", metavar="FILE", help="write the rows of a selection here instead")
    parser.add_argument("--select", metavar="QUERY", help="the selection: what follows ? in an address of the page")
    parser.add_argument("--format", choices=FORMATS, help="default: csv for *.csv, else parquet")
    return parser


if __name__ == "__main__":
    run_process(main)
