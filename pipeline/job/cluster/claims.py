"""Shards that the processes of a job claim from one another: ``cluster.part=auto``.

Each process holds a lease of its own (:mod:`pipeline.dataset.lease`) and claims a shard by creating a file that names
the lease. The claim ends with the commit of the shard. If the lease is gone or silent, the claim is taken over by
creating the file of the next number, which exactly one process achieves. Correctness rests on the commits alone: of two
processes that do the same shard, one commits it, and the bytes are the same.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.core.errors import StorageError
from pipeline.core.processes import is_gone
from pipeline.core.records import Shard
from pipeline.dataset import commits, lease
from pipeline.storage.base import Storage

FOLDER = "_claims"
# Of the folders of the leases that claims name.
LEASE = f"{lease.FOLDER}-auto-"
# A shard is given up after this many processes died with it; all but the first had no other shard.
TRIES = 10
# Seconds between two looks at the claims of others, while there is nothing else to do.
SHORTEST, LONGEST = 0.2, 15.0
# The claim of the process that publishes the dataset.
_END = "end"
_FILE = re.compile(r"(\d{5,}|end)-(\d+)\.json")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Claims:
    """The claims of this process, and a view of those of the others.

    Attributes:
        storage: the output.
        lease: the folder of this process's lease, which its claims name.
        seconds: a lease that stays as it is for so long is silent; by this machine's clock.
        check: called while this waits; raises if the run must stop.
        given_up: shards with which :data:`TRIES` processes died.
    """

    storage: Storage
    lease: str
    seconds: float
    check: Callable[[], None]
    given_up: set[int] = field(default_factory=set)
    _open: dict[int, Shard] = field(default_factory=dict)
    # The highest number of the claims of a shard.
    _numbers: dict[str, int] = field(default_factory=dict)
    _own: dict[str, int] = field(default_factory=dict)
    _named: dict[str, str] = field(default_factory=dict)
    _seen: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def rounds(self, shards: Iterable[Shard]) -> Iterator[Iterator[Shard]]:
        """Shards to do, until every shard has a commit: first those that nobody has claimed, claimed as they are taken.

        After a round its shards must have commits, see :meth:`committed`. A shard that another process left is alone in
        its round, so that a shard which ends every process takes no others with it. While others work on all that is
        left, this waits.
        """
        self._open = {shard.index: shard for shard in shards}
        self._look()
        # The first one may be empty.
        yield self._take(self._free())
        waiting = False
        while self._look():
            if free := self._free():
                yield self._take(free)
            elif (left := self._left_by_others()) is not None:
                yield iter([left])
            elif self._open and not waiting:
                waiting = True
                log.info("%s: other processes do the last %d shards", self.storage.url, len(self._open))
            elif self._open:
                self._wait()

    def committed(self, shard: int) -> None:
        """Remove the claims of a shard that has a commit now."""
        self._open.pop(shard, None)
        key = _key(shard)
        for number in range(self._own.pop(key, 0), 0, -1):
            self.storage.remove(_name(key, number))

    def end(self) -> bool:
        """Wait until another process has published the dataset; True if this one must do it, and then :meth:`clear`."""
        said = False
        while True:
            self._look()
            number = self._numbers.get(_END, 0)
            if not number or self._is_left(_END, number):
                if self._create(_END, number + 1):
                    return True
                continue
            if not said:
                said = True
                log.info("%s: all shards are done; another process publishes the dataset", self.storage.url)
            while not (ended := self.storage.read(_name(_END, number)) is None) and not self._is_left(_END, number):
                self._wait()
            if ended and self.storage.read(commits.SUCCESS) is not None:
                return False

    def clear(self) -> None:
        """Remove what processes that are gone left: claims, and leases."""
        own = {_name(key, number) for key, number in self._own.items()}
        for name in self.storage.sizes(FOLDER):
            if f"{FOLDER}/{name}" not in own:
                self.storage.remove(f"{FOLDER}/{name}")
        for folder in self.storage.folders():
            if folder.startswith(LEASE) and folder != self.lease and self._is_over(folder):
                lease.remove(self.storage, folder)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        # Shards that were not done are free again at once; claims of earlier processes stay, and count as tries.
        with suppress(StorageError):
            for key, number in self._own.items():
                self.storage.remove(_name(key, number))

    def _look(self) -> dict[int, Shard]:
        """List claims and commits; return the open shards."""
        self.check()
        # Claims first: one that ends meanwhile has left its commit.
        self._numbers = {}
        for match in map(_FILE.fullmatch, self.storage.sizes(FOLDER)):
            if match is not None:
                self._numbers[match[1]] = max(int(match[2]), self._numbers.get(match[1], 0))
        for shard in commits.listed(self.storage):
            self._open.pop(shard, None)
        return self._open

    def _free(self) -> list[Shard]:
        # Another thread removes those that it has committed.
        return [shard for index, shard in list(self._open.items()) if _key(index) not in self._numbers]

    def _take(self, free: list[Shard]) -> Iterator[Shard]:
        """Claim shards one after the other, from a random one on, so that processes rarely want the same."""
        while free:
            at = random.randrange(len(free))
            for shard in (*free[at:], *free[:at]):
                if not self._claim(shard, 1):
                    # Another process came along here: go on elsewhere.
                    break
                yield shard
            self._look()
            free = self._free()

    def _left_by_others(self) -> Shard | None:
        """Take over the claim of a process that is gone, if there is one."""
        for index, shard in random.sample(list(self._open.items()), len(self._open)):
            key = _key(index)
            number = self._numbers[key]
            if not self._is_left(key, number):
                continue
            if number >= TRIES:
                self.given_up.add(index)
                self._open.pop(index)
            elif self._claim(shard, number + 1):
                log.info("shard %d was claimed by a process that is gone; this one does it", index)
                return shard
        return None

    def _claim(self, shard: Shard, number: int) -> bool:
        key = _key(shard.index)
        if not self._create(key, number):
            return False
        if commits.has(self.storage, shard.index):
            # It was committed, and its claim removed, since this process looked.
            self.committed(shard.index)
            return False
        return True

    def _create(self, key: str, number: int) -> bool:
        data = (json.dumps({"lease": self.lease}) + "\n").encode()
        if not self.storage.create_once(_name(key, number), data):
            return False
        self._own[key] = number
        return True

    def _is_left(self, key: str, number: int) -> bool:
        """True if the process that holds a claim is gone; a torn claim holds nothing."""
        name = _name(key, number)
        if name not in self._named:
            try:
                self._named[name] = str(json.loads(self.storage.read(name) or b"")["lease"])
            except (ValueError, TypeError, KeyError):
                return True
        return self._is_over(self._named[name])

    def _is_over(self, folder: str) -> bool:
        """True if a lease was released, or its process has ended, or it was not renewed while this one looked on."""
        found = self.storage.read(f"{folder}/1.json")
        holder = lease.parse(found)
        if found is None or (holder is not None and is_gone(holder.process)):
            return True
        data, since = self._seen.get(folder, (b"", 0.0))
        if data != found:
            self._seen[folder] = found, time.monotonic()
            return False
        return time.monotonic() - since > (self.seconds if holder is None else holder.seconds)

    def _wait(self) -> None:
        # The more claims there are to look at, the more rarely.
        pause = min(max(SHORTEST, self.seconds / 60, len(self._open) / 50), LONGEST)
        end = time.monotonic() + pause
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 1.0))


def _key(shard: int) -> str:
    return f"{shard:05d}"


def _name(key: str, number: int) -> str:
    return f"{FOLDER}/{key}-{number}.json"
