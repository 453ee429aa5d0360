"""The datasets and stores of nights of a page."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.browse.cached import CachedDataset, Memory
from pipeline.browse.opened import OpenedDataset
from pipeline.dataset import commits
from pipeline.dataset.dataset import open_dataset
from pipeline.nightly.records import PREFIX
from pipeline.nightly.store import days, url_of
from pipeline.storage.factory import open_storage

# Seconds after which a dataset is looked at again, as another job may have replaced it.
FRESH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One dataset: its number on the page, its address, a short name, and the number of its store, if it is a night."""

    number: int
    url: str
    name: str
    store: int | None = None


class Collection:
    """The datasets of a page, each opened at its first use. Close it.

    Args:
        urls: datasets, and stores of nights.
        memory: bytes of columns and thumbnails that are held.
        model: the place of the datasets' model, if it was moved.

    Raises:
        PipelineError: one of them is not a finished dataset; a night of a store is only looked at when it is opened.
    """

    def __init__(self, urls: Sequence[str], memory: int, model: str | None = None) -> None:
        self.memory, self._model = Memory(memory), model
        self._opened: dict[int, tuple[OpenedDataset, float]] = {}
        self._opening: dict[int, threading.Lock] = {}
        self.stores: list[str] = []
        self.entries: list[Entry] = []
        for url in urls:
            storage = open_storage(url)
            nights = [] if storage.size(commits.SUCCESS) is not None else days(storage)
            for day in reversed(nights):
                entry = Entry(len(self.entries), url_of(storage, f"{PREFIX}{day}"), day, len(self.stores))
                self.entries.append(entry)
            if nights:
                self.stores.append(storage.url)
            else:
                name = storage.url.rstrip("/").rpartition("/")[2]
                self.entries.append(Entry(len(self.entries), storage.url, name))
                self.open(self.entries[-1].number)

    def close(self) -> None:
        """End the processes of all of them."""
        for opened, _ in self._opened.values():
            opened.close()

    def open(self, number: int) -> OpenedDataset:
        """A dataset in its present state.

        Raises:
            PipelineError: it is not finished, or was removed.
        """
        # A store that is slow keeps none of the other datasets waiting.
        with self._opening.setdefault(number, threading.Lock()):
            found = self._opened.get(number)
            now = time.monotonic()
            if found is not None and now - found[1] < FRESH_SECONDS:
                return found[0]
            dataset = None if found is None else found[0].dataset
            if found is None or dataset is None or dataset.storage.read(commits.SUCCESS) != dataset.marker:
                made = OpenedDataset(CachedDataset.of(open_dataset(self.entries[number].url), self.memory), self._model)
                if found is not None:
                    # A thumbnail that is being made may take a while.
                    threading.Thread(target=found[0].close, daemon=True).start()
            else:
                made = found[0]
            self._opened[number] = (made, now)
            return made
