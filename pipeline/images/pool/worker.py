"""A decoder process: ``python -m pipeline.images.pool.worker SETTINGS``, started by :mod:`pipeline.images.pool.pool`.

It decodes untrusted bytes with libraries written in C, so that it gives up all rights that it does not need before the
first image: it can open no file, write no core dump, gain no privileges and take no more memory than its limit, and it
ends with the process that started it.
"""

from __future__ import annotations

import codecs
import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

from PIL import AvifImagePlugin, Image, ImageCms, ImageColor, ImageFile, ImageOps, ImagePalette  # noqa: F401

from pipeline.core.failpoints import failpoint
from pipeline.core.processes import end_with
from pipeline.core.records import Failure, Pixels, PreprocessSpec
from pipeline.images import formats, jpeg  # noqa: F401
from pipeline.images.decode import BLANK, EXACT, GLANCE, Decoder, limit_pixels
from pipeline.images.pool.protocol import CRASHED, DONE, OUT_OF_MEMORY, READY, Answer, State, parse_request
from pipeline.images.pool.shared_memory import Window

PR_SET_NO_NEW_PRIVS = 38
# Address space of the process itself, in bytes, where the system does not tell.
OWN = 512 * 2**20
# Addresses for answers, in bytes; they do not count as memory of an image.
WINDOW = 2**30
# Text in images; Python loads these from files when they are first used.
_CODECS = ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "cp1252", "mac-roman")
# Statuses that a lack of memory may cause.
_DAMAGE = frozenset({"corrupt", "truncated", "unsupported"})
_libc = ctypes.CDLL(None)
_errno_location = getattr(_libc, "__errno_location" if sys.platform == "linux" else "__error")
_errno_location.restype = ctypes.POINTER(ctypes.c_int)


class LargeImageLock:
    """Lock of the processes that share the file: one large image at a time. The kernel frees it if a process dies."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.answer: Answer | None = None
        self.index = 0

    def __enter__(self) -> None:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            # Waiting does not count as decoding time.
            self._mark(State.QUEUED)
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            self._mark(State.DECODING)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _mark(self, state: State) -> None:
        if self.answer is not None:
            self.answer.mark(self.index, state)


def main() -> None:
    """Answer requests until the socket closes."""
    settings = json.loads(sys.argv[1])
    end_with(settings["parent"])
    # Some schedulers send these to every process of a job; the job itself ends its decoders.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=settings["control"])
    lock = LargeImageLock(settings["large_lock"])
    rules: dict[str, Any] = settings["decoder"]
    decoder = Decoder(**{**rules, "formats": tuple(rules["formats"])}, large_lock=lock)
    _load_all(decoder)
    window = Window(settings["outbox"], WINDOW)
    _give_up_rights(settings["memory"])
    # Nothing of what is loaded by now is ever garbage.
    gc.freeze()
    control.sendall(READY)
    answer: Answer | None = None
    while head := control.recv(4, socket.MSG_WAITALL):
        pieces, kind, spec, start = parse_request(control.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))
        if answer is None or (answer.spec, answer.start) != (spec, start):
            # Answers that are not read yet are out of reach from here on.
            lock.answer = answer = Answer(settings["outbox"], spec, start, window=window)
        asked = decoder if kind == decoder.kind else replace(decoder, kind=kind)
        for index, (offset, size) in enumerate(pieces):
            lock.index = index
            answer.mark(index, State.DECODING)
            answer.put(index, _decode(settings["inbox"], offset, size, asked, spec))
        control.sendall(DONE)


def _decode(inbox: int, offset: int, size: int, decoder: Decoder, spec: PreprocessSpec) -> Pixels | Failure:
    try:
        data = os.pread(inbox, size, offset)
        failpoint("child.decode", data)
        _errno().value = 0
        result = decoder.pixels(data, spec)
        missed = _errno().value == errno.ENOMEM
    except MemoryError:
        return Failure(OUT_OF_MEMORY, f"not enough memory to decode {size:,} bytes")
    except Exception as error:
        return Failure(CRASHED, f"{type(error).__name__}: {error}")
    # Libraries report a malloc that failed as damage of the image; only its errno tells.
    if isinstance(result, Failure) and result.status in _DAMAGE and missed:
        return Failure(OUT_OF_MEMORY, f"not enough memory to decode {size:,} bytes ({result.error})")
    return result


def _errno() -> ctypes.c_int:
    """C's ``errno`` of this thread itself; ``ctypes.get_errno`` only knows what functions called by ctypes left."""
    number: ctypes.c_int = _errno_location().contents
    return number


def _load_all(decoder: Decoder) -> None:
    """Load whatever decoding may need later, when no file can be opened any more."""
    Image.init()
    formats.load(decoder.formats)
    limit_pixels(decoder.max_pixels)
    # As many decoders run as there are cores; threads of their own would only take memory.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    for name in _CODECS:
        codecs.lookup(name)
    ImageFile.LOAD_TRUNCATED_IMAGES = decoder.kind == GLANCE
    if decoder.kind not in (BLANK, EXACT, GLANCE):
        import torch

        from pipeline.images import fast

        torch.set_num_threads(1)
        fast.warm_up()


def _give_up_rights(memory: int) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    os.close(quiet)
    _lower(resource.RLIMIT_CORE, 0)
    # Answers are written as memory.
    _lower(resource.RLIMIT_FSIZE, 0)
    if sys.platform == "linux":
        _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _lower(resource.RLIMIT_AS, _own() + memory)
    # The limit is on the numbers of new files; what is open already stays.
    _lower(resource.RLIMIT_NOFILE, 0)


def _own() -> int:
    """Bytes of address space that this process takes already."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return OWN


def _lower(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    # Not every system knows every limit.
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main()
