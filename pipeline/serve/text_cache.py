"""Text features of requests: a bounded cache in memory, the cache on disk that jobs fill, and the text tower."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.core.records import TextBank
from pipeline.engine.forward import Labelling
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.label_files import LabelSet
from pipeline.models.text import build_bank, embed_prompts

_Value = TypeVar("_Value")
# Bytes of an entry in addition to its features and text.
OVERHEAD = 512


class Recent(Generic[_Value]):
    """Least-recently-used cache of at most ``size`` bytes; safe from any thread."""

    def __init__(self, size: int) -> None:
        self._size, self.used = size, 0
        self._kept: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> _Value | None:
        """Return the value, or None if it is not cached."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: _Value, size: int) -> None:
        """Add a value of ``size`` bytes, unless it is too large, and remove the least recently used ones."""
        with self._lock:
            if key in self._kept or size > self._size:
                return
            self._kept[key] = (value, size)
            self.used += size
            while self.used > self._size:
                self.used -= self._kept.popitem(last=False)[1][1]


class Texts:
    """Features of texts and label sets, computed one request at a time in one thread.

    Features of requests are not written to the disk, since untrusted input would fill it.

    Args:
        checkpoint: the checkpoint of the text tower.
        config: the folder of the job cache, the scoring of labels, and the bytes to keep in memory.
        device: the device of the features for labelling.
        threads: cores for the text tower.
        on_lookup: called with the source of the features: ``memory``, ``disk`` or ``model``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        *,
        device: torch.device,
        threads: int,
        on_lookup: Callable[[str], None] = lambda source: None,
    ) -> None:
        self._checkpoint, self._config, self._device, self._on_lookup = checkpoint, config, device, on_lookup
        self._recent: Recent[NDArray[np.float32]] = Recent(config.serve.text_cache_bytes)
        self._banks: Recent[TextBank] = Recent(config.serve.text_cache_bytes)
        # One thread, so that simultaneous requests with equal labels share one bank object: batches are grouped by it.
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="text", initializer=torch.set_num_threads, initargs=(threads,)
        )

    def embed(self, texts: Sequence[str]) -> Future[list[NDArray[np.float32]]]:
        """Return an L2-normalised float32 ``[D]`` for each text, without a template."""
        found = [self._recent.get(text) for text in texts]
        if all(vector is not None for vector in found):
            return self._done([vector for vector in found if vector is not None], len(texts))
        return self._pool.submit(self._embed, texts)

    def count_tokens(self, texts: Sequence[str]) -> Future[int]:
        """Return the number of tokens of all texts before they are cut, special ones included."""
        count = self._checkpoint.texts()[1].count
        return self._pool.submit(lambda: sum(map(count, texts)))

    def labelling(self, names: Sequence[str], templates: Sequence[str], top_k: int) -> Future[Labelling]:
        """Return the labelling for names in all templates; equal label sets share a bank."""
        labels = LabelSet(tuple(names), tuple(tuple(each.replace("{}", name) for each in templates) for name in names))
        bank = self._banks.get(labels)
        if bank is not None:
            return self._done(self.with_bank(bank, top_k), 1)
        return self._pool.submit(lambda: self.with_bank(self._bank(labels), top_k))

    def with_bank(self, bank: TextBank, top_k: int) -> Labelling:
        """Return the labelling for a bank, with its features on the encoder's device."""
        features = torch.from_numpy(bank.features).to(self._device)
        return Labelling(bank=bank, features=features, top_k=min(top_k, len(bank.names)))

    def close(self) -> None:
        """End the thread; waiting requests are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _embed(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        known = {text: vector for text in texts if (vector := self._recent.get(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        rows = embed_prompts(self._checkpoint, [[text] for text in missing]) if missing else ()
        for text, row in zip(missing, rows, strict=True):
            # A copy: a view would keep all rows in memory.
            known[text] = row.copy()
            self._recent.put(text, known[text], row.nbytes + 4 * len(text) + OVERHEAD)
        for text in texts:
            self._on_lookup("model" if text in missing else "memory")
        return [known[text] for text in texts]

    def _bank(self, labels: LabelSet) -> TextBank:
        bank = self._banks.get(labels)
        if bank is not None:
            self._on_lookup("memory")
            return bank
        bank = build_bank(self._checkpoint, labels, self._config.prompts, self._config.labels, keep=False)
        self._on_lookup("disk" if bank.cached else "model")
        letters = sum(len(text) for group in (labels.names, *labels.prompts) for text in group)
        self._banks.put(labels, bank, bank.features.nbytes + 4 * letters + OVERHEAD)
        return bank

    def _done(self, value: _Value, count: int) -> Future[_Value]:
        for _ in range(count):
            self._on_lookup("memory")
        done: Future[_Value] = Future()
        done.set_result(value)
        return done
