"""``python -m pipeline.verify``: check a dataset, repair damaged shards, remove unreferenced files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.config.schema import Config, OutputConfig
from pipeline.core.cli import ErrorOutput, command_parser, print_showable, run_command, run_process
from pipeline.core.errors import (
    ConfigError,
    Interrupted,
    ManifestError,
    ModelError,
    NoDataset,
    PlanMismatch,
    Problem,
    PromptsError,
    StorageError,
    TooManyFailures,
)

if TYPE_CHECKING:
    from pipeline.dataset.verify import Health
    from pipeline.storage.base import Storage

EXAMPLES = """\
examples:
  python -m pipeline.verify outputs/demo
      read every byte, change nothing
  python -m pipeline.verify s3://bucket/photos --repair
      compute only missing and damaged shards again
  python -m pipeline.verify outputs/photos --repair manifest.path=/mnt/photos.parquet
      the same after the manifest alone was moved; manifest.root, prompts.path and model.name can be given too
  python -m pipeline.verify outputs/demo --collect 7d
      remove parts without a commit and temporary files that are older than a week
exit codes: 0 healthy, 1 damaged, 2 no dataset, the storage does not answer, or no repair possible,
75 unfinished but undamaged, interrupted, or held by a run
"""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
CODES = {"healthy": 0, "damaged": 1, "unfinished": Interrupted.exit_code}
# Seconds between two lines of progress.
PROGRESS_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, verify, repair and collect if asked for; return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _run(options), ErrorOutput("interrupted; a repair goes on with the same command"))


def _run(options: argparse.Namespace) -> int:
    try:
        return _act(options)
    except StorageError as error:
        # A storage that does not answer is no damage of the dataset, which has exit code 1.
        raise NoDataset(str(error)) from error


def _act(options: argparse.Namespace) -> int:
    from pipeline.storage.factory import open_storage

    places = _places(options)
    storage = open_storage(options.output)
    before = health = _verify(storage)
    collected = None
    if options.repair and health.state != "healthy":
        if not options.json:
            _print(health)
        _repair(storage, places)
        health = _verify(storage)
    if options.collect is not None:
        collected = _collect(storage, options.collect)
        health = _verify(storage) if collected else health
    if options.json:
        found = [asdict(finding) for finding in health.findings]
        content = {**asdict(health), "state": health.state, "findings": found, "collected": collected}
        content["repaired"] = [asdict(finding) for finding in before.findings if finding not in health.findings]
        print(json.dumps(content, indent=2))
    else:
        _print(health)
    return CODES[health.state]


def _verify(storage: Storage) -> Health:
    from pipeline.dataset.verify import verify
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal():
        return verify(storage, on_shard=_progress())


def _places(options: argparse.Namespace) -> dict[str, str]:
    """The new places of what the plan names, by key.

    Raises:
        ConfigError: another key is given, or there is no repair.
    """
    if not options.places:
        return {}
    from pipeline.dataset.saved_config import PLACES

    pairs = [text.partition("=") for text in options.places]
    allowed = f"cannot be given here; --repair takes KEY=PLACE for {', '.join(PLACES)}"
    problems = [Problem(key, place, allowed) for key, _, place in pairs
                if key not in PLACES or not place or not options.repair]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    return {key: place for key, _, place in pairs}


def _repair(storage: Storage, places: Mapping[str, str]) -> None:
    """Run the job of the dataset again, which computes what is missing or damaged and nothing else."""
    from pipeline.dataset.plan import read
    from pipeline.dataset.saved_config import config_of, gone_places
    from pipeline.job.main import RunOptions, run_job

    wanted = read(storage)
    if wanted is None:
        raise PlanMismatch(f"{storage.url}: has no _plan.json, which a repair needs")
    config = config_of(wanted.config, storage.url).changed(places)
    if "source" in wanted.fingerprints:
        _relabel(str(wanted.about["source"]), config)
        return
    try:
        # The limit of failed images is a matter of the job; the dataset is complete.
        with suppress(TooManyFailures):
            run_job(config, RunOptions(every_byte=True))
    except (ManifestError, ModelError, PromptsError) as error:
        gone = [f"{key}=NEW" for key in gone_places(config)]
        if not gone:
            raise
        command = f"python -m pipeline.verify {storage.url} --repair {' '.join(gone)}"
        raise type(error)(f"{error}; if it moved, say where it is now: {command}") from error


def _relabel(source: str, config: Config) -> None:
    """Label the rows of a relabelled dataset again, from its source, which may have moved with it."""
    from pipeline.dataset.dataset import open_dataset
    from pipeline.dataset.plan import NAME
    from pipeline.job.relabel import relabel
    from pipeline.storage.moved import find_again, is_gone

    if is_gone(source):
        again = next(find_again(f"{source}/{NAME}", config.output.dir), None)
        if again is None:
            raise NoDataset(
                f"{config.output.dir}: its rows come from {source}, which is gone; where it is now, the command that "
                f"made them repairs them: python -m pipeline.relabel SOURCE output.dir={config.output.dir} ..."
            )
        source = again.removesuffix(f"/{NAME}")
    relabel(open_dataset(source), config)


def _collect(storage: Storage, age: float) -> dict[str, int]:
    from pipeline.dataset import lease
    from pipeline.dataset.verify import collect
    from pipeline.job.cluster.part import Part
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal(), lease.take(storage, seconds=OutputConfig().lease_seconds) as held:
        # A running part has files that no commit names yet.
        Part().refuse_others(storage)
        gone = collect(storage, age=age, confirm=held.confirm)
    for name, size in gone.items():
        print(f"removed {name}, {size:,} bytes", file=sys.stderr)
    print(f"{len(gone)} files removed, {sum(gone.values()):,} bytes freed", file=sys.stderr)
    return gone


def _print(health: Health) -> None:
    for finding in health.findings:
        label = "DAMAGE" if finding.damage else "note"
        print_showable(f"{label}  {finding.kind}: {finding.place}: {finding.text}; {finding.way_out}")
    counts = ", ".join(f"{name} {count:,}" for name, count in health.counts.items())
    damage = sum(finding.damage for finding in health.findings)
    ending = {
        "healthy": "every byte was read, nothing is wrong",
        "unfinished": "what exists is undamaged; the same job goes on, and so does --repair",
        "damaged": f"{damage} {'thing is' if damage == 1 else 'things are'} wrong",
    }
    print_showable(
        f"{health.state}: {health.output}: {health.done:,} of {health.shards:,} shards, {health.rows:,} rows"
        f"{f' ({counts})' if counts else ''}; {ending[health.state]}"
    )


def _progress() -> Callable[[int, int], None]:
    printed = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > PROGRESS_SECONDS:
            printed = time.monotonic()
            print(f"{done:,} of {total:,} commits checked", file=sys.stderr, flush=True)

    return show


def _age(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write 30m, 24h or 7d") from error
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: an age cannot be negative")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.verify",
        "Check a dataset: parts, commits, counts, fingerprints, and files that do not belong to it.",
        EXAMPLES,
    )
    parser.add_argument("output", metavar="OUTPUT", help="the dataset: a folder or an fsspec address")
    parser.add_argument("places", nargs="*", metavar="KEY=PLACE", help="with --repair: where the inputs are now")
    parser.add_argument("--repair", action="store_true", help="compute damaged and missing shards again")
    parser.add_argument("--collect", type=_age, metavar="AGE", help="remove unreferenced files older than 30m, 24h, 7d")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return parser


if __name__ == "__main__":
    run_process(main)
