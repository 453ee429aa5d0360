"""The lease on an output: two runs do not do the same work at the same time.

Leases are numbered files; a number is created once, and the holder of the highest one works. A lease whose holder
is gone is taken over by creating the next number, which exactly one run achieves. Correctness never rests on a
lease: a commit is created once, by any run. So a lease may be lost, or held twice for a moment, and the
dataset is the same.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from pipeline.core.errors import LeaseLost, OutputBusy, StorageError
from pipeline.core.failpoints import failpoint
from pipeline.core.processes import Process, is_gone, this_process
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage

FOLDER = "_lease"
_NUMBERED = re.compile(r"(\d+)\.json")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Holder of a lease: ``since`` and ``renewed`` are in ISO 8601, UTC; it must renew within ``seconds``."""

    token: str
    process: Process
    since: str
    renewed: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.process} since {self.since}"

    def to_json(self) -> bytes:
        """The content of a lease file."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()

    def silent(self) -> bool:
        """True if it did not renew in time, by the clock; a date in the future counts as none."""
        try:
            age = (datetime.now(UTC) - datetime.fromisoformat(self.renewed)).total_seconds()
        except (ValueError, TypeError):
            return True
        return abs(age) > self.seconds

    def lives(self) -> bool:
        """True if it renewed in time, and its process is not known to have ended."""
        return not self.silent() and not is_gone(self.process)


def parse(data: bytes | None) -> Holder | None:
    """The holder that a lease file names; None if it is torn or gone."""
    try:
        values = json.loads(data or b"")
        process = Process(**{**values["process"], "pid": int(values["process"]["pid"])})
        return Holder(**{**values, "process": process, "seconds": float(values["seconds"])})
    except (ValueError, TypeError, KeyError):
        return None


def leases(storage: Storage, folder: str = FOLDER) -> dict[int, str]:
    """The lease files of an output by number, lowest first."""
    found = ((_NUMBERED.fullmatch(name), name) for name in storage.entries(folder))
    return dict(sorted((int(match[1]), f"{folder}/{name}") for match, name in found if match))


def holders(storage: Storage) -> Iterator[tuple[str, str, Holder | None]]:
    """The folder, the file and the holder of every lease of an output, those of parts too; None for a torn one."""
    for folder in storage.folders():
        if folder == FOLDER or folder.startswith(f"{FOLDER}-"):
            for name in leases(storage, folder).values():
                yield folder, name, parse(storage.read(name))


def remove(storage: Storage, folder: str) -> None:
    """Remove the lease of a run that is gone, of whose folder no other run takes one."""
    for name in leases(storage, folder).values():
        storage.remove(name)
    _remove_folder(storage, folder)


def take(storage: Storage, *, seconds: float, folder: str = FOLDER) -> Lease:
    """Take the lease, or take over one whose holder is gone.

    A holder of this machine is gone when its process is. Any other is gone when it was silent for ``seconds``: the
    clocks of two machines may differ, so a silent lease is then watched for half as long, and is alive if it moves.
    Runs of different ``folder`` do not keep one another out.

    Args:
        storage: the output.
        seconds: how long this holder may be silent; it renews every third of it.
        folder: the lease's place within the output.

    Raises:
        OutputBusy: another run holds it.
    """
    gone: str | None = None
    while gone is None:
        found = leases(storage, folder)
        number, name = list(found.items())[-1] if found else (0, "")
        # One that was released meanwhile is no lease: look again.
        gone = _judge(storage, name, seconds) if found else ""
    now = _now()
    holder = Holder(token=uuid.uuid4().hex, process=this_process(), since=now, renewed=now, seconds=seconds)
    name = f"{folder}/{number + 1}.json"
    if not _create(storage, name, holder.to_json()):
        raise _busy(storage, parse(storage.read(name)))
    lease = Lease(storage, number + 1, holder, folder=folder, taken_over=gone)
    try:
        failpoint("lease.taken")
    except BaseException:
        lease.release()
        raise
    return lease


class Lease:
    """A lease that this process holds, renewed by a thread until the block ends.

    ``taken_over`` says from whom and why it was taken over; empty if it was free.
    """

    def __init__(self, storage: Storage, number: int, holder: Holder, *, folder: str, taken_over: str) -> None:
        self._storage, self._number, self._holder, self._folder = storage, number, holder, folder
        self.taken_over = taken_over
        self._name = f"{folder}/{number}.json"
        self._lost = ""
        self._renewed = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(self._holder.seconds)
        try:
            self.release()
        except StorageError as problem:
            log.warning("the lease was not released, and ends by itself in %g s: %s", self._holder.seconds, problem)

    def check(self) -> None:
        """Go on if the lease is still ours as far as is known; asks the storage after a long silence only.

        Raises:
            LeaseLost: another run took it over.
        """
        if self._lost or time.monotonic() - self._renewed > self._holder.seconds:
            self.confirm()

    def confirm(self) -> None:
        """Go on if the lease is still ours, by asking the storage now; a storage that does not answer decides nothing.

        Raises:
            LeaseLost: another run took it over.
        """
        try:
            self._look()
        except StorageError as problem:
            log.warning("the lease cannot be looked at, going on: %s", problem)
        if self._lost:
            raise LeaseLost(self._lost)

    def _keep(self) -> None:
        while not self._lost and not self._over.wait(self._holder.seconds / 3):
            try:
                self._renew()
            # A store's client may raise anything, and a thread that died would renew no more.
            except Exception as problem:
                log.warning("the lease was not renewed, going on: %s", problem)

    def _renew(self) -> None:
        self._look()
        if not self._lost:
            self._storage.write(self._name, replace(self._holder, renewed=_now()).to_json())

    def _look(self) -> None:
        found = leases(self._storage, self._folder)
        highest = max(found, default=0)
        own = parse(self._storage.read(self._name))
        if highest <= self._number and own is not None and own.token == self._holder.token:
            self._renewed = time.monotonic()
            return
        new = parse(self._storage.read(found[highest])) if highest else None
        by = f"was taken over by {new}" if new is not None and new.token != self._holder.token else "is gone"
        self._lost = (
            f"{self._storage.url}: the lease that this run held since {self._holder.since} {by}, after this run was "
            "silent (paused, or cut off from the output); it stops here, what it committed stays, and the same "
            "command goes on when the output is free"
        )

    def release(self) -> None:
        """Remove the file of the lease, and older ones; that of another run stays."""
        own = parse(self._storage.read(self._name))
        if own is not None and own.token == self._holder.token:
            # Its own last: while it is there, no other run takes a lower one for the newest.
            for number, name in leases(self._storage, self._folder).items():
                if number < self._number:
                    self._storage.remove(name)
            self._storage.remove(self._name)
        _remove_folder(self._storage, self._folder)


def _remove_folder(storage: Storage, folder: str) -> None:
    if isinstance(storage, LocalStorage):
        with suppress(OSError):
            (storage.root / folder).rmdir()


def _judge(storage: Storage, name: str, seconds: float) -> str | None:
    """The reason why the holder of a lease is gone; None if it has just released it.

    Raises:
        OutputBusy: it is not.
    """
    data = storage.read(name)
    if data is None:
        return None
    holder = parse(data)
    if holder is not None and is_gone(holder.process):
        return f"{holder}: that process is no more"
    if holder is not None and not holder.silent():
        raise _busy(storage, holder)
    allowed = holder.seconds if holder is not None else seconds
    log.info("%s: held by %s, silent for more than %g s; watching whether it lives", storage.url, holder, allowed)
    end = time.monotonic() + allowed / 2
    while time.monotonic() < end:
        time.sleep(min(1.0, allowed / 10))
        if storage.read(name) != data:
            raise _busy(storage, parse(storage.read(name)))
    return f"{holder or name}: silent since {holder.renewed if holder else 'its file was torn'}"


def _busy(storage: Storage, holder: Holder | None) -> OutputBusy:
    if holder is None:
        return OutputBusy(f"{storage.url}: another run took or released it just now; run the same command again")
    return OutputBusy(
        f"{storage.url}: held by {holder}, last heard of {holder.renewed}; two runs would do the same work. Wait until "
        f"it ends, or stop it; if its machine is gone, the output is free {holder.seconds:g} s after its last word"
    )


def _create(storage: Storage, name: str, data: bytes) -> bool:
    for _ in range(4):
        try:
            return storage.create_once(name, data)
        except StorageError as problem:
            # A run that releases removes the empty folder, maybe just before this file was created in it.
            if not isinstance(problem.__cause__, FileNotFoundError):
                raise
    return storage.create_once(name, data)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
