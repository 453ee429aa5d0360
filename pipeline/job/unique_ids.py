"""The check of the ids of a job, done once for its dataset.

A plan is written behind the check, so a plan of the same manifest shows that the ids were checked.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from pipeline.core.errors import OutputBusy
from pipeline.dataset import lease, plan
from pipeline.job.cluster.part import Part
from pipeline.manifest.ids import check_ids
from pipeline.manifest.manifest import Manifest
from pipeline.storage.base import Storage

FOLDER = f"{lease.FOLDER}-ids"
# Fewer ids are checked in less time than another part takes to write the plan.
SHARED_ROWS = 1 << 26
# Seconds between two looks for the plan of another part.
INTERVAL = 5.0
log = logging.getLogger(__name__)


class UniqueIds:
    """The check of the ids for one run; use it as a context manager around the run.

    Of parts that start together, one checks and the others wait for its plan: it has a lease of its own until then.

    Args:
        storage: the output.
        part: the part of the shards that the run embeds.
        seconds: how long the holder of the lease may be silent.
    """

    def __init__(self, storage: Storage, part: Part, *, seconds: float) -> None:
        self._storage, self._part, self._seconds = storage, part, seconds
        self._held, self._lock, self._over = ExitStack(), threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self.release()

    def check(self, manifest: Manifest) -> None:
        """Check the ids, unless a plan shows that they were checked; may wait for another part that checks them.

        Raises:
            ManifestError: an id is null or repeated.
        """
        large = manifest.counted and manifest.rows > SHARED_ROWS
        if large and not self._part.whole:
            self._take_turns(manifest)
        if not self._checked(manifest):
            if not self._over.is_set():
                check_ids(manifest)
        elif large:
            log.info("the ids are not read: they were checked before %s was written", plan.NAME)

    def release(self) -> None:
        """Let other parts go on; called when the plan is written."""
        with self._lock:
            self._held.close()

    def _take_turns(self, manifest: Manifest) -> None:
        """Take the lease, or wait for the part that has it."""
        waited = False
        while not self._checked(manifest) and not self._over.is_set():
            try:
                held = lease.take(self._storage, seconds=self._seconds, folder=FOLDER)
            except OutputBusy:
                if not waited:
                    holder = next((each for folder, _, each in lease.holders(self._storage) if folder == FOLDER), None)
                    log.info("the ids are checked by another part (%s); waiting for its plan", holder or "just ended")
                waited = True
                self._over.wait(INTERVAL)
                continue
            with self._lock:
                self._held.enter_context(held)
            if held.taken_over:
                log.warning("the part that checked the ids is gone: %s", held.taken_over)
            elif waited:
                # That part ended without a plan, as this one may. All that wait go on now, not one after the other.
                self.release()
            break
        if self._over.is_set():
            self.release()

    def _checked(self, manifest: Manifest) -> bool:
        return manifest.has_rows_of(plan.recorded(self._storage, "manifest"))
