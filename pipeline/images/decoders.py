"""Decoder processes: a pool that decodes encoded images, whatever they do to the process that decodes them.

A crash, a hang or a want of memory costs one process and names one image. The processes are started with ``exec``
and never forked (CUDA, threads), hold nothing of this process but two files of their own, need no /dev/shm, and are
no ``multiprocessing`` children, which workers that are daemons may not have.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence

from pipeline.images.children import Child, Children, nameless_file
from pipeline.images.decode import Decoder
from pipeline.images.wire import CRASHED, DONE, OUT_OF_MEMORY, TIMEOUT, Answer, Nonsense, State, request
from pipeline.records import Failure, Pixels, PreprocessSpec

# How often a slow process is looked at, in seconds. A machine that sleeps, or a job that is stopped, does not count.
TICK = 1.0
# A file of encoded images larger than this is emptied after use, in bytes.
KEEP = 32 * 2**20


class Decoders:
    """A pool of decoder processes; safe to use from many threads. Close it once no thread uses it any more.

    Args:
        decoder: the rules of decoding.
        processes: at most so many are started, when they are first needed.
        seconds: what one image may take, apart from waiting for its turn among the giants.
        memory: what one image may take, in bytes, besides the process itself.
    """

    def __init__(self, decoder: Decoder, *, processes: int, seconds: float, memory: int) -> None:
        self.seconds = seconds
        self.children = Children(decoder, memory=memory)
        # The last one used is the next one used; the empty places lie at the bottom.
        self._seats: queue.LifoQueue[_Seat | None] = queue.LifoQueue()
        for _ in range(processes):
            self._seats.put(None)
        self._processes = processes

    def decode(self, encoded: list[bytes], spec: PreprocessSpec) -> list[Pixels | Failure]:
        """Pixels, or why there are none, for up to ``CHUNK`` images; takes them out of ``encoded``.

        Statuses of a failure: those of :meth:`Decoder.apply`, ``decoder_timeout`` and ``decoder_crashed``.

        Raises:
            DecoderUnavailable: a process cannot be started.
        """
        seat = self._seats.get()
        try:
            self.children.check_open()
            seat = seat or _Seat(self)
            return seat.decode(encoded, spec)
        except BaseException:
            if seat is not None:
                seat.retire()
            raise
        finally:
            self._seats.put(seat)

    def peak_rss(self) -> int:
        """Bytes that the largest process held at its peak; 0 if none ran, or the system does not tell."""
        return self.children.peak_rss()

    def close(self) -> None:
        """End all processes; what a thread has them decode right now is lost to it."""
        if not self.children.stop():
            return
        for _ in range(self._processes):
            seat = self._seats.get()
            if seat is not None:
                seat.close()
        # Whoever comes now is told.
        self._seats.put(None)
        self.children.close()


class _Seat:
    """Two files, and the process that works with them just now; used by one thread at a time."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._inbox, self._outbox = nameless_file(), nameless_file()
        self._child: Child | None = None

    def decode(self, encoded: list[bytes], spec: PreprocessSpec) -> list[Pixels | Failure]:
        pieces = self._take(encoded)
        results: list[Pixels | Failure] = []
        while len(results) < len(pieces):
            found, trouble = self._ask(pieces[len(results) :], spec)
            results += found
            if trouble is not None and len(results) < len(pieces):
                results.append(trouble)
        for index, result in enumerate(results):
            # Another image may be to blame: this one is tried once more, by a process that has met no other.
            if isinstance(result, Failure) and result.status in (CRASHED, OUT_OF_MEMORY):
                self.retire()
                found, trouble = self._ask([pieces[index]], spec)
                results[index] = found[0] if found else trouble or result
        if os.fstat(self._inbox.fileno()).st_size > KEEP:
            os.ftruncate(self._inbox.fileno(), 0)
        return results

    def retire(self) -> None:
        """End the process, if there is one; the next request starts another."""
        if self._child is not None:
            self._decoders.children.end(self._child, wait=False)
            self._child = None

    def close(self) -> None:
        self.retire()
        self._inbox.close()
        self._outbox.close()

    def _take(self, encoded: list[bytes]) -> list[tuple[int, int]]:
        pieces, offset = [], 0
        while encoded:
            data = memoryview(encoded.pop(0))
            pieces.append((offset, data.nbytes))
            while data:
                written = os.pwrite(self._inbox.fileno(), data, offset)
                data, offset = data[written:], offset + written
        return pieces

    def _ask(
        self, pieces: Sequence[tuple[int, int]], spec: PreprocessSpec
    ) -> tuple[list[Pixels | Failure], Failure | None]:
        """What the process finished, and what kept it from the next image."""
        child = self._child = self._child or self._decoders.children.start(self._inbox, self._outbox)
        answer = Answer(self._outbox.fileno(), spec)
        answer.clear()
        trouble: Failure | None = None
        try:
            child.control.sendall(request(pieces, spec))
            said = self._listen(child, answer, len(pieces))
        except OSError:
            said = b""
        try:
            found = answer.finished(len(pieces))
        except Nonsense as error:
            found, said = [], b"?"
            trouble = Failure(CRASHED, f"the decoder's answer makes no sense: {error}")
        if said == DONE and len(found) == len(pieces):
            return found, None
        self._child = None
        how = self._decoders.children.end(child, wait=said == b"")
        if trouble is None and said is None:
            trouble = Failure(TIMEOUT, f"not decoded in {self._decoders.seconds:g} s (loader.decode_seconds)")
        return found, trouble or Failure(CRASHED, f"the decoder was {how}" if "killed" in how else f"the decoder {how}")

    def _listen(self, child: Child, answer: Answer, count: int) -> bytes | None:
        """What the process says, nothing if it has gone, or None if one image takes too long."""
        tick = min(TICK, self._decoders.seconds / 4)
        child.control.settimeout(tick)
        current, spent = 0, 0.0
        while spent < self._decoders.seconds:
            try:
                return child.control.recv(1)
            except TimeoutError:
                states = answer.states(count)
                doing = next((i for i, state in enumerate(states) if state < State.PIXELS), count)
                waits = doing < len(states) and states[doing] == State.QUEUED
                spent = 0.0 if waits or doing != current else spent + tick
                current = doing
        return None
