"""Rows of a shard with the same bytes, so that each picture is embedded once."""

from __future__ import annotations

import secrets
import threading

import xxhash

# A sender of images cannot know which of them would collide in this run.
_SEED = secrets.randbits(64)


class Repeats:
    """Duplicate images of one shard; reported by many threads, in any order of rows.

    Bytes are the same if their 128-bit XXH3 digests are.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def known(self, start: int, index: int, data: bytes) -> bool:
        """True if a row before ``start + index`` is known to have these bytes: they are not decoded again."""
        position = start + index
        digest = xxhash.xxh3_128_digest(data, seed=_SEED)
        with self._lock:
            self._digests[position] = digest
            first = self._first.setdefault(digest, position)
            if position < first:
                self._first[digest] = position
        return first < position

    def first(self, position: int) -> int:
        """The first row with the same bytes, once all rows up to ``position`` are known; ask once.

        It is ``position`` itself where no bytes were read.
        """
        digest = self._digests.pop(position, None)
        return position if digest is None else self._first[digest]
