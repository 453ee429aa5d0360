"""Verification of a dataset: every part against its commit, every count against the plan, every file accounted for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from json import loads
from typing import Any

from pipeline.core.concurrency import in_order
from pipeline.core.errors import NoDataset, PlanMismatch
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.problems import prefix_of
from pipeline.storage.base import TEMPORARY, Storage

BOOKS = {
    *(plan.NAME, commits.SUCCESS, "_report.json", "_report.html", "_run.log", "_parity.json", "_decoder_parity.json"),
    # Those of a night, of this version and of earlier ones.
    *("_night.json", "_rows.night", "_dropped.night", "_rows.parquet", "_dropped.parquet"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: a short name, the file, a sentence, and what to do.

    ``damage`` is False where the rows are whole all the same, as with a left-over temporary file.
    """

    kind: str
    place: str
    text: str
    way_out: str
    damage: bool


@dataclass(frozen=True, slots=True)
class Health:
    """Findings about a dataset after every byte of it was read; ``done`` shards are committed and whole."""

    output: str
    finished: bool
    rows: int
    shards: int
    done: int
    counts: Mapping[str, int]
    findings: Sequence[Finding]

    @property
    def state(self) -> str:
        """``healthy``, ``unfinished`` (what is there is whole) or ``damaged``."""
        if any(finding.damage for finding in self.findings):
            return "damaged"
        return "healthy" if self.finished else "unfinished"


@dataclass(frozen=True, slots=True)
class _Listing:
    """Files of a dataset, listed before any of them is read.

    ``marker`` is the content of ``_SUCCESS``, ``names`` are the files of ``_commits``, ``sizes`` those beside it.
    """

    storage: Storage
    marker: bytes | None
    names: Sequence[str]
    sizes: Mapping[str, int]

    @property
    def finished(self) -> bool:
        """True if ``_SUCCESS`` is there."""
        return self.marker is not None

    @property
    def repair(self) -> str:
        """The command that has damaged shards done again."""
        return f"python -m pipeline.verify {self.storage.url} --repair"


@dataclass(slots=True)
class _Committed:
    """Sums over the sound commits, and the findings about the others; ``parts`` are file names by shard."""

    findings: list[Finding] = field(default_factory=list)
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    parts: dict[int, str] = field(default_factory=dict)


def verify(storage: Storage, *, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Health:
    """Look at every file of a dataset; nothing is changed.

    Args:
        storage: the dataset.
        on_shard: called with the commits that were looked at, and all of them.

    Raises:
        NoDataset: neither a plan nor a part is there.
        StorageError: the storage does not answer, which says nothing about the dataset.
    """
    # The marker first, as it comes last, then the commits: a part is there before its commit, so that a job
    # that runs meanwhile is not reported as damage.
    marker = storage.read(commits.SUCCESS)
    names = sorted(storage.sizes(commits.FOLDER))
    listing = _Listing(storage, marker, names, storage.sizes())
    try:
        wanted = plan.read(storage)
    except PlanMismatch as error:
        return _without_plan(storage, str(error))
    if wanted is None:
        if not names and not any(commits.is_part(name) for name in listing.sizes):
            raise NoDataset(f"{storage.url}: no dataset is here; give the output.dir of a job")
        return _without_plan(storage, f"{storage.url}/{plan.NAME}: missing")
    done = _check_commits(listing, wanted, on_shard)
    findings = [
        *done.findings,
        *_check_marker(listing, wanted, done),
        *_check_plan(wanted),
        *_unexpected_files(listing, wanted, done.parts),
        *_leases(storage),
    ]
    return Health(
        output=storage.url,
        finished=listing.finished,
        rows=done.rows,
        shards=wanted.shards,
        done=len(done.parts),
        counts=dict(sorted(done.counts.items())),
        findings=findings,
    )


def collect(storage: Storage, *, age: float, confirm: Callable[[], None]) -> dict[str, int]:
    """Remove parts that no commit names, and temporary files, if they were written more than ``age`` seconds ago.

    The caller holds the lease, and ``confirm`` raises if it is another run's by now. Whatever may still be wanted
    stays: what a commit or ``_SUCCESS`` names, every part of a shard without a sound commit in a dataset that was
    finished, and every file whose storage does not say when it was written.

    Returns:
        The files that are gone, with their sizes in bytes.

    Raises:
        NoDataset: there is no plan, so that nothing tells what is wanted.
    """
    wanted = plan.read(storage)
    if wanted is None:
        raise NoDataset(f"{storage.url}: no {plan.NAME}, so nothing tells which files are wanted; none is removed")
    marker = storage.read(commits.SUCCESS)
    entries = storage.entries()
    names = sorted(storage.sizes(commits.FOLDER))
    read = in_order(partial(commits.read_commit, storage), names, threads=storage.threads)
    found = dict(zip(names, read, strict=True))
    named = {commit.part for commit in found.values() if commit is not None}
    decided = {prefix_of(commit.shard) for commit in found.values() if commit is not None}
    torn = {prefix_of(int(name[:-5])) for name, commit in found.items() if commit is None and name[:-5].isdigit()}
    named |= {name for name in entries if marker is not None and name.encode() in marker}
    gone, latest = {}, time.time() - age
    confirm()
    for name, entry in sorted(entries.items()):
        prefix = name.rpartition("-")[0] + "-"
        kept = name in named or prefix in torn or (marker is not None and prefix not in decided)
        free = commits.is_part(name) and not kept
        if (free or name.startswith(TEMPORARY)) and 0 < entry.modified < latest:
            storage.remove(name)
            gone[name] = entry.size
    return gone


def _without_plan(storage: Storage, trouble: str) -> Health:
    way_out = "restore it from a copy, or run the job again into another output.dir"
    found = [Finding("damaged plan", plan.NAME, trouble, way_out, damage=True)]
    return Health(storage.url, finished=False, rows=0, shards=0, done=0, counts={}, findings=found)


def _check_commits(listing: _Listing, wanted: plan.Plan, on_shard: Callable[[int, int], None]) -> _Committed:
    """Compare every commit with the plan and with every byte of its part."""
    done = _Committed()
    files = [name for name in listing.names if name.endswith(".json")]
    look = partial(commits.check, listing.storage, wanted, listing.sizes.get)
    for number, each in enumerate(in_order(look, files, threads=listing.storage.threads), 1):
        if each.problem:
            place = f"{commits.FOLDER}/{each.name}"
            done.findings.append(Finding(each.kind, place, each.problem, listing.repair, damage=True))
        elif each.commit is not None:
            done.rows += each.commit.rows
            done.counts.update(each.commit.counts)
            done.parts[each.commit.shard] = each.commit.part
        on_shard(number, len(files))
    return done


def _check_marker(listing: _Listing, wanted: plan.Plan, done: _Committed) -> Iterator[Finding]:
    """Compare ``_SUCCESS``, if it is there, with the commits."""
    if listing.marker is None:
        return
    there = set(listing.names)
    for shard in range(wanted.shards):
        if f"{shard:05d}.json" not in there:
            text = f"shard {shard} has no commit, though {commits.SUCCESS} says that all is done"
            place = f"{commits.FOLDER}/{shard:05d}.json"
            yield Finding("missing commit", place, text, listing.repair, damage=True)
    if len(done.parts) != wanted.shards:
        return
    try:
        found: Any = loads(listing.marker)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        yield Finding("wrong marker", commits.SUCCESS, "it is torn", listing.repair, damage=True)
        return
    parts = [done.parts[shard] for shard in sorted(done.parts)]
    for key, value in {"rows": done.rows, "counts": dict(done.counts), "parts": parts}.items():
        if found.get(key) != value:
            text = f"its {key} are not those of the commits"
            yield Finding("wrong marker", commits.SUCCESS, text, listing.repair, damage=True)


def _check_plan(wanted: plan.Plan) -> Iterator[Finding]:
    if wanted.counted and wanted.shards != -(-wanted.rows // wanted.shard_rows):
        text = f"{wanted.rows} rows by {wanted.shard_rows} do not make {wanted.shards} shards"
        yield Finding("damaged plan", plan.NAME, text, "run the job into another output.dir", damage=True)


def _unexpected_files(listing: _Listing, wanted: plan.Plan, parts: Mapping[int, str]) -> Iterator[Finding]:
    """Files and folders that neither the plan nor a commit accounts for."""
    storage, finished = listing.storage, listing.finished
    named, clear = set(parts.values()), f"python -m pipeline.verify {storage.url} --collect 24h"
    for name in sorted(set(listing.sizes) - named - BOOKS):
        if name.startswith(TEMPORARY):
            text = "left by a killed run, or just being written"
            yield Finding("temporary file", name, text, clear, damage=False)
        elif commits.is_part(name):
            shard = name.split("-")[1]
            # A part of a shard that has to be done again anyway is reported with its commit.
            again = shard.isdigit() and int(shard) < wanted.shards and int(shard) not in parts
            if not again or (not finished and f"{shard}.json" not in listing.names):
                text = "no commit names it" + ("; readers see its rows twice" if finished else "")
                yield Finding("stray part", name, text, listing.repair if finished else clear, damage=finished)
        elif name.endswith((".parquet", ".pq")) and not name.startswith(("_", ".")):
            text = "no file of this dataset; readers mix its rows with the dataset's"
            yield Finding("foreign file", name, text, "move it elsewhere", damage=True)
        else:
            yield Finding("unknown file", name, "no file of this dataset", "move it elsewhere", damage=False)
    for name in storage.folders():
        if not name.startswith(("_", ".")):
            text = "a folder within the dataset; readers mix the rows of Parquet files in it with the dataset's"
            yield Finding("foreign folder", name, text, "move it elsewhere", damage=True)
    for name in listing.names:
        if not name.endswith(".json"):
            place = f"{commits.FOLDER}/{name}"
            yield Finding("unknown file", place, "no commit", "move it elsewhere", damage=False)


def _leases(storage: Storage) -> Iterator[Finding]:
    for _, name, holder in lease.holders(storage):
        if holder is not None and holder.lives():
            text = f"a run is at work: {holder}"
            yield Finding("lease", name, text, "look again when it has ended", damage=False)
        else:
            text = f"left by a run that is gone: {holder or 'torn'}"
            yield Finding("stale lease", name, text, "the next run takes it over", damage=False)
