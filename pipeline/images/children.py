"""The processes of a decoder pool: how they are started, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from pipeline.errors import DecoderUnavailable
from pipeline.images.decode import Decoder
from pipeline.images.wire import READY

# A process may take this long to start, in seconds: on a busy machine Python comes from a slow disk.
START_SECONDS = 120.0
# A process that closed its socket has this long to end by itself, in seconds.
END_SECONDS = 5.0
ROOT = Path(__file__).resolve().parent.parent.parent
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


class Child:
    """A process that runs, and the socket to it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process, self.control = process, control


class Children:
    """Starts and ends processes that decode by the rules of ``decoder``, with so many bytes of memory for an image."""

    def __init__(self, decoder: Decoder, *, memory: int) -> None:
        self._decoder, self._memory = decoder, memory
        self._giants = nameless_file()
        self._alive: dict[int, Child] = {}
        self._peak = 0
        # A process dies with the thread that started it, so that the decoding threads, which come and go, start none.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="starter")
        self._closed = threading.Event()

    def start(self, inbox: IO[bytes], outbox: IO[bytes]) -> Child:
        """A new process that reads and writes these files."""
        self.check_open()
        ours, theirs = socket.socketpair()
        fds = {
            "control": theirs.fileno(),
            "inbox": inbox.fileno(),
            "outbox": outbox.fileno(),
            "giants": self._giants.fileno(),
        }
        settings = {
            **fds,
            "parent": os.getpid(),
            "memory": self._memory,
            # It writes pixels and nothing else; they are a part of what it may hold.
            "written": self._memory,
            "decoder": self._decoder.rules(),
        }
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with tempfile.TemporaryFile() as errors, theirs:
            try:
                process = self._starter.submit(
                    subprocess.Popen,
                    [sys.executable, "-P", "-m", "pipeline.images.child", json.dumps(settings)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=list(fds.values()),
                    env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                    # Ctrl-C goes to a whole group; it is for the job to decide what becomes of its decoders.
                    process_group=0,
                ).result()
            except OSError as error:
                ours.close()
                raise _unavailable(str(error)) from error
            child = Child(process, ours)
            self._alive[process.pid] = child
            theirs.close()
            ours.settimeout(START_SECONDS)
            try:
                ready = ours.recv(1)
            except OSError:
                ready = b""
            if ready != READY:
                how = self.end(child, wait=not ready)
                self.check_open()
                errors.seek(max(0, errors.tell() - 2000))
                raise _unavailable(f"{how} while it started. {errors.read().decode(errors='replace').strip()}")
        return child

    def end(self, child: Child, *, wait: bool) -> str:
        """Make sure that a process has ended; how it ended by itself, if ``wait`` lets it."""
        self._peak = self.peak_rss()
        if wait:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(END_SECONDS)
        child.process.kill()
        code = child.process.wait()
        child.control.close()
        self._alive.pop(child.process.pid, None)
        return f"killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"

    def check_open(self) -> None:
        """Raise RuntimeError once these are closed."""
        if self._closed.is_set():
            raise RuntimeError("the decoders are closed")

    def peak_rss(self) -> int:
        """Bytes that the largest process held at its peak; 0 if none ran, or the system does not tell."""
        return max(self._peak, *(_peak_rss(pid) for pid in list(self._alive)), 0)

    def stop(self) -> bool:
        """Kill all, and start no other one; False if that was done before."""
        if self._closed.is_set():
            return False
        self._closed.set()
        for child in list(self._alive.values()):
            child.process.kill()
        return True

    def close(self) -> None:
        """Let go of what is left, once every process has ended."""
        self._starter.shutdown()
        self._giants.close()


def nameless_file() -> IO[bytes]:
    """A file in memory where the system has such files, and in the temporary folder elsewhere."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("decoder"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _unavailable(why: str) -> DecoderUnavailable:
    return DecoderUnavailable(
        f"a decoder process cannot be started ({sys.executable}): {why}. loader.isolation=none decodes without, and "
        "an image that crashes the decoder then ends the run"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _peak_rss(pid: int) -> int:
    """Bytes; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)
    except OSError:
        return 0
