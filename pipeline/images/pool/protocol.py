"""Protocol between a reader and a decoder process: requests as JSON, answers in a file of a fixed layout.

The process decodes untrusted files, so that its answer is not trusted either: it consists of states, numbers of a known
size and short texts, each checked as it is read, and never of an object that could run code.

Each process has two files without a name, which the reader owns. The first one holds the encoded images, one after
another. The second one holds a byte of state for each image, room for the text of each failure, and the pixels; as it
outlives the process, it shows which image crashed or hung the process, and what was finished before.

The process has the second file as memory. So has the reader, if the file is sealed: it cannot be shortened then, which
would kill the reader. The reader copies the content before it checks it, as the process can still change it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.records import Failure, Pixels, PreprocessSpec
from pipeline.images.pool.shared_memory import Window, cannot_shrink, shared

# Images of one request at most.
CHUNK = 32
# Bytes kept for a failure's status and text.
TEXT = 4096
# Bytes that a process sends on its socket: it is ready for requests; it is done with one.
READY, DONE = b"R", b"D"
CRASHED, TIMEOUT, OUT_OF_MEMORY = "decoder_crashed", "decoder_timeout", "out_of_memory"
# Statuses of a failure that a process may report.
STATUSES = frozenset(
    {
        *("not_an_image", "format_not_allowed", "truncated", "corrupt", "too_many_pixels", "unsupported"),
        *(OUT_OF_MEMORY, CRASHED),
    }
)


class State(IntEnum):
    """State of an image; ``QUEUED`` waits for its turn among the large images."""

    TODO = 0
    DECODING = 1
    QUEUED = 2
    PIXELS = 3
    FAILED = 4


_STATES = frozenset(int(state) for state in State)
_FINAL = frozenset({int(State.PIXELS), int(State.FAILED)})


class InvalidAnswer(Exception):
    """An answer that breaks the protocol."""


def request(pieces: Sequence[tuple[int, int]], kind: str, spec: PreprocessSpec, start: int) -> bytes:
    """The images at (offset, size) of the first file, decoded by ``kind`` as ``spec`` wants them; its length in front.

    They are answered from ``start`` of the second file on.
    """
    text = json.dumps([start, kind, *pieces]).encode() + b"\n" + _text_of(spec)
    return len(text).to_bytes(4, "little") + text


def parse_request(text: bytes) -> tuple[list[tuple[int, int]], str, PreprocessSpec, int]:
    """The arguments of a :func:`request`."""
    numbers, _, spec = text.partition(b"\n")
    start, kind, *pieces = json.loads(numbers)
    return [(offset, size) for offset, size in pieces], kind, _spec_of(spec), start


@lru_cache(4)
def _text_of(spec: PreprocessSpec) -> bytes:
    return json.dumps(dataclasses.asdict(spec)).encode()


@lru_cache(4)
def _spec_of(text: bytes) -> PreprocessSpec:
    content: dict[str, Any] = json.loads(text)
    spec: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return PreprocessSpec(**spec)


class Answer:
    """The answer to one request, from ``start`` of the second file of a process on, as both sides use it."""

    def __init__(self, fd: int, spec: PreprocessSpec, start: int = 0, *, window: Window | None = None) -> None:
        self._fd, self.spec, self.start, self._window = fd, spec, start, window
        self._shape = (*spec.size, 3)
        self._bytes = math.prod(self._shape)

    @property
    def size(self) -> int:
        """Bytes of an answer: whole pages."""
        return -(-self._pixels_at(CHUNK) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    def clear(self) -> None:
        """Make room, and clear the last answer.

        Raises:
            OSError: there is no room.
        """
        if os.fstat(self._fd).st_size < self.start + self.size:
            os.ftruncate(self._fd, self.start + self.size)
        if self.lasting:
            self._memory[:CHUNK] = State.TODO
        else:
            os.pwrite(self._fd, bytes(CHUNK), self.start)

    def mark(self, index: int, state: State) -> None:
        """Set the state of an image."""
        self._memory[index] = state

    def put(self, index: int, result: Pixels | Failure) -> None:
        """Write an image's result."""
        if isinstance(result, Failure):
            text = f"{result.status}\n{result.error}".encode(errors="replace")[: TEXT - 4]
            record = len(text).to_bytes(4, "little") + text
            self._memory[self._text_at(index) :][: len(record)] = np.frombuffer(record, dtype=np.uint8)
            self.mark(index, State.FAILED)
            return
        if result.rgb.shape != self._shape:
            raise ValueError(f"pixels of the shape {tuple(result.rgb.shape)}, wanted {self._shape}")
        np.copyto(self._pixels[index], result.rgb, casting="no")
        self.mark(index, State.PIXELS)

    @cached_property
    def _memory(self) -> NDArray[np.uint8]:
        if self._window is not None and self._window.fits(self.start + self.size):
            return self._window.part(self.start, self.size)
        return shared(self._fd, self.size, self.start)

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        return self._memory[self._pixels_at(0) : self._pixels_at(CHUNK)].reshape(CHUNK, *self._shape)

    def states(self, count: int) -> list[int]:
        """The states of the first ``count`` images, at this moment."""
        return list(os.pread(self._fd, count, self.start))

    @cached_property
    def lasting(self) -> bool:
        """True if the file cannot be shortened; reading mapped pages behind the end of a file kills the reader."""
        return cannot_shrink(self._fd)

    def finished(self, count: int, *, copy: bool = True) -> list[Pixels | Failure]:
        """The results of the first images, up to the first that is not finished.

        Without ``copy``, which a ``lasting`` file allows, the pixels are where the process wrote them.

        Raises:
            InvalidAnswer: the content does not fit the layout.
        """
        states = self.states(count)
        if not _STATES.issuperset(states):
            raise InvalidAnswer("a state that does not exist")
        done = next((i for i, state in enumerate(states) if state not in _FINAL), len(states))
        pixels = self._copy(done) if copy else self._pixels
        return [
            Pixels(rgb=pixels[index]) if states[index] == State.PIXELS else self._failure(index)
            for index in range(done)
        ]

    def _copy(self, count: int) -> NDArray[np.uint8]:
        """The first pixels, which the process may go on to change in the file."""
        if self.lasting:
            return self._pixels[:count].copy()
        pixels = np.empty((count, *self._shape), dtype=np.uint8)
        if count and os.preadv(self._fd, [pixels.data], self.start + self._pixels_at(0)) != pixels.nbytes:
            raise InvalidAnswer("fewer pixels than it says")
        return pixels

    def _failure(self, index: int) -> Failure:
        record = os.pread(self._fd, TEXT, self.start + self._text_at(index))
        length = int.from_bytes(record[:4], "little")
        status, _, error = record[4 : 4 + length].decode(errors="replace").partition("\n")
        if length > TEXT - 4 or status not in STATUSES:
            raise InvalidAnswer(f"a failure with the status {status[:40]!r}")
        return Failure(status, error)

    @staticmethod
    def _text_at(index: int) -> int:
        return TEXT * (1 + index)

    def _pixels_at(self, index: int) -> int:
        return TEXT * (1 + CHUNK) + index * self._bytes


class Answers:
    """The answers in the second file of a process; some may be lent while others are asked for.

    :meth:`give_back` may be called from another thread.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._own: Answer | None = None
        self._idle: deque[Answer] = deque()
        # Answers that may be lent, idle ones among them, and the end of all answers in the file.
        self._count = self._end = 0

    def own(self, spec: PreprocessSpec) -> Answer:
        """The answer that is copied, and never lent."""
        if self._own is None or self._own.spec != spec:
            if not self._count:
                self._end = 0
            self._own = self._new(spec)
        return self._own

    def to_lend(self, spec: PreprocessSpec, most: int) -> Answer | None:
        """An answer that is lent from now on, the one that was given back last; None if ``most`` are lent."""
        while self._idle:
            if (answer := self._idle.pop()).spec == spec:
                return answer
            self._count -= 1
        if self._count >= most or not self.own(spec).lasting:
            return None
        answer = self._new(spec)
        try:
            answer.clear()
        except OSError:
            # The system allows no larger file (ulimit -f): the answer that is copied must do.
            self._end -= answer.size
            return None
        self._count += 1
        return answer

    def give_back(self, answer: Answer) -> None:
        """Use an answer again that was lent."""
        self._idle.append(answer)

    def close(self) -> None:
        """Release the memory that nobody holds."""
        self._own = None
        self._idle.clear()

    def _new(self, spec: PreprocessSpec) -> Answer:
        # Others may be lent: a place in the file belongs to one answer alone.
        answer = Answer(self._fd, spec, self._end)
        self._end += answer.size
        return answer
