"""Feeder processes that start before their work is known, as their imports take as long as opening a model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import IO

from pipeline.config.schema import Config
from pipeline.core.errors import DecoderUnavailable
from pipeline.core.gpus import VISIBLE
from pipeline.images.factory import worker_threads
from pipeline.images.pool.processes import nameless_file, python_path


@dataclass(frozen=True, slots=True)
class FeederProcess:
    """A process, the connection to it, and the file of its memory, which is empty at first."""

    popen: subprocess.Popen[bytes]
    connection: Connection
    file: IO[bytes]
    sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, content: object) -> None:
        """Send a message, see :mod:`pipeline.engine.feeder_process`; nothing to a process that has ended."""
        with self.sending, suppress(OSError):
            self.connection.send(content)

    def end(self) -> None:
        """Kill the process, unless it has ended, and release what belongs to it."""
        self.popen.kill()
        self.popen.wait()
        self.connection.close()
        self.file.close()


class FeederPool:
    """``count`` feeder processes at most. It may be used again after :meth:`close`.

    Args:
        config: of the job, but for the batch size, which may follow later.
        count: processes among which the cores are divided.
    """

    def __init__(self, config: Config, count: int) -> None:
        self.count = count
        self._config = share_of(config, count)
        # A feeder ends with the thread that started it.
        self._starter: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[FeederProcess]] = deque()
        self._taken: list[FeederProcess] = []

    def start(self, count: int) -> None:
        """Let ``count`` processes wait for work, and do not wait for them; end others that wait."""
        self._starter = self._starter or ThreadPoolExecutor(1, thread_name_prefix="starter")
        while len(self._waiting) < count:
            self._waiting.append(self._starter.submit(self._spawn))
        while len(self._waiting) > count:
            _end(self._waiting.pop())

    @property
    def waiting(self) -> int:
        """Number of the processes that wait for work."""
        return len(self._waiting)

    def take(self) -> FeederProcess:
        """One of the processes that wait for work.

        Raises:
            DecoderUnavailable: it cannot be started.
        """
        process = self._waiting.popleft().result()
        self._taken.append(process)
        return process

    def close(self) -> None:
        """End all processes."""
        while self._waiting:
            _end(self._waiting.pop())
        while self._taken:
            self._taken.pop().end()
        if self._starter is not None:
            self._starter.shutdown()
            self._starter = None

    def _spawn(self) -> FeederProcess:
        # One that decodes on the GPU sees those of this process, so that the number of the device means the same one.
        gpus = {} if self._config.images.decoder == "gpu" else {VISIBLE: ""}
        file = nameless_file(lasting=True)
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                settings = {"parent": os.getpid(), "control": theirs.fileno(), "memory": file.fileno()}
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pipeline.engine.feeder_process", json.dumps(settings)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), file.fileno()],
                    env={**os.environ, "PYTHONPATH": python_path(os.environ), **gpus},
                    # Ctrl-C goes to a whole group; the job itself ends its feeders.
                    process_group=0,
                )
        except OSError as error:
            raise DecoderUnavailable(
                f"a feeder process cannot be started ({sys.executable}): {error}; loader.feeders=0 reads in the job"
            ) from error
        feeder = FeederProcess(process, Connection(ours.detach()), file)
        feeder.send(self._config)
        return feeder


def share_of(config: Config, count: int) -> Config:
    """The config of each of ``count`` feeders, with its share of the workers."""
    return config.changed({"loader.workers": max(1, worker_threads(config) // count)})


def _end(started: Future[FeederProcess]) -> None:
    """End a process that nobody took; one that could not be started is not missed."""
    if started.exception() is None:
        started.result().end()
