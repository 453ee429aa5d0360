"""A pool of processes that decode images: a crash, a hang or a lack of memory costs one process and one image.

The processes are started with ``exec`` and never forked (CUDA, threads), hold nothing of this process but two files of
their own, need no /dev/shm, and are no ``multiprocessing`` children, which workers that are daemons may not have.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate

from pipeline.core.errors import DecoderUnavailable
from pipeline.core.records import Failure, Pixels, PreprocessSpec
from pipeline.images.decode import EXACT, Decoder
from pipeline.images.pool.processes import TICK, Child, Children, nameless_file, never, unavailable
from pipeline.images.pool.protocol import (
    CRASHED,
    DONE,
    OUT_OF_MEMORY,
    TIMEOUT,
    Answer,
    Answers,
    InvalidAnswer,
    State,
    request,
)

# A file of encoded images larger than this is emptied after use, in bytes.
KEEP = 32 * 2**20
# Compared by identity, as a process may report an equal failure itself.
_KILLED_BY_OTHERS = Failure(CRASHED, "the decoder was killed by SIGKILL")
GiveBack = Callable[[], None]
_NO_TURN = "its turn among the large images did not come"


class _Overdue(Exception):
    """The image at ``index`` takes too long, or its turn among the large images does not come."""

    def __init__(self, *, index: int, queued: bool) -> None:
        super().__init__(index, queued)
        self.index, self.queued = index, queued


class Decoders:
    """A pool of decoder processes; safe to use from many threads. Close it once no thread uses it any more.

    Args:
        decoder: the rules of decoding.
        processes: at most so many are started, when they are first needed.
        seconds: what one image may take, apart from waiting for its turn among the large images.
        memory: what one image may take, in bytes, besides the process itself.
    """

    def __init__(self, decoder: Decoder, *, processes: int, seconds: float, memory: int) -> None:
        self.seconds, self.kind = seconds, decoder.kind
        self.children = Children(decoder, memory=memory)
        # The last one used is the next one used; slots without a process lie at the bottom.
        self._slots: queue.LifoQueue[_Slot | None] = queue.LifoQueue()
        for _ in range(processes):
            self._slots.put(None)
        self.processes = processes
        # Answers of each process that may be lent; see :meth:`decode`.
        self.lent = 0

    def start(self, count: int | None = None) -> None:
        """Start processes, ``count`` at most, and do not wait for them; errors are raised when one is needed."""
        idle: list[_Slot | None] = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._slots.get_nowait())
        for slot in idle if count is None else idle[:count]:
            threading.Thread(target=self._start, args=(slot,), name="start", daemon=True).start()
        for slot in idle[count:] if count is not None else ():
            self._slots.put(slot)

    def grow(self, processes: int) -> None:
        """Allow so many processes, and start the new ones as :meth:`start` does."""
        for _ in range(processes - self.processes):
            threading.Thread(target=self._start, args=(None,), name="start", daemon=True).start()
        self.processes = max(self.processes, processes)

    def _start(self, slot: _Slot | None) -> None:
        try:
            slot = slot or _Slot(self)
            slot.start()
        except (DecoderUnavailable, RuntimeError):
            # The next request tries again; the pool may be closed by now.
            pass
        finally:
            self._slots.put(slot)

    def decode(
        self,
        encoded: list[bytes],
        spec: PreprocessSpec,
        abandoned: Callable[[], bool] = never,
        give_back: list[GiveBack] | None = None,
        *,
        exact: bool = False,
    ) -> list[Pixels | Failure]:
        """Pixels or a failure for each of up to ``CHUNK`` images; takes them out of ``encoded``.

        With ``exact``, processes that decode otherwise decode as ``exact`` does. With ``give_back``, the pixels may lie
        where the process wrote them, which saves a copy: the caller calls what is added to that list once it has read
        them. All such calls of a pool must have the same ``spec``.

        Statuses of a failure: those of :meth:`Decoder.apply`, ``decoder_timeout`` and ``decoder_crashed``.

        Raises:
            DecoderUnavailable: a process cannot be started, or the machine kills them.
            Abandoned: ``abandoned`` became true before all was done.
        """
        slot = self._slots.get()
        try:
            self.children.check_wanted(abandoned)
            slot = slot or _Slot(self)
            return slot.decode(encoded, EXACT if exact else self.kind, spec, abandoned, give_back)
        except BaseException:
            if slot is not None:
                slot.retire()
            raise
        finally:
            self._slots.put(slot)

    def like(self, decoder: Decoder) -> Decoders:
        """Another pool of as many processes, with the same limits, by the rules of ``decoder``."""
        return Decoders(decoder, processes=self.processes, seconds=self.seconds, memory=self.children.memory)

    @property
    def turns(self) -> int:
        """Multiple of ``seconds`` that a large image waits for other large images, at most."""
        return self.processes + 1

    def peak_rss(self) -> int:
        """Bytes that the largest process held at its peak; 0 if none ran, or the system does not tell."""
        return self.children.peak_rss()

    def count_peak(self, peak: int) -> None:
        """Count the peak of decoders that another process started, in bytes."""
        self.children.count_peak(peak)

    def close(self) -> None:
        """End all processes; images that are being decoded are lost."""
        if not self.children.stop():
            return
        for _ in range(self.processes):
            slot = self._slots.get()
            if slot is not None:
                slot.close()
        # A later call raises.
        self._slots.put(None)
        self.children.close()


class _Slot:
    """A place of the pool: two files, and the process that works with them now; used by one thread at a time."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._inbox = nameless_file()
        try:
            self._outbox = nameless_file(lasting=True)
        except BaseException:
            self._inbox.close()
            raise
        self._child: Child | None = None
        self._answers = Answers(self._outbox.fileno())

    def decode(
        self,
        encoded: list[bytes],
        kind: str,
        spec: PreprocessSpec,
        abandoned: Callable[[], bool],
        give_back: list[GiveBack] | None,
    ) -> list[Pixels | Failure]:
        pieces = self._take(encoded)
        results: list[Pixels | Failure] = []
        answer = None
        if give_back is not None and (answer := self._answers.to_lend(spec, self._decoders.lent)) is not None:
            give_back.append(partial(self._answers.give_back, answer))
        while len(results) < len(pieces):
            found, trouble = self._ask(
                pieces[len(results) :], kind, answer or self._answers.own(spec), abandoned, copy=answer is None
            )
            answer = None
            results += found
            if trouble is not None and len(results) < len(pieces):
                results.append(trouble)
        for index, result in enumerate(results):
            # Another image may be the cause: this one is tried once more, by a new process.
            if isinstance(result, Failure) and _worth_a_retry(result):
                self.retire()
                found, trouble = self._ask([pieces[index]], kind, self._answers.own(spec), abandoned)
                again = found[0] if found else trouble or result
                if again is _KILLED_BY_OTHERS and result is _KILLED_BY_OTHERS:
                    raise DecoderUnavailable(
                        f"two decoder processes were killed by SIGKILL over one image of {pieces[index][1]:,} bytes, "
                        "and not by this job: the machine, or the job's share of it, has too little memory. Lower "
                        "loader.workers or loader.decode_memory, or give the job more memory"
                    )
                results[index] = result if again is _KILLED_BY_OTHERS else again
        if os.fstat(self._inbox.fileno()).st_size > KEEP:
            os.ftruncate(self._inbox.fileno(), 0)
        return results

    def start(self, abandoned: Callable[[], bool] = never) -> Child:
        """The process, started if there is none.

        Raises:
            DecoderUnavailable: it cannot be started.
        """
        if self._child is None:
            self._child = self._decoders.children.start(self._inbox, self._outbox, abandoned)
        return self._child

    def retire(self) -> None:
        """End the process, if there is one; the next request starts another."""
        if self._child is not None:
            self._decoders.children.end(self._child, wait=False)
            self._child = None

    def close(self) -> None:
        self.retire()
        self._inbox.close()
        self._outbox.close()
        self._answers.close()

    def _take(self, encoded: list[bytes]) -> list[tuple[int, int]]:
        *starts, end = accumulate(map(len, encoded), initial=0)
        pieces = list(zip(starts, map(len, encoded), strict=True))
        try:
            written = os.pwritev(self._inbox.fileno(), encoded, 0)
            if written < end:
                # One call writes no more than 2 GiB.
                rest = memoryview(b"".join(encoded))
                while written < end:
                    written += os.pwrite(self._inbox.fileno(), rest[written:], written)
        except OSError as error:
            raise unavailable(f"no room for its input: {error}") from error
        encoded.clear()
        return pieces

    def _ask(
        self,
        pieces: Sequence[tuple[int, int]],
        kind: str,
        answer: Answer,
        abandoned: Callable[[], bool],
        *,
        copy: bool = True,
    ) -> tuple[list[Pixels | Failure], Failure | None]:
        """Results that the process finished, and the failure that kept it from the next image."""
        child = self.start(abandoned)
        try:
            answer.clear()
        except OSError as error:
            raise unavailable(f"no room for its output: {error}") from error
        answered, overdue = b"", None
        try:
            child.control.sendall(request(pieces, kind, answer.spec, answer.start))
            answered = self._listen(child, answer, len(pieces), abandoned)
        except _Overdue as error:
            overdue = error
        except OSError:
            pass
        # It ends before its answer is read: an image that was finished just now has not failed.
        trouble = None if answered == DONE else self._end(child, wait=answered == b"" and overdue is None)
        try:
            found = answer.finished(len(pieces), copy=copy)
        except InvalidAnswer as error:
            found, trouble = [], Failure(CRASHED, f"the decoder's answer makes no sense: {error}")
        if overdue is not None and found[overdue.index :]:
            return found, None
        if overdue is not None and len(found) == overdue.index:
            trouble = self._too_long(overdue)
        if self._child is not None and len(found) < len(pieces):
            self.retire()
            trouble = trouble or Failure(CRASHED, "the decoder's answer makes no sense: it is not all there")
        return found, trouble

    def _end(self, child: Child, *, wait: bool) -> Failure:
        how, killed_by_others = self._decoders.children.end(child, wait=wait)
        self._child = None
        self._decoders.children.check_open()
        if killed_by_others:
            return _KILLED_BY_OTHERS
        return Failure(CRASHED, f"the decoder was {how}" if "killed" in how else f"the decoder {how}")

    def _too_long(self, overdue: _Overdue) -> Failure:
        limit = f"{self._decoders.seconds:g} s (loader.decode_seconds)"
        if overdue.queued:
            return Failure(TIMEOUT, f"{_NO_TURN} in {self._decoders.turns} x {limit}")
        return Failure(TIMEOUT, f"not decoded in {limit}")

    def _listen(self, child: Child, answer: Answer, count: int, abandoned: Callable[[], bool]) -> bytes:
        """The byte that the process sends when it is done; empty if the process has ended.

        Time in which the machine sleeps or the job is stopped does not count. A finished image stays finished, so that
        no process can restart its clock for ever.

        Raises:
            _Overdue: one image takes too long.
            Abandoned: the results are not needed any more.
        """
        limit = self._decoders.seconds
        tick = min(TICK, limit / 4)
        child.control.settimeout(tick)
        current, spent, queued = 0, 0.0, 0.0
        while True:
            try:
                return child.control.recv(1)
            except TimeoutError:
                pass
            self._decoders.children.check_wanted(abandoned)
            states = answer.states(count)
            doing = next((i for i, state in enumerate(states) if state < State.PIXELS), count)
            if doing > current:
                current, spent, queued = doing, 0.0, 0.0
            elif states[current : current + 1] == [State.QUEUED]:
                queued += tick
            else:
                spent += tick
            if spent >= limit or queued >= self._decoders.turns * limit:
                raise _Overdue(index=current, queued=spent < limit)


def _worth_a_retry(failure: Failure) -> bool:
    late = failure.status == TIMEOUT and failure.error.startswith(_NO_TURN)
    return late or failure.status in (CRASHED, OUT_OF_MEMORY)
