"""One run's share of a dataset: all of it, or ``cluster.part``, every so many-th shard of it or those that it claims.

Parts need no scheduler: each commits to the same dataset, leaves what it did under ``_parts/``, and the one that finds
every shard committed publishes. Two that find so at once write the same.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from pipeline.config.ranges import AUTO
from pipeline.config.schema import Config
from pipeline.config.validate import part_of
from pipeline.core.errors import OutputBusy
from pipeline.dataset import lease
from pipeline.job.cluster import claims
from pipeline.storage.base import Storage
from pipeline.telemetry import logs
from pipeline.telemetry.run_stats import RunStats

FOLDER = "_parts"
_LEASE = re.compile(rf"{claims.LEASE}(\w+)|{lease.FOLDER}(?:-(\d+)-of-(\d+))?")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """The shards of this run: ``number`` (from 1) of ``count`` equal parts, or, with a ``token``, those it claims."""

    number: int = 1
    count: int = 1
    whole: bool = True
    token: str = ""

    @classmethod
    def of(cls, config: Config) -> Part:
        """The part that the config names; ``auto`` gives a new token."""
        if config.cluster.part == AUTO:
            return cls.elastic(uuid.uuid4().hex[:12])
        part = part_of(config.cluster.part) if config.cluster.part is not None else None
        return cls(*part, whole=False) if part is not None else cls()

    @classmethod
    def elastic(cls, token: str) -> Part:
        """The part of a process that claims its shards."""
        return cls(whole=False, token=token)

    @property
    def name(self) -> str:
        """The name in file names."""
        return f"{AUTO}-{self.token}" if self.token else f"{self.number}-of-{self.count}"

    @property
    def text(self) -> str:
        """The name in messages."""
        if self.token:
            return f"cluster.part={AUTO}"
        return "the whole" if self.whole else f"part {self.number}/{self.count}"

    @property
    def lease(self) -> str:
        """The folder of its lease: parts do not keep one another out."""
        if self.token:
            return f"{claims.LEASE}{self.token}"
        return lease.FOLDER if self.whole else f"{lease.FOLDER}-{self.name}"

    @property
    def log(self) -> str:
        """Its log."""
        return logs.NAME if self.whole else f"{FOLDER}/{self.name}.log"

    def has(self, shard: int) -> bool:
        """True if a shard belongs to this part, or may be claimed by it."""
        return shard % self.count == self.number - 1

    def refuse_others(self, storage: Storage) -> None:
        """Called with the lease in hand; only parts of one count share the work without doing it twice.

        Raises:
            OutputBusy: a run that splits it otherwise is at work.
        """
        for folder, _, holder in lease.holders(storage):
            match = _LEASE.fullmatch(folder)
            if match is None or holder is None:
                continue
            other = Part(int(match[2]), int(match[3]), whole=False) if match[2] else Part()
            other = Part.elastic(match[1]) if match[1] else other
            same = (other.whole, other.count, bool(other.token)) == (self.whole, self.count, bool(self.token))
            if not same and holder.lives():
                raise OutputBusy(
                    f"{storage.url}: {other.text} is held by {holder}, and {self.text} would do the same work; "
                    "wait until it ends, or stop it"
                )

    def record(self, storage: Storage, stats: RunStats) -> None:
        """Write the statistics of this part."""
        named = replace(stats, workers=tuple(replace(worker, name=self.name) for worker in stats.workers))
        storage.write(_record(self.name), (json.dumps(named.to_json(), indent=2) + "\n").encode())

    def merged(self, storage: Storage, stats: RunStats) -> RunStats:
        """Write the statistics of this part; return the sum of those of all parts that have written theirs.

        Parts ``NUMBER/COUNT`` add up with those of the same count.
        """
        if self.whole:
            return stats
        # A run that finds nothing left to do keeps the record of the first one.
        if stats.rows or (not self.token and _read(storage, self.name) is None):
            self.record(storage, stats)
        if self.token:
            names = [name[:-5] for name in sorted(storage.sizes(FOLDER)) if re.fullmatch(rf"{AUTO}-\w+\.json", name)]
        else:
            names = [Part(number, self.count).name for number in range(1, self.count + 1)]
        found = [_read(storage, name) for name in names]
        return reduce(add, [each for each in found if each is not None] or [stats])


def _record(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _read(storage: Storage, name: str) -> RunStats | None:
    try:
        values = json.loads(storage.read(_record(name)) or b"null")
        return RunStats.from_json(values) if values else None
    except (ValueError, TypeError, KeyError):
        # Of a part that has not ended yet; or not written by this, and then the report knows nothing of it.
        return None
