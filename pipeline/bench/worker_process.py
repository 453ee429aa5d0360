"""Processes that compute on request: a line of JSON in, a line of JSON out, and a plain reason when one dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError

# How long a child may take to end by itself once its standard input is closed, in seconds.
FAREWELL = 2.0


class Refused(PipelineError):
    """The child lives, and answered with the reason why it cannot; ``exit_code`` is that of the error it met."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Died(PipelineError):
    """The child is gone, or did not answer in time."""


class Child:
    """One process. It leads a group of its own: Ctrl-C reaches the parent alone, which ends the whole group.

    A parent that dies closes the pipe, and the child ends itself.
    """

    def __init__(self, command: Sequence[str], *, complaints: Path, environment: Mapping[str, str]) -> None:
        self._complaints = complaints
        with complaints.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                bufsize=0,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._received = b""

    @property
    def pid(self) -> int:
        """The process, which is its group too."""
        return self._process.pid

    def ask(self, request: Mapping[str, object], *, timeout: float) -> dict[str, Any]:
        """Send a request and wait for the answer; raises what the two do."""
        self.send(request)
        return self.receive(timeout=timeout)

    def send(self, request: Mapping[str, object]) -> None:
        """Send a request.

        Raises:
            Died: the process is gone.
        """
        if self._process.stdin is None:
            raise Died("its standard input is no pipe")
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise Died(self._epitaph()) from error

    def receive(self, *, timeout: float) -> dict[str, Any]:
        """The answer to the oldest request that has none yet.

        Raises:
            Refused: the child met an error, and goes on waiting for requests.
            Died: it ended, or did not answer within ``timeout`` seconds and was ended.
        """
        answer: dict[str, Any] = json.loads(self._line(timeout))
        if "error" in answer:
            raise Refused(answer["error"], answer["exit_code"])
        return answer

    def close(self) -> None:
        """End the process and all that it started; kindly first."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def _line(self, timeout: float) -> bytes:
        if self._process.stdout is None:
            raise Died("its standard output is no pipe")
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill()
                raise Died(f"no answer within {timeout:g} s; --timeout sets another limit")
            # A process that the child left behind may hold its end of the pipe: look at the child, too.
            ready, _, _ = select.select([self._process.stdout], [], [], min(left, 1.0))
            if not ready and self._process.poll() is None:
                continue
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                raise Died(self._epitaph())
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _epitaph(self) -> str:
        """Why it died: the signal or the exit code, and its last words."""
        try:
            code = self._process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the process closed its standard output and was ended"
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            why = f"the process was ended by {name}"
            if name == "SIGKILL":
                why += ", often a sign that memory ran out (fewer rows in --only take less)"
        else:
            why = f"the process ended with exit code {code}"
        words = [line.strip() for line in self._complaints.read_text(errors="replace").splitlines() if line.strip()]
        return f"{why}: {words[-1]}" if words else why
