"""Child processes: requests and answers as lines of JSON, and the reason of a failure in plain words."""

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

# Seconds for a child to end by itself once its standard input is closed.
CLOSE_SECONDS = 2.0


class Refused(PipelineError):
    """The answer of a child was an error; ``exit_code`` is that of the error."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Died(PipelineError):
    """The child ended with an error, or exceeded its timeout and was ended."""


class Child:
    """A process that leads a group of its own: Ctrl-C reaches the parent only, which ends the whole group.

    Args:
        command: the program and its arguments.
        log: the file for its standard error.
        environment: variables added to those of this process.
        answers: False sends its standard output to the log too, for a command that answers no requests.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, answers: bool = True
    ) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else file,
                stderr=file,
                bufsize=0,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._received = b""

    def ask(self, request: Mapping[str, object], *, timeout: float) -> dict[str, Any]:
        """Send a request and return its answer; see :meth:`send` and :meth:`receive`."""
        self.send(request)
        return self.receive(timeout=timeout)

    def send(self, request: Mapping[str, object]) -> None:
        """Send a request.

        Raises:
            Died: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except (OSError, ValueError) as error:
            raise Died(self._reason()) from error

    def receive(self, *, timeout: float) -> dict[str, Any]:
        """Return the answer to the oldest request without one.

        Raises:
            Refused: the answer is an error; the child waits for more requests.
            Died: the child ended, or did not answer within ``timeout`` seconds and was ended.
        """
        answer: dict[str, Any] = json.loads(self._line(timeout))
        if "error" in answer:
            raise Refused(answer["error"], answer["exit_code"])
        return answer

    def wait(self, *, timeout: float) -> None:
        """Wait until the process ends.

        Raises:
            Died: its exit code is not 0, or it did not end within ``timeout`` seconds and was ended.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise Died(f"not done within {timeout:g} s; --timeout sets another limit") from error
        if code:
            raise Died(self._reason())

    def close(self) -> None:
        """Close the standard input of the process, and end its group if that does not end it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def kill(self) -> None:
        """End the process and its group at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill()
                raise Died(f"no answer within {timeout:g} s; --timeout sets another limit")
            # A grandchild may hold the other end of the pipe after the child has ended: poll the child as well.
            ready, _, _ = select.select([self._process.stdout], [], [], min(left, 1.0))
            if not ready and self._process.poll() is None:
                continue
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                raise Died(self._reason())
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _reason(self) -> str:
        """The signal or the exit code that ended the process, and the last line of its log."""
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the process closed its standard output and was ended"
        reason = f"the process ended with exit code {code}"
        if code < 0:
            known = -code in set(signal.Signals)
            name = signal.Signals(-code).name if known else f"signal {-code}"
            reason = f"the process was ended by {name}"
            if name == "SIGKILL":
                reason += ", often a sign that memory ran out (fewer rows in --only take less)"
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{reason}: {lines[-1]}" if lines else reason
