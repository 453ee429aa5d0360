"""Commits: which part counts for which shard, who is done, and the end of a dataset.

A part is published under a name that holds its digest and is never overwritten. A commit is created
once; the first one wins, a second attempt at the same shard loses quietly. Correctness rests on that
alone, so a run may be killed anywhere and two runs may overlap.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.addresses import explained
from pipeline.dataset.parts import PartFormat, write_part
from pipeline.dataset.plan import Plan
from pipeline.errors import StorageError
from pipeline.failpoints import failpoint
from pipeline.records import ShardReport
from pipeline.storage.base import Storage, sha256

FOLDER = "_commits"
SUCCESS = "_SUCCESS"
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
    """Write, flush and publish a part, then commit it, unless somebody else has committed the shard."""
    with storage.staged() as staged, explained(storage.url):
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


def find_done(storage: Storage, plan: Plan) -> dict[int, Commit]:
    """The shards that need no work: a commit whose part is there with its size and digest.

    Anything else (torn, foreign, part missing or damaged) is said, and cleared so that the shard can be
    done again.
    """
    # Commits first: a part is there before its commit, so a shard that another run commits meanwhile
    # is not taken for one without a part.
    names = sorted(name for name in storage.sizes(FOLDER) if name.endswith(".json"))
    sizes = storage.sizes()
    with ThreadPoolExecutor(8) as pool:
        checked = list(pool.map(lambda name: _check(storage, plan, sizes, name), names))
    done = {commit.shard: commit for commit, problem in checked if commit is not None and not problem}
    if len(done) < plan.shards:
        storage.remove(SUCCESS)
    for name, (commit, problem) in zip(names, checked, strict=True):
        if problem:
            log.warning("%s/%s: %s; the shard is done again", FOLDER, name, problem)
            # The part first: a damaged one must never outlive its commit and be met by the next. What a bad
            # commit names is removed only if it is a file of this dataset.
            if commit is not None and commit.part in sizes:
                storage.remove(commit.part)
            storage.remove(f"{FOLDER}/{name}")
    return done


def read_commits(storage: Storage, plan: Plan) -> list[Commit]:
    """Every commit by shard, without looking at the parts again.

    Raises:
        StorageError: one is missing or torn.
    """
    commits = []
    for shard in range(plan.shards):
        commit = _parse(storage.read(_name(shard)))
        if commit is None:
            raise StorageError(f"{storage.url}/{_name(shard)}: missing or torn; run the same command again")
        commits.append(commit)
    return commits


def finalize(storage: Storage, plan: Plan, commits: Iterable[Commit]) -> dict[str, int]:
    """Check that the commits cover the plan, clear what nobody refers to, write ``_SUCCESS``.

    Returns:
        Rows by status over the whole dataset.

    Raises:
        StorageError: the counts do not add up.
    """
    failpoint("finalize.begin")
    ordered = sorted(commits, key=lambda commit: commit.shard)
    counts: Counter[str] = Counter()
    for commit in ordered:
        counts.update(commit.counts)
    rows = sum(commit.rows for commit in ordered)
    if len(ordered) != plan.shards or rows != plan.rows or sum(counts.values()) != rows:
        raise StorageError(
            f"{storage.url}: {len(ordered)} of {plan.shards} shards and {rows} of {plan.rows} rows are committed; "
            "run the same command again"
        )
    sizes = storage.sizes()
    lost = [commit.part for commit in ordered if sizes.get(commit.part) != commit.size]
    if lost:
        raise StorageError(f"{storage.url}/{lost[0]}: missing or torn; run the same command again")
    failpoint("finalize.checked")
    # Every shard is decided, so a part without a commit is a left-over, and readers would count it twice.
    parts = {commit.part for commit in ordered}
    for name in sizes:
        if name.startswith("part-") and name.endswith(".parquet") and name not in parts:
            storage.remove(name)
    storage.sweep()
    failpoint("finalize.cleared")
    content = {"rows": rows, "counts": dict(sorted(counts.items())), "parts": [commit.part for commit in ordered]}
    marker = (json.dumps(content, indent=2) + "\n").encode()
    if storage.read(SUCCESS) != marker:
        storage.write(SUCCESS, marker)
    failpoint("finalize.done")
    return dict(counts)


def _name(shard: int) -> str:
    return f"{FOLDER}/{shard:05d}.json"


def _parse(data: bytes | None) -> Commit | None:
    try:
        values: dict[str, Any] = json.loads(data or b"")
        return Commit(**values)
    except (ValueError, TypeError):
        return None


def _check(storage: Storage, plan: Plan, sizes: Mapping[str, int], name: str) -> tuple[Commit | None, str]:
    commit = _parse(storage.read(f"{FOLDER}/{name}"))
    if commit is None:
        return None, "the commit is torn"
    if not 0 <= commit.shard < plan.shards or f"{FOLDER}/{name}" != _name(commit.shard):
        return None, f"the commit is of a foreign shard ({commit.shard})"
    if commit.part not in sizes:
        return commit, f"its part {commit.part} is missing"
    if sizes[commit.part] != commit.size:
        return commit, f"its part has {sizes[commit.part]} bytes, not {commit.size}"
    if storage.digest(commit.part) != commit.sha256:
        return commit, "its part has another digest"
    return commit, ""
