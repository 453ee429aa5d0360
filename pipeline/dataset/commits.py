"""Commits: the part that counts for each shard, the shards that are done, and the end of a dataset.

A part is published under a name that holds its digest and is never overwritten. A commit is created
once; the first one wins, a second attempt at the same shard loses quietly. Correctness rests on that
alone, so a run may be killed anywhere and two runs may overlap.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.core.concurrency import in_order
from pipeline.core.errors import ManifestError, StorageError
from pipeline.core.failpoints import failpoint
from pipeline.core.records import ShardReport
from pipeline.dataset.parts import PartFormat, write_part
from pipeline.dataset.plan import Plan
from pipeline.dataset.plan import read as read_plan
from pipeline.dataset.problems import PartRecord, Proof, audit, prefix_of
from pipeline.storage.base import Storage, sha256
from pipeline.storage.urls import explained

FOLDER = "_commits"
SUCCESS = "_SUCCESS"
_PART = re.compile(r"part-\d{5,}-[0-9a-f]{16}\.parquet")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Commit:
    """The part that counts for a shard; ``size`` (bytes) and ``sha256`` are of the Parquet file."""

    shard: int
    part: str
    rows: int
    size: int
    sha256: str
    counts: Mapping[str, int]

    def to_json(self) -> bytes:
        """The content of a commit file."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def commit_part(
    storage: Storage, shard: int, table: pa.Table, form: PartFormat, counts: Mapping[str, int]
) -> ShardReport:
    """Write, flush and publish a part, then commit it, unless another run has committed the shard."""
    with storage.staged() as staged:
        # The disk that fills up is that of the temporary file, which for an object store lies elsewhere.
        with explained(str(staged.path.with_name(f"part-{shard:05d}-*.parquet")), needed=table.nbytes):
            failpoint("part.write")
            write_part(table, staged.path, form)
            failpoint("part.written")
            digest, size = sha256(staged.path), staged.path.stat().st_size
        part = f"part-{shard:05d}-{digest[:16]}.parquet"
        staged.publish(part)
    failpoint("part.published")
    commit = Commit(shard=shard, part=part, rows=table.num_rows, size=size, sha256=digest, counts=counts)
    won = storage.create_once(_name(shard), commit.to_json())
    failpoint("commit.done" if won else "commit.lost")
    if not won:
        first = _parse(storage.read(_name(shard)))
        if first is not None and first.part != part:
            storage.remove(part)
    return ShardReport(shard=shard, part=part, rows=table.num_rows, counts=counts, committed=won)


def commit_shared(storage: Storage, commit: Commit) -> bool:
    """Commit a part that exists already, unless another run has committed the shard; True if this did."""
    won = storage.create_once(_name(commit.shard), commit.to_json())
    failpoint("commit.done" if won else "commit.lost")
    return won


def find_done(
    storage: Storage, plan: Plan, confirm: Callable[[], None] = lambda: None, *, every_byte: bool = True
) -> dict[int, Commit]:
    """The shards that need no work, see :func:`look`; other commits are logged and cleared, so that their
    shards are done again.

    ``confirm`` is called before anything is cleared, and raises if the output is another run's by now.
    """
    plan = _with_sources(storage, plan)
    done, bad = _look(storage, plan, every_byte=every_byte)
    if len(done) < plan.shards:
        confirm()
        storage.remove(SUCCESS)
    for each in bad:
        log.warning("%s/%s: %s; the shard is done again", FOLDER, each.name, each.problem)
        confirm()
        _discard(storage, plan, each, every_byte=every_byte)
    return done


def listed(storage: Storage) -> set[int]:
    """The shards of all commits that are there; none is read."""
    names = (name.removesuffix(".json") for name in storage.sizes(FOLDER))
    return {int(name) for name in names if name.isdigit()}


def has(storage: Storage, shard: int) -> bool:
    """True if there is a commit of a shard; it is not read."""
    return storage.size(_name(shard)) is not None


def look(storage: Storage, plan: Plan, *, every_byte: bool = True) -> tuple[dict[int, Commit], list[Checked]]:
    """The shards that need no work: a commit whose part is there, whole, and of this plan; and what is anything else
    (torn, foreign, part missing or damaged). Nothing is changed.

    Without ``every_byte``, the commit stands for the plan that a part is of, and an object store for the bytes: of a
    part that was not written after its commit, and of one whose digest it keeps. A local disk is read.
    """
    return _look(storage, _with_sources(storage, plan), every_byte=every_byte)


def _look(storage: Storage, plan: Plan, *, every_byte: bool) -> tuple[dict[int, Commit], list[Checked]]:
    # Commits first: a part is there before its commit, so a shard that another run commits meanwhile
    # is not taken for one without a part.
    committed = storage.entries(FOLDER)
    parts = storage.entries()

    def size_of(part: str) -> int | None:
        return parts[part].size if part in parts else None

    def proof(record: PartRecord) -> bool:
        """The writer uploads a part with its digest, which the store compares, before it writes the commit."""
        part, commit = parts.get(record.part), committed.get(f"{record.shard:05d}.json")
        since = storage.remote and part is not None and commit is not None and 0 < part.modified <= commit.modified
        return since or _is_proven(storage, record)

    names = sorted(name for name in committed if name.endswith(".json"))
    checked = partial(check, storage, plan, size_of, proof=None if every_byte else proof)
    done, bad = dict[int, Commit](), list[Checked]()
    for each in in_order(checked, names, threads=storage.threads):
        if each.problem:
            bad.append(each)
        elif each.commit is not None:
            done[each.commit.shard] = each.commit
    return done, bad


def _with_sources(storage: Storage, plan: Plan) -> Plan:
    """Add the sources of shared parts, which only the stored plan knows."""
    kept = read_plan(storage)
    return replace(plan, sources=kept.sources) if kept is not None and kept.sources else plan


def read_commits(storage: Storage, plan: Plan, *, known: Mapping[int, Commit] | None = None) -> list[Commit]:
    """Every commit by shard, without looking at the parts again.

    Those that are ``known``, as :func:`find_done` gave them, are not read again while they are there.

    Raises:
        StorageError: one is missing or torn.
    """
    sizes, known = storage.sizes(FOLDER), known or {}

    def read(shard: int) -> Commit:
        name, commit = _name(shard), known.get(shard)
        if commit is None or sizes.get(name.removeprefix(f"{FOLDER}/")) != len(commit.to_json()):
            commit = _parse(storage.read(name))
        if commit is None:
            raise StorageError(f"{storage.url}/{name}: missing or torn; run the same command again")
        return commit

    return list(in_order(read, range(plan.shards), threads=storage.threads))


def read_present(storage: Storage, plan: Plan, *, known: Mapping[int, Commit]) -> list[Commit]:
    """The commits that are there, by shard; those of other parts of the job may be missing.

    ``known`` are not read again, see :func:`read_commits`.

    Raises:
        StorageError: every commit is there, and one is torn.
    """
    there = storage.sizes(FOLDER)
    names = [_name(shard) for shard in range(plan.shards)]
    present = [name for name in names if name.removeprefix(f"{FOLDER}/") in there]
    if len(present) == len(names):
        return read_commits(storage, plan, known=known)
    read = in_order(lambda name: _parse(storage.read(name)), present, threads=storage.threads)
    return [commit for commit in read if commit is not None]


def finalize(
    storage: Storage, plan: Plan, commits: Iterable[Commit], confirm: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Check that the commits cover the plan, clear unused files, write ``_SUCCESS``.

    ``confirm`` is called before anything is cleared or written, and raises if the output is another run's by now.

    Returns:
        Rows by status over the whole dataset.

    Raises:
        StorageError: the counts do not add up.
        ManifestError: there are no rows, in any of some tars.
    """
    failpoint("finalize.begin")
    ordered = sorted(commits, key=lambda commit: commit.shard)
    counts: Counter[str] = Counter()
    for commit in ordered:
        counts.update(commit.counts)
    rows = sum(commit.rows for commit in ordered)
    wanted = plan.rows if plan.counted else rows
    if len(ordered) != plan.shards or rows != wanted or sum(counts.values()) != rows:
        raise StorageError(
            f"{storage.url}: {len(ordered)} of {plan.shards} shards and {rows} of {wanted} rows are committed; "
            "run the same command again"
        )
    if not rows:
        raise ManifestError(f"{storage.url}: no tar of the manifest holds an image, so there is nothing to publish")
    sizes = storage.sizes()
    lost = [commit.part for commit in ordered if sizes.get(commit.part) != commit.size]
    if lost:
        raise StorageError(f"{storage.url}/{lost[0]}: missing or torn; run the same command again")
    failpoint("finalize.checked")
    # Every shard is decided, so a part without a commit is a left-over, and readers would count it twice.
    parts = {commit.part for commit in ordered}
    confirm()
    for name in sizes:
        if is_part(name) and name not in parts and _is_decided(storage, plan, name):
            log.info("%s: no commit names it; removed", name)
            storage.remove(name)
    storage.sweep()
    failpoint("finalize.cleared")
    content = {"rows": rows, "counts": dict(sorted(counts.items())), "parts": [commit.part for commit in ordered]}
    marker = (json.dumps(content, indent=2) + "\n").encode()
    if storage.read(SUCCESS) != marker:
        confirm()
        storage.write(SUCCESS, marker)
    failpoint("finalize.done")
    return dict(counts)


def _name(shard: int) -> str:
    return f"{FOLDER}/{shard:05d}.json"


def _parse(data: bytes | None) -> Commit | None:
    try:
        values: dict[str, Any] = json.loads(data or b"")
        commit = Commit(**values)
    except (ValueError, TypeError):
        return None
    numbers = (commit.shard, commit.rows, commit.size)
    texts = (commit.part, commit.sha256)
    sound = all(type(value) is int for value in numbers) and all(isinstance(value, str) for value in texts)
    counts: Any = commit.counts
    sound = sound and isinstance(counts, dict) and all(type(value) is int for value in counts.values())
    return commit if sound else None


@dataclass(frozen=True, slots=True)
class Checked:
    """A checked commit file: its content, and the problem of it or its part, if any.

    ``kind`` is a short name of the problem; ``data`` are the bytes that were checked.
    """

    name: str
    commit: Commit | None
    kind: str = ""
    problem: str = ""
    data: bytes | None = None


def check(
    storage: Storage, plan: Plan, size_of: Callable[[str], int | None], name: str, *, proof: Proof | None = None
) -> Checked:
    """Look at a commit file and at its part; ``size_of`` and ``proof`` are as for :func:`audit`."""
    data = storage.read(f"{FOLDER}/{name}")
    commit = _parse(data)
    if commit is None:
        return Checked(name, None, "torn commit", "the commit is torn", data)
    if not 0 <= commit.shard < plan.shards or f"{FOLDER}/{name}" != _name(commit.shard):
        return Checked(name, None, "foreign commit", f"the commit is of a foreign shard ({commit.shard})", data)
    problem = audit(storage, plan, size_of, PartRecord(**asdict(commit)), proof)
    if problem is None:
        return Checked(name, commit)
    return Checked(name, commit, problem.kind, problem.text, data)


def read_commit(storage: Storage, name: str) -> Commit | None:
    """Content of a commit file; None if it is torn or missing."""
    return _parse(storage.read(f"{FOLDER}/{name}"))


def is_part(name: str) -> bool:
    """True if a file of the output is named like a part."""
    return _PART.fullmatch(name) is not None


def _is_decided(storage: Storage, plan: Plan, part: str) -> bool:
    """True if the shard in the name of a part is not in the plan, or now has a commit for another part.

    Another run may have taken the output over, and published what it has not committed yet.
    """
    shard = int(part.split("-")[1])
    if shard >= plan.shards:
        return True
    commit = _parse(storage.read(_name(shard)))
    return commit is not None and commit.part != part


def _is_proven(storage: Storage, record: PartRecord) -> bool:
    """True if the storage keeps the digest of a part that its commit names."""
    return storage.proven(record.part) == record.sha256


def _discard(storage: Storage, plan: Plan, bad: Checked, *, every_byte: bool) -> None:
    """Clear a bad commit and its part, unless another run has repaired them since they were checked."""

    def size_of(part: str) -> int | None:
        return storage.size(part) if is_part(part) else None

    now = check(storage, plan, size_of, bad.name, proof=None if every_byte else partial(_is_proven, storage))
    if now.data is None or not now.problem:
        return
    # The part first: a damaged one must never outlive its commit and be used by the next. The part that a bad commit
    # names is removed only if it is one of its own shard.
    commit = now.commit
    if commit is not None and commit.part.startswith(prefix_of(commit.shard)) and is_part(commit.part):
        storage.remove(commit.part)
    storage.remove(f"{FOLDER}/{bad.name}")
