"""Start and end of the processes of a decoder pool."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from pipeline.core.errors import DecoderUnavailable
from pipeline.core.failpoints import VARIABLE
from pipeline.core.machine import peak_rss
from pipeline.images.decode import Decoder
from pipeline.images.pool.protocol import READY
from pipeline.images.pool.shared_memory import seal

# A process may take this long to start, in seconds: on a busy machine Python comes from a slow disk.
START_SECONDS = 120.0
# A process that closed its socket has this long to end by itself, in seconds.
END_SECONDS = 5.0
# Interval at which a thread that waits for a process looks whether its pixels are still needed, in seconds.
TICK = 0.2
ROOT = Path(__file__).resolve().parents[3]
# Decoding is one thread; malloc's arenas for others would count against the memory limit. With its usual thresholds
# malloc gives every image's buffers back to the kernel, whose fresh pages cost a third of a small image's time.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# Variables of the environment that a process gets; others may hold credentials.
_PASSED = ("PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TZ", VARIABLE)
_PASSED_PREFIXES = ("LC_", "LD_", "DYLD_", "PYTHON", "MALLOC_", "COVERAGE_")


class Abandoned(Exception):
    """The pixels are not needed any more; nothing went wrong."""


def never() -> bool:
    """Return False: the default of callers that always need their pixels."""
    return False


class Child:
    """A process that runs, and the socket to it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process, self.control = process, control


class Ending(NamedTuple):
    """End of a process; ``killed_by_others`` is most often a system without memory."""

    how: str
    killed_by_others: bool


class Children:
    """Starts and ends processes that decode by the rules of ``decoder``, with so many bytes of memory for an image."""

    def __init__(self, decoder: Decoder, *, memory: int) -> None:
        self._decoder, self.memory = decoder, memory
        self._large_lock = nameless_file()
        self._alive: dict[int, Child] = {}
        self._peak = 0
        # A process dies with the thread that started it, so that the decoding threads, which come and go, start none.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="starter")
        self._closed = threading.Event()

    def start(self, inbox: IO[bytes], outbox: IO[bytes], abandoned: Callable[[], bool]) -> Child:
        """A new process that reads and writes these files.

        Raises:
            DecoderUnavailable: it cannot be started.
            Abandoned: ``abandoned`` said so first.
        """
        self.check_open()
        with nameless_file() as errors:
            child = self._spawn(inbox, outbox, errors)
            try:
                ready = self._first_byte(child, abandoned)
            except BaseException:
                self.end(child, wait=False)
                raise
            if ready != READY:
                how = self.end(child, wait=not ready).how
                self.check_open()
                errors.seek(max(0, errors.tell() - 2000))
                raise unavailable(f"{how} while it started. {errors.read().decode(errors='replace').strip()}")
        return child

    def _spawn(self, inbox: IO[bytes], outbox: IO[bytes], errors: IO[bytes]) -> Child:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise unavailable(str(error)) from error
        fds = {
            "control": theirs.fileno(),
            "inbox": inbox.fileno(),
            "outbox": outbox.fileno(),
            "large_lock": self._large_lock.fileno(),
        }
        settings = {
            **fds,
            "parent": os.getpid(),
            "memory": self.memory,
            "decoder": self._decoder.rules(),
        }
        with theirs:
            try:
                process = self._starter.submit(
                    subprocess.Popen,
                    [sys.executable, "-P", "-m", "pipeline.images.pool.worker", json.dumps(settings)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=list(fds.values()),
                    env=environment(os.environ),
                    # Ctrl-C goes to a whole group; the job itself ends its decoders.
                    process_group=0,
                ).result()
            except OSError as error:
                ours.close()
                raise unavailable(str(error)) from error
            except BaseException:
                ours.close()
                raise
        child = Child(process, ours)
        self._alive[process.pid] = child
        return child

    def _first_byte(self, child: Child, abandoned: Callable[[], bool]) -> bytes:
        child.control.settimeout(TICK)
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            self.check_wanted(abandoned)
            try:
                return child.control.recv(1)
            except TimeoutError:
                continue
            except OSError:
                break
        return b""

    def end(self, child: Child, *, wait: bool) -> Ending:
        """End a process, or with ``wait`` let it end by itself first; returns how it ended."""
        self._peak = self.peak_rss()
        if wait:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(END_SECONDS)
        strange = child.process.poll() == -signal.SIGKILL and not self._closed.is_set()
        child.process.kill()
        code = child.process.wait()
        child.control.close()
        self._alive.pop(child.process.pid, None)
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        return Ending(how=how, killed_by_others=strange)

    def check_open(self) -> None:
        """Raise RuntimeError once these are closed."""
        if self._closed.is_set():
            raise RuntimeError("the decoders are closed")

    def check_wanted(self, abandoned: Callable[[], bool]) -> None:
        """Call :meth:`check_open`, and raise Abandoned if ``abandoned()`` is true."""
        self.check_open()
        if abandoned():
            raise Abandoned

    def peak_rss(self) -> int:
        """Bytes that the largest process held at its peak; 0 if none ran, or the system does not tell."""
        return max(self._peak, *map(peak_rss, list(self._alive)), 0)

    def count_peak(self, peak: int) -> None:
        """Count the peak of processes that others started."""
        self._peak = max(self._peak, peak)

    @property
    def pids(self) -> list[int]:
        """The processes that live."""
        return list(self._alive)

    def stop(self) -> bool:
        """Kill all, and start no other one; False if that was done before."""
        if self._closed.is_set():
            return False
        self._closed.set()
        for child in list(self._alive.values()):
            child.process.kill()
        return True

    def close(self) -> None:
        """Release what is left, once every process has ended."""
        self._starter.shutdown()
        self._large_lock.close()


def nameless_file(*, lasting: bool = False) -> IO[bytes]:
    """A file in memory where the system has such files, and in the temporary folder elsewhere.

    A ``lasting`` one can grow and not shrink, where the system supports that.

    Raises:
        DecoderUnavailable: it cannot be created.
    """
    try:
        if hasattr(os, "memfd_create"):
            flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if lasting else 0)
            file = os.fdopen(os.memfd_create("decoder", flags), "w+b", buffering=0)
            if lasting:
                seal(file.fileno())
            return file
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise unavailable(str(error)) from error


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Variables of the environment ``ours`` that a process gets."""
    known = {name: value for name, value in ours.items() if name in _PASSED or name.startswith(_PASSED_PREFIXES)}
    return {**known, **_ENVIRONMENT, "PYTHONPATH": python_path(ours)}


def python_path(ours: Mapping[str, str]) -> str:
    """``PYTHONPATH`` of a process that has this package, wherever it starts."""
    return os.pathsep.join([str(ROOT), *filter(None, [ours.get("PYTHONPATH")])])


def unavailable(why: str) -> DecoderUnavailable:
    """The error of a process that cannot start or work, with the alternative."""
    return DecoderUnavailable(
        f"a decoder process cannot be started ({sys.executable}): {why}. loader.isolation=none decodes without, and "
        "an image that crashes the decoder then ends the run"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
