"""The parent of the probes: whatever one of them does, there is a line about it, and the next one has its turn."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pipeline.config.schema import Config
from pipeline.doctor.check import Check, Status
from pipeline.doctor.probe_process import from_json
from pipeline.doctor.probes import Entry, entry

# How long a process may take to start, and to clear up after itself when it is told to end.
START_SECONDS, GRACE_SECONDS = 30.0, 2.0


def examine(config: Config | None, probes: Sequence[Entry], *, quick: bool, limit: float | None) -> Iterator[Check]:
    """What every probe finds, in order, as soon as it is known.

    A probe that hangs longer than ``limit`` seconds, or than its own limit where that is None, is ended; one that takes
    its process with it costs nobody else.
    """
    with _scratch() as scratch, _complaints() as complaints:
        left = list(probes)
        while left:
            try:
                process = _Process(config, left, scratch, complaints, quick=quick)
            except OSError as error:
                names = ", ".join(probe.group for probe in left)
                fact = f"no process can be started to look ({error.strerror or error}); not looked at: {names}"
                way_out = "raise the limits (ulimit -a shows them; in a container --pids-limit), or free some memory"
                yield Check("limits", "processes", Status.FAIL, fact, way_out)
                return
            try:
                yield from process.findings(left, limit)
            finally:
                process.end()


class _Process:
    """One process that runs probes, until it is done or one of them ends it."""

    def __init__(
        self,
        config: Config | None,
        probes: Sequence[Entry],
        scratch: str | None,
        complaints: IO[bytes],
        *,
        quick: bool,
    ) -> None:
        caches = None if scratch is None else str(Path(scratch, "compiled"))
        inner = None if scratch is None else tempfile.mkdtemp(dir=scratch)
        self._complaints, self._from = complaints, complaints.seek(0, os.SEEK_END)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.doctor.probe_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            bufsize=0,
            # Temporary files of libraries go with the scratch folder.
            env={**os.environ, **({} if scratch is None else {"TMPDIR": scratch})},
            start_new_session=True,
        )
        told = {
            "config": None if config is None else asdict(config),
            "probes": [probe.module for probe in probes],
            "quick": quick,
            "temporary": _temporary(),
            "scratch": inner,
            "caches": caches,
        }
        # It may never read, and a long list of labels is more than a pipe holds.
        line = json.dumps(told).encode() + b"\n"
        threading.Thread(target=self._send, args=(line,), name="told", daemon=True).start()

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            while line:
                line = line[self._process.stdin.write(line) :]

    def findings(self, left: list[Entry], limit: float | None) -> Iterator[Check]:
        """What is found; probes that were looked at, or gave up, are taken out of ``left``."""
        current: Entry | None = None
        seconds = START_SECONDS
        deadline = time.monotonic() + seconds
        received = b""
        assert self._process.stdout is not None
        while True:
            while b"\n" in received:
                line, _, received = received.partition(b"\n")
                told: dict[str, Any] = json.loads(line)
                if "check" in told:
                    yield from_json(told["check"])
                elif "begin" in told:
                    current = entry(told["begin"])
                    seconds = current.seconds if limit is None else limit
                    deadline = time.monotonic() + seconds
                else:
                    left.remove(entry(told["end"]))
                    current = None
                    if not left:
                        return
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                blamed = current or left[0]
                yield self._epitaph(blamed, hung=not ready, seconds=seconds)
                left.remove(blamed)
                return
            received += data

    def end(self) -> None:
        """End the process and all that it started: kindly, so that it takes its files with it, then at once."""
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            if self._process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    if number == signal.SIGTERM:
                        self._process.terminate()
                    else:
                        os.killpg(self._process.pid, number)
                # One that waits for a disk that is gone does not even hear the second one; it is left behind.
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        # What it started may outlive it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _epitaph(self, probe: Entry, *, hung: bool, seconds: float) -> Check:
        said = self._last_words()
        if hung:
            fact = f"no answer within {seconds:g} s: it was ended"
            way_out = "something does not answer: a network disk, a server, a GPU; --timeout sets another limit"
        else:
            try:
                code = self._process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                code = 0
            fact = f"the process that looked ended with exit code {code}"
            way_out = "a library may be broken or built for another machine: install the packages anew"
            if code < 0:
                with suppress(ValueError):
                    code_name = signal.Signals(-code).name
                    fact = f"the process that looked was ended by {code_name}"
                    if code_name == "SIGKILL":
                        way_out = "often a sign that memory ran out: take a smaller loader.batch_size or more memory"
        fact = f"{fact}; its last words: {said}" if said else fact
        return Check(probe.group, probe.module, Status.FAIL, fact, way_out)

    def _last_words(self) -> str:
        self._complaints.seek(self._from)
        lines = self._complaints.read().decode(errors="replace").splitlines()
        self._complaints.seek(0, os.SEEK_END)
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


@contextmanager
def _scratch() -> Iterator[str | None]:
    """A folder that is gone in the end; None where there can be none, of which the disks' probe tells."""
    try:
        folder = tempfile.mkdtemp(prefix="clip-pipeline-doctor-")
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        # The folder of exports in it is made of links: what they lead to stays.
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _complaints() -> Iterator[IO[bytes]]:
    """What the probes' processes say on standard error: in memory, as there may be no disk to write to."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("complaints"), "w+b", buffering=0) as file:
            yield file
    else:
        with tempfile.TemporaryFile(buffering=0) as file:
            yield file


def _temporary() -> str:
    """The folder for temporary files, or the one that was wanted where none can be written."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR") or "/tmp"
