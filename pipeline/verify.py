"""``python -m pipeline.verify``: whether a dataset is whole; repair what is not, clear what nobody needs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.config.options import showable
from pipeline.config.schema import OutputConfig
from pipeline.core.concurrency import own_exit_code
from pipeline.core.errors import Interrupted, NoDataset, PipelineError, PlanMismatch, StorageError, TooManyFailures

if TYPE_CHECKING:
    from pipeline.dataset.verify import Health
    from pipeline.storage.base import Storage

EXAMPLES = """\
examples:
  python -m pipeline.verify outputs/demo
      read every byte, change nothing
  python -m pipeline.verify s3://bucket/photos --repair
      compute again the shards that are missing or damaged, and no other
  python -m pipeline.verify outputs/demo --collect 7d
      remove parts that no commit names, and temporary files, if they are older than a week
exit codes: 0 healthy, 1 damaged, 2 no dataset there, the storage does not answer, or no repair possible,
75 unfinished but whole, or held by a run
"""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
CODES = {"healthy": 0, "damaged": 1, "unfinished": Interrupted.exit_code}
# A line on how far it is, every so many seconds.
PROGRESS_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, look, repair and collect if told to; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _act(options)
    except StorageError as error:
        # Says nothing about the dataset, and must not look as if it were damaged.
        print(f"error: {error}", file=sys.stderr)
        return NoDataset.exit_code
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; a repair goes on with the same command", file=sys.stderr)
        return Interrupted.exit_code


def _act(options: argparse.Namespace) -> int:
    from pipeline.storage.factory import open_storage

    storage = open_storage(options.output)
    before = health = _look(storage)
    collected = None
    if options.repair and health.state != "healthy":
        if not options.json:
            _tell(health)
        _repair(storage)
        health = _look(storage)
    if options.collect is not None:
        collected = _collect(storage, options.collect)
        health = _look(storage) if collected else health
    if options.json:
        found = [asdict(finding) for finding in health.findings]
        content = {**asdict(health), "state": health.state, "findings": found, "collected": collected}
        content["repaired"] = [asdict(finding) for finding in before.findings if finding not in health.findings]
        print(json.dumps(content, indent=2))
    else:
        _tell(health)
    return CODES[health.state]


def _look(storage: Storage) -> Health:
    from pipeline.dataset.verify import verify
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal():
        return verify(storage, on_shard=_progress())


def _repair(storage: Storage) -> None:
    """Run the dataset's own job again: it does what is missing or damaged, and nothing else."""
    from pipeline.dataset.plan import read
    from pipeline.dataset.saved_config import config_of
    from pipeline.job.main import RunOptions, run_job

    wanted = read(storage)
    if wanted is None:
        raise PlanMismatch(f"{storage.url}: has no _plan.json, so nothing says how to repair it")
    config = config_of(wanted.config, storage.url)
    if "source" in wanted.fingerprints:
        from pipeline.dataset.dataset import open_dataset
        from pipeline.job.relabel import relabel

        relabel(open_dataset(str(wanted.about["source"])), config)
        return
    # How many images failed was a verdict on the job; the dataset is complete.
    with suppress(TooManyFailures):
        run_job(config, RunOptions(every_byte=True))


def _collect(storage: Storage, age: float) -> dict[str, int]:
    from pipeline.dataset import lease
    from pipeline.dataset.verify import collect
    from pipeline.job.cluster.part import Part
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal(), lease.take(storage, seconds=OutputConfig().lease_seconds) as held:
        # A part at work has files too that nobody names yet.
        Part().refuse_others(storage)
        gone = collect(storage, age=age, confirm=held.confirm)
    for name, size in gone.items():
        print(f"removed {name}, {size:,} bytes", file=sys.stderr)
    print(f"{len(gone)} files removed, {sum(gone.values()):,} bytes freed", file=sys.stderr)
    return gone


def _tell(health: Health) -> None:
    for finding in health.findings:
        label = "DAMAGE" if finding.damage else "note"
        _say(f"{label}  {finding.kind}: {finding.place}: {finding.text}; {finding.way_out}")
    counts = ", ".join(f"{name} {count:,}" for name, count in health.counts.items())
    damage = sum(finding.damage for finding in health.findings)
    ending = {
        "healthy": "every byte was read, nothing is wrong",
        "unfinished": "what is there is whole; the command that began it goes on, and so does --repair",
        "damaged": f"{damage} {'thing is' if damage == 1 else 'things are'} wrong",
    }
    _say(
        f"{health.state}: {health.output}: {health.done:,} of {health.shards:,} shards, {health.rows:,} rows"
        f"{f' ({counts})' if counts else ''}; {ending[health.state]}"
    )


def _progress() -> Callable[[int, int], None]:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"{done:,} of {total:,} commits checked", file=sys.stderr, flush=True)

    return tell


def _say(text: str) -> None:
    """Print text that names files; a name that the terminal cannot show is escaped."""
    print(showable(text))


def _age(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write 30m, 24h or 7d") from error
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: an age cannot be negative")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify",
        description="Check a dataset: parts, commits, counts, fingerprints, and files that do not belong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", metavar="OUTPUT", help="the dataset: a folder or an fsspec address")
    parser.add_argument("--repair", action="store_true", help="compute again what is wrong, as the plan says")
    parser.add_argument("--collect", type=_age, metavar="AGE", help="remove unreferenced files older than 30m, 24h, 7d")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return parser


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    with own_exit_code():
        raise SystemExit(main())
