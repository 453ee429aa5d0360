"""Neighbouring ranges of one file, such as the members of a tar, read by one request for all of them.

The safety and the statuses are those of :class:`~pipeline.images.sources.source.Source`, which reads a span as it reads
a row. A row that its span does not hold whole is read alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from pipeline.core.records import Failure, ImageRef
from pipeline.images.sources.cell_text import describe
from pipeline.images.sources.http import SCHEMES
from pipeline.images.sources.source import Source, split_range
from pipeline.storage.urls import scheme_of

# Bytes of a span at most. A store answers within 10 to 100 ms, in which it could send about a mebibyte.
SPAN = 16 * 2**20
# Bytes between two rows of a span at most: headers and texts of a tar, or a few members that no row names. To read them
# takes less time than another request, and than another opening of a local file.
GAP = 64 * 2**10
# Bytes that the spans of a loader hold together at most; further spans are read row by row.
HELD = 8 * SPAN

# The first byte, the one behind the last, and the position of a row.
_Range = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Member(ImageRef):
    """Reference to bytes ``start`` to ``stop`` (exclusive) of a file, which are part of ``span``."""

    span: Span | None = None
    start: int = 0
    stop: int = 0

    def read(self, source: Source) -> bytes | Failure:
        """The encoded bytes, see :meth:`Source.read`; to be called once."""
        data = self.span.take(self.start, self.stop) if self.span is not None else b""
        return data if len(data) == self.stop - self.start else source.read(self)


class Spans:
    """Spans of the rows of one loader; close them.

    They hold the bytes of the spans of which a row was read and another was not, and of one that is read ahead, and
    ``HELD`` bytes at most.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._longest = replace(source, max_bytes=SPAN), min(source.max_bytes, SPAN)
        self._last: Span | None = None
        self._free = HELD
        self._lock, self._ahead = threading.Lock(), ThreadPoolExecutor(1, thread_name_prefix="spans")

    def close(self) -> None:
        """Wait for the span that is being read ahead."""
        self._ahead.shutdown(wait=True, cancel_futures=True)

    def join(self, refs: Sequence[ImageRef]) -> list[ImageRef]:
        """References to the same images, where each that shares a span is a :class:`Member`."""
        files: dict[str, list[_Range]] = {}
        for row, ref in enumerate(refs):
            if ref.data is None and ref.path and "#bytes=" in ref.path and not describe(ref.path):
                file, start, stop = split_range(ref.path)
                if stop is not None and 0 < stop - start <= self._longest:
                    files.setdefault(file, []).append((start, stop, row))
        groups = [(file, group) for file, ranges in files.items() if self._joins(file) for group in _groups(ranges)]
        joined = list(refs)
        for file, group in sorted(groups, key=lambda one: min(row for _, _, row in one[1])):
            span = Span(self, file, group)
            for start, stop, row in group:
                joined[row] = Member(refs[row].id, refs[row].path, span=span, start=start, stop=stop)
            if self._last is not None:
                self._last.following = span
            self._last = span
        return joined

    def _joins(self, file: str) -> bool:
        # A limit of seconds for each image is for its own bytes.
        return (scheme_of(file) or scheme_of(self._source.root)) not in SCHEMES

    def read_ahead(self, span: Span) -> None:
        """Read a span in a thread, if it may be held."""
        if self._free >= SPAN:
            self._ahead.submit(span.fetch)

    def reserve(self, size: int) -> bool:
        """Count bytes as held, if there may be as many; with less than 0, as free again."""
        with self._lock:
            if size > self._free:
                return False
            self._free -= size
            return True

    def read(self, path: str) -> bytes:
        """The bytes at a path; none if they cannot be read, for whatever reason: its rows will name it."""
        with suppress(Exception):
            data = self._source.read(ImageRef(id=0, path=path))
            return b"" if isinstance(data, Failure) else data
        return b""


class Span:
    """Bytes of a file that are read once, by the first of their rows, and dropped by the last.

    Args:
        spans: what counts the bytes, and reads them.
        file: the path.
        ranges: the rows.
    """

    def __init__(self, spans: Spans, file: str, ranges: Sequence[_Range]) -> None:
        self._spans, self._left = spans, len(ranges)
        self._start, stop = ranges[0][0], max(stop for _, stop, _ in ranges)
        self._size, self._path = stop - self._start, f"{file}#bytes={self._start}-{stop}"
        self._lock, self._data, self._is_read = threading.Lock(), b"", False
        # The span whose rows come next.
        self.following: Span | None = None

    def fetch(self) -> None:
        """Read the bytes, unless they were read before."""
        with self._lock:
            self._fetch()

    def take(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop`` for one of the rows, or fewer where they are not there."""
        with self._lock:
            self._fetch()
            data = self._data
            self._left -= 1
            if not self._left:
                self._drop()
        following, self.following = self.following, None
        if following is not None:
            self._spans.read_ahead(following)
        return data[start - self._start : stop - self._start]

    def _fetch(self) -> None:
        if self._is_read:
            return
        self._is_read = True
        if self._left > 0 and self._spans.reserve(self._size):
            self._data = self._spans.read(self._path)
            if not self._data:
                self._spans.reserve(-self._size)

    def _drop(self) -> None:
        if self._data:
            self._data = b""
            self._spans.reserve(-self._size)


def _groups(ranges: list[_Range]) -> Iterator[list[_Range]]:
    """Ranges of one file that are read together; those that have no neighbour are left out."""
    ranges.sort()
    group, end = ranges[:1], ranges[0][1]
    for one in ranges[1:]:
        start, stop, _ = one
        if start - end > GAP or max(stop, end) - group[0][0] > SPAN:
            if len(group) > 1:
                yield group
            group, end = [], 0
        group.append(one)
        end = max(end, stop)
    if len(group) > 1:
        yield group
