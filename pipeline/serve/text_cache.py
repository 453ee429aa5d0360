"""Text features: few bytes of the latest in memory, over the cache on disk that jobs fill, over the text tower."""

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
from pipeline.models.text import LabelSet, build_bank, embed_prompts

_Value = TypeVar("_Value")
# What an entry costs besides its features, in bytes.
OVERHEAD = 512


class Recent(Generic[_Value]):
    """The values that were used last, in so many bytes; safe to use from many threads."""

    def __init__(self, size: int) -> None:
        self._size, self.used = size, 0
        self._kept: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> _Value | None:
        """The value, if it is still there."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: _Value, size: int) -> None:
        """Keep a value of so many bytes; those that were not used for longest go. One that is too large is not kept."""
        with self._lock:
            if key in self._kept or size > self._size:
                return
            self._kept[key] = (value, size)
            self.used += size
            while self.used > self._size:
                self.used -= self._kept.popitem(last=False)[1][1]


class Texts:
    """Embeds texts and label sets, one request after the other in a thread of its own.

    What a request brings is not written to the disk: strangers would fill it.

    Args:
        checkpoint: whose text tower.
        config: where the cache of jobs lies, how labels are scored, how much is kept in memory.
        device: where features are wanted for labelling.
        threads: cores for the text tower.
        counted: told where features came from: ``memory``, ``disk`` or ``model``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        *,
        device: torch.device,
        threads: int,
        counted: Callable[[str], None] = lambda source: None,
    ) -> None:
        self._checkpoint, self._config, self._device, self._counted = checkpoint, config, device, counted
        self._recent: Recent[NDArray[np.float32]] = Recent(config.serve.text_cache_bytes)
        self._banks: Recent[TextBank] = Recent(config.serve.text_cache_bytes)
        # One that is asked for by several requests at once must be the same object for all: batches go by that.
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="text", initializer=torch.set_num_threads, initargs=(threads,)
        )

    def embed(self, texts: Sequence[str]) -> Future[list[NDArray[np.float32]]]:
        """An L2-normalised float32 ``[D]`` for each text as it is, without a template."""
        found = [self._recent.get(text) for text in texts]
        if all(vector is not None for vector in found):
            return self._done([vector for vector in found if vector is not None], len(texts))
        return self._pool.submit(self._embed, texts)

    def labelling(self, names: Sequence[str], templates: Sequence[str], top_k: int) -> Future[Labelling]:
        """How pictures are labelled with these names, each in all templates; equal ones share their bank."""
        asked = LabelSet(tuple(names), tuple(tuple(each.replace("{}", name) for each in templates) for name in names))
        bank = self._banks.get(asked)
        if bank is not None:
            return self._done(self.with_bank(bank, top_k), 1)
        return self._pool.submit(lambda: self.with_bank(self._bank(asked), top_k))

    def with_bank(self, bank: TextBank, top_k: int) -> Labelling:
        """How pictures are labelled with a bank, its features on the encoder's device."""
        features = torch.from_numpy(bank.features).to(self._device)
        return Labelling(bank=bank, features=features, top_k=min(top_k, len(bank.names)))

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _embed(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        known = {text: vector for text in texts if (vector := self._recent.get(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        rows = embed_prompts(self._checkpoint, [[text] for text in missing]) if missing else ()
        for text, row in zip(missing, rows, strict=True):
            # A row of its own, not a view that keeps all of them.
            known[text] = row.copy()
            self._recent.put(text, known[text], row.nbytes + 4 * len(text) + OVERHEAD)
        for text in texts:
            self._counted("model" if text in missing else "memory")
        return [known[text] for text in texts]

    def _bank(self, asked: LabelSet) -> TextBank:
        bank = self._banks.get(asked)
        if bank is not None:
            self._counted("memory")
            return bank
        bank = build_bank(self._checkpoint, asked, self._config.prompts, self._config.labels, keep=False)
        self._counted("disk" if bank.cached else "model")
        letters = sum(len(text) for group in (asked.names, *asked.prompts) for text in group)
        self._banks.put(asked, bank, bank.features.nbytes + 4 * letters + OVERHEAD)
        return bank

    def _done(self, value: _Value, count: int) -> Future[_Value]:
        for _ in range(count):
            self._counted("memory")
        done: Future[_Value] = Future()
        done.set_result(value)
        return done
