"""What goes between a reader and a decoder process: requests as JSON, answers in a file of a fixed layout.

The process decodes files of strangers, so that nothing it says is trusted: an answer is states, numbers of a known
size and short texts, each checked as it is read, and never an object that could run code.

Each process has two files without a name, which the reader owns. The encoded images lie in the first one behind one
another. The second one holds a byte of state for each image, room for the text of each failure, and the pixels; as it
outlives the process, it tells which image a crash or a hang met, and what was finished before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from pipeline.records import Failure, Pixels, PreprocessSpec

# Images of one request at most.
CHUNK = 8
# Bytes kept for a failure's status and text.
TEXT = 4096
# What a process says on its socket: that it can begin, and that it is done with a request.
READY, DONE = b"R", b"D"
CRASHED, TIMEOUT, OUT_OF_MEMORY = "decoder_crashed", "decoder_timeout", "out_of_memory"
# What a process may say of an image.
STATUSES = frozenset(
    {
        *("not_an_image", "format_not_allowed", "truncated", "corrupt", "too_many_pixels", "unsupported"),
        *(OUT_OF_MEMORY, CRASHED),
    }
)


class State(IntEnum):
    """How far an image is; ``QUEUED`` waits for its turn among the giants."""

    TODO = 0
    DECODING = 1
    QUEUED = 2
    PIXELS = 3
    FAILED = 4


class Nonsense(Exception):
    """An answer that no sound process gives."""


def request(pieces: Sequence[tuple[int, int]], spec: PreprocessSpec) -> bytes:
    """The images at (offset, size) of the first file, as ``spec`` wants them; with its length in front."""
    text = json.dumps({"pieces": pieces, "spec": dataclasses.asdict(spec)}).encode()
    return len(text).to_bytes(4, "little") + text


def parse_request(text: bytes) -> tuple[list[tuple[int, int]], PreprocessSpec]:
    """The other end of :func:`request`."""
    content: dict[str, Any] = json.loads(text)
    spec: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["spec"].items()}
    return [(offset, size) for offset, size in content["pieces"]], PreprocessSpec(**spec)


class Answer:
    """The second file of a process, from either end."""

    def __init__(self, fd: int, spec: PreprocessSpec) -> None:
        self._fd = fd
        self._shape = (*spec.size, 3)
        self._bytes = math.prod(self._shape)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._pixels_at(CHUNK)

    def clear(self) -> None:
        """Make room, and forget the last answer."""
        if os.fstat(self._fd).st_size < self.size:
            os.ftruncate(self._fd, self.size)
        os.pwrite(self._fd, bytes(CHUNK), 0)

    def mark(self, index: int, state: State) -> None:
        """Say how far an image is."""
        os.pwrite(self._fd, bytes([state]), index)

    def put(self, index: int, result: Pixels | Failure) -> None:
        """Give an image's result."""
        if isinstance(result, Failure):
            text = f"{result.status}\n{result.error}".encode(errors="replace")[: TEXT - 4]
            os.pwrite(self._fd, len(text).to_bytes(4, "little") + text, self._text_at(index))
            self.mark(index, State.FAILED)
            return
        pixels = np.ascontiguousarray(result.rgb).data
        if pixels.nbytes != self._bytes or os.pwrite(self._fd, pixels, self._pixels_at(index)) != self._bytes:
            raise OSError(f"{pixels.nbytes} bytes of pixels, wanted {self._bytes}")
        self.mark(index, State.PIXELS)

    def states(self, count: int) -> list[int]:
        """The states of the first ``count`` images, as they are just now."""
        return list(os.pread(self._fd, count, 0))

    def finished(self, count: int) -> list[Pixels | Failure]:
        """The results of the first images, up to the first that is not finished.

        Raises:
            Nonsense: the file does not hold what its layout says.
        """
        states = self.states(count)
        done = next((i for i, state in enumerate(states) if state not in (State.PIXELS, State.FAILED)), len(states))
        if any(state not in list(State) for state in states):
            raise Nonsense("a state that does not exist")
        pixels = np.empty((done, *self._shape), dtype=np.uint8)
        if done and os.preadv(self._fd, [pixels.data], self._pixels_at(0)) != pixels.nbytes:
            raise Nonsense("fewer pixels than it says")
        return [
            Pixels(rgb=pixels[index]) if states[index] == State.PIXELS else self._failure(index)
            for index in range(done)
        ]

    def _failure(self, index: int) -> Failure:
        record = os.pread(self._fd, TEXT, self._text_at(index))
        length = int.from_bytes(record[:4], "little")
        status, _, error = record[4 : 4 + length].decode(errors="replace").partition("\n")
        if length > TEXT - 4 or status not in STATUSES:
            raise Nonsense(f"a failure with the status {status[:40]!r}")
        return Failure(status, error)

    @staticmethod
    def _text_at(index: int) -> int:
        return TEXT * (1 + index)

    def _pixels_at(self, index: int) -> int:
        return TEXT * (1 + CHUNK) + index * self._bytes
