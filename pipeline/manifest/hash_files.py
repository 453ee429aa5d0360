"""Hashes in files on the local disk, and the repeated ones among them, in little memory."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import FileIO
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.core.concurrency import in_order
from pipeline.core.errors import StorageError
from pipeline.core.failpoints import failpoint
from pipeline.core.processes import cores
from pipeline.storage.urls import free_bytes

# Hashes of a file, 64 MB; there are 1 << BITS files at most, which are longer then.
FILE_ROWS, BITS = 1 << 23, 8
# Hashes that are read at a time: a whole file, unless many of its hashes are equal.
READ_ROWS = 2 * FILE_ROWS
# Each of these threads holds the hashes of a file.
SORTING_THREADS = 4
BLOCK = 1 << 20
log = logging.getLogger(__name__)


class HashFiles:
    """64-bit hashes in files in TMPDIR, distributed by their highest bits; use it as a context manager.

    The files have no names (see :func:`tempfile.TemporaryFile`): the disk has its room back when they are closed, and
    also when the process is killed.

    Args:
        rows: the number of hashes; each takes 8 bytes.
    """

    def __init__(self, rows: int) -> None:
        self._bytes, self._lock = 8 * rows, threading.Lock()
        bits = min(max(1, (rows // FILE_ROWS).bit_length()), BITS)
        # The lowest hash of each file.
        self._firsts = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
        self._files: list[FileIO] = []
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        with self._explained(), ExitStack() as opened:
            folder = tempfile.gettempdir()
            log.info("sorting the hashes of the ids in %s (TMPDIR): %d MB", folder, self._bytes // 1_000_000)
            free = free_bytes(folder)
            if free is not None and free < self._bytes:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({free:,} bytes free)")
            for _ in self._firsts:
                self._files.append(opened.enter_context(tempfile.TemporaryFile("w+b", 0)))
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error other threads may still be writing.
        with self._lock:
            self._files = []
            self._opened.close()

    def append(self, hashes: NDArray[np.uint64]) -> None:
        """Write each hash to its file; may be called by several threads.

        Raises:
            StorageError: the disk is full.
        """
        # A few hashes, in the processor's cache, are sorted in less time than they are distributed in.
        hashes.sort()
        data = hashes.data.cast("B")
        ends = (8 * np.searchsorted(hashes, self._firsts)).tolist()
        with self._lock, self._explained():
            failpoint("ids.write")
            for file, (start, end) in zip(self._files, pairwise([*ends, len(data)]), strict=False):
                while start < end:
                    start += file.write(data[start:end])

    def repeated(self, most: int) -> Generator[NDArray[np.uint64]]:
        """Up to ``most`` of the repeated hashes of each file; each once, in order, those of a later file are higher."""
        return in_order(partial(_repeated_in, most=most), self._files, threads=min(cores(), SORTING_THREADS))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: {error.strerror}; the check of the ids writes {self._bytes:,} bytes there: "
                "free some space, or set TMPDIR to a folder on a larger disk, and run the same command again"
            ) from error


def _repeated_in(file: FileIO, *, most: int) -> NDArray[np.uint64]:
    """Repeated hashes of a file. Equal ones are held once, so that many of them take no more memory."""
    file.seek(0)
    hashes = np.empty(0, dtype=np.uint64)
    found = [hashes]
    while len(more := np.fromfile(file, dtype=np.uint64, count=READ_ROWS)):
        hashes = np.concatenate([hashes, more]) if len(hashes) else more
        found.append(repeated_values(hashes))
        if len(found[-1]):
            hashes = _distinct(hashes)
    whole = np.concatenate(found)
    whole.sort()
    # A copy: a part of an array would keep all of it.
    return _distinct(whole)[:most].copy()


def repeated_values(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The repeated values, each once, in order; sorts ``hashes`` in place, without a second array of that length."""
    hashes.sort()
    starts = range(0, len(hashes), BLOCK)
    # Each block includes the first value of the next one, so that no pair is missed.
    blocks = (hashes[start : start + BLOCK + 1] for start in starts)
    return _distinct(np.concatenate([block[1:][block[1:] == block[:-1]] for block in blocks]))


def _distinct(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The values of a sorted array, each once."""
    first = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]
