"""The nightly job's command line: ``python jobs/nightly.py --date DATE --store DIR [OPTIONS] OVERRIDES``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pipeline.config.compose import compose_config
from pipeline.config.schema import Config, LogConfig
from pipeline.core.cli import ErrorOutput, command_parser, run_command
from pipeline.core.errors import ConfigError, PipelineError, Problem, TooManyFailures
from pipeline.core.log_format import JsonLines, new_run
from pipeline.nightly.notify import Outcome, ping, write_textfile
from pipeline.nightly.records import PARTITION, SNAPSHOT, Night, NightOptions

if TYPE_CHECKING:
    from pipeline.storage.base import Storage

# Snapshots share unchanged parts, so two weeks of them cost little more than one; a partition has rows of its own.
KEPT = {SNAPSHOT: 14, PARTITION: 0}
EXAMPLES = """\
examples:
  python jobs/nightly.py --date 2026-11-22 --store nights manifest.path=photos.parquet model=clip_vit_b32
  python jobs/nightly.py --date yesterday --timezone Europe/Berlin --store nights manifest.path=photos.parquet
  python jobs/nightly.py --from 2026-11-01 --to 2026-11-07 --store nights 'manifest.path=photos-{date}.parquet'

Rows whose content is that of the previous night are carried without being read. --content selects how it is compared:
auto takes the first of the columns digest, sha256, md5, etag, or size and modified; without them, size and date of
local files, and digests of images within the manifest. Other arguments are those of python -m pipeline.run.

exit codes: 0 done, also if the night was published before; 3 published, but more failures than errors.max_fraction;
2 the config, the manifest or the store is wrong; 4 the backend missed its parity gate; 75 interrupted, or another run
holds the store (run it again); 1 anything else. A range stops at the first night that does not end with 0.
"""


@dataclass(slots=True)
class _Run:
    """State of a run that its notifications and error messages need; filled in as it becomes known."""

    name: str = field(default_factory=new_run)
    log: LogConfig = field(default_factory=LogConfig)
    store: Storage | None = None
    night: Night | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, make the nights, send the notifications; return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    began, run, code = time.time(), _Run(), 1
    errors = ErrorOutput("interrupted; what was committed stays, and the same command continues")
    try:
        code = run_command(lambda: _make_nights(options, run, errors), errors)
    finally:
        _notify(options, run, code, time.time() - began)
    return code


def _make_nights(options: argparse.Namespace, run: _Run, errors: ErrorOutput) -> None:
    ping(options.ping, "start")
    days, configs, wanted = _read(options)
    wanted, run.log = replace(wanted, run=run.name), configs[0].log
    errors.formatter = JsonLines(run.name) if run.log.format == "json" else None
    from pipeline.dataset import lease
    from pipeline.engine.demo.notes import log_notes
    from pipeline.nightly.run import run_night
    from pipeline.storage.factory import open_storage
    from pipeline.telemetry.logs import log_to_terminal

    run.store = store = open_storage(wanted.store)
    seconds = configs[0].output.lease_seconds
    with log_to_terminal(run.log, run.name), lease.take(store, seconds=seconds) as held:
        log_notes(configs[0])
        for day, config in zip(days, configs, strict=True):
            run.night = night = run_night(config, wanted, store, day, held)
            if night.exit_code:
                raise TooManyFailures(night.verdict)


def _read(options: argparse.Namespace) -> tuple[list[str], list[Config], NightOptions]:
    """The dates, the main job's config for each, and the other options.

    Raises:
        ConfigError: lists every problem.
    """
    days, problems = _days(options)
    keep = KEPT[options.layout] if options.keep is None else options.keep
    if keep < 0:
        problems.append(Problem("--keep", keep, "must be the number of nights to keep, or 0 for all"))
    if keep and options.layout == PARTITION:
        allowed = "would remove rows that no other night holds"
        problems.append(Problem("--keep", keep, allowed, "leave it out, or take --layout snapshot"))
    for text in options.overrides:
        if text.partition("=")[0] == "output.dir":
            problems.append(Problem("output.dir", text.partition("=")[2], "is made of --store and the date"))
    configs = []
    for day in days or ["2000-01-01"]:
        overrides = [text.replace("{date}", day) if text.startswith("manifest.path=") else text
                     for text in options.overrides]  # fmt: skip
        try:
            configs.append(compose_config(overrides))
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from error
    if configs[0].cluster.part is not None:
        allowed = "splits a job, and the nightly job cannot be split"
        problems.append(Problem("cluster.part", configs[0].cluster.part, allowed, "leave it out"))
    if configs[0].manifest.path is None:
        problems.append(Problem("manifest.path", None, "must name the manifest; {date} in it stands for the night's"))
    if problems:
        raise ConfigError(problems)
    return days, configs, NightOptions(options.store, options.layout, keep, options.content)


def _days(options: argparse.Namespace) -> tuple[list[str], list[Problem]]:
    try:
        today = datetime.now(ZoneInfo(options.timezone)).date()
    except (ZoneInfoNotFoundError, ValueError, OSError):
        # A region such as Europe is a folder.
        return [], [Problem("--timezone", options.timezone, "must be a time zone such as UTC or Europe/Berlin")]
    named = {"today": today, "yesterday": today - timedelta(days=1)}
    found, problems = dict[str, date](), list[Problem]()
    for name in ("date", "from", "to"):
        text = getattr(options, name)
        if text is None:
            continue
        try:
            found[name] = named.get(text) or datetime.strptime(text, "%Y-%m-%d").date()
        except ValueError:
            problems.append(Problem(f"--{name}", text, "must be a date such as 2026-11-22, today or yesterday"))
    if problems:
        return [], problems
    if set(found) not in ({"date"}, {"from", "to"}):
        allowed = "give --date, or both --from and --to: the date is never taken from the clock"
        return [], [Problem("--date", options.date, allowed)]
    first, last = (found["date"],) * 2 if "date" in found else (found["from"], found["to"])
    if first > last:
        return [], [Problem("--from", first.isoformat(), f"must not be after --to {last.isoformat()}")]
    return [(first + timedelta(days=day)).isoformat() for day in range((last - first).days + 1)], []


def _notify(options: argparse.Namespace, run: _Run, code: int, seconds: float) -> None:
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal(run.log, run.name):
        if options.textfile is not None:
            from pipeline.nightly.store import last_success
            from pipeline.storage.factory import open_storage

            # Also after a run that failed before it opened the store: an alarm compares the age of this figure.
            succeeded = None
            try:
                succeeded = last_success(run.store or open_storage(options.store))
            except PipelineError as error:
                print(f"warning: --textfile {options.textfile}: without the last success: {error}", file=sys.stderr)
            try:
                write_textfile(options.textfile, Outcome(options.store, code, seconds, run.night, succeeded))
            except OSError as error:
                print(f"warning: --textfile {options.textfile}: {error}", file=sys.stderr)
        ping(options.ping, str(code))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python jobs/nightly.py",
        "Make the dataset of a date from a manifest that changes: only what is new or changed is embedded.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for the main job")
    add("--date", metavar="DATE", help="the night to make: 2026-11-22, or today or yesterday in --timezone")
    add("--from", metavar="DATE", help="with --to: every night of a range, oldest first")
    add("--to", metavar="DATE", help="the last night of the range")
    add("--timezone", default="UTC", metavar="ZONE", help="time zone of today and yesterday (UTC)")
    add("--store", required=True, metavar="DIR", help="the folder or fsspec address that holds date=YYYY-MM-DD/")
    add("--layout", choices=(SNAPSHOT, PARTITION), default=SNAPSHOT,
        help="snapshot: each night holds every row; partition: the rows that were not carried (snapshot)")  # fmt: skip
    add("--content", default="auto", metavar="COLUMNS", help="how changed images are found: auto, stat, bytes, or"
        " columns; rows with equal values in one called digest, sha256, ... are embedded once (auto)")  # fmt: skip
    add("--keep", type=int, metavar="N", help="nights to keep, 0 for all (14; all of --layout partition)")
    add("--ping", metavar="URL", help="GET URL/start at the beginning, URL/EXITCODE at the end")
    add("--textfile", type=Path, metavar="FILE", help="metrics for Prometheus' textfile collector")
    return parser
