"""Child processes that exchange lines of JSON with their parent, and the reason where one ends early."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.core.errors import PipelineError

# Time that a process gets to end after its pipes are closed, or after it was killed.
END_SECONDS = 2.0
# Length of the last message of a process that is shown.
MESSAGE = 300


class ChildError(PipelineError):
    """The answer of a child was an error; ``exit_code`` is that of the error."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class ChildEnded(PipelineError):
    """The child ended early; ``cause`` is ``timeout``, the name of a signal such as ``SIGKILL``, or ``exit``."""

    def __init__(self, reason: str, cause: str) -> None:
        super().__init__(reason)
        self.cause = cause


class Child:
    """A process in a group of its own: Ctrl-C reaches the parent only, which ends the whole group.

    Use it as a context manager. Commands that use it have an option ``--timeout``, which the messages name.

    Args:
        command: the program and its arguments.
        log: the file for its standard error; None discards that.
        environment: variables added to those of this process.
        answers: False sends its standard output to the log too, for a command that answers no requests.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path | None,
        environment: Mapping[str, str] | None = None,
        answers: bool = True,
    ) -> None:
        self._log = log
        with open(log or os.devnull, "wb") as file:
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

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, request: object) -> None:
        """Send a request.

        Raises:
            ChildEnded: the process has ended.
        """
        assert self._process.stdin is not None
        data = memoryview(json.dumps(request).encode() + b"\n")
        try:
            # Without a buffer, a write may take a part of the data.
            while data:
                data = data[self._process.stdin.write(data) :]
        except (OSError, ValueError) as error:
            raise self._ended() from error

    def receive(self, *, timeout: float) -> Any:
        """Return the next answer.

        Raises:
            ChildError: the answer is an object with the key ``error``; the child waits for more requests.
            ChildEnded: the child ended, or did not answer within ``timeout`` seconds and was ended.
        """
        answer = json.loads(self._line(timeout))
        if isinstance(answer, dict) and "error" in answer:
            raise ChildError(answer["error"], answer["exit_code"])
        return answer

    def wait(self, *, timeout: float) -> None:
        """Wait until the process ends.

        Raises:
            ChildEnded: its exit code is not 0, or it did not end within ``timeout`` seconds and was ended.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise ChildEnded(f"not done within {timeout:g} s; --timeout sets another limit", "timeout") from error
        if code:
            raise self._ended()

    @property
    def pid(self) -> int:
        """The number of the process, which is that of its group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    def interrupt(self) -> None:
        """Send SIGINT to the process and its group, as Ctrl-C does."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGINT)

    def close(self) -> None:
        """End the process with all that it started."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def kill(self) -> None:
        """End the process and its group at once; one that waits for a disk or a driver is abandoned."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill()
                raise ChildEnded(f"no answer within {timeout:g} s; --timeout sets another limit", "timeout")
            # A grandchild may hold the other end of the pipe after the child has ended: poll the child as well.
            ready, _, _ = select.select([self._process.stdout], [], [], min(left, 1.0))
            if not ready and self._process.poll() is None:
                continue
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                raise self._ended()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _ended(self) -> ChildEnded:
        """Return the error with the signal or the exit code that ended the process, and its last message."""
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(END_SECONDS)
        cause, reason = "exit", f"the process ended with exit code {code}"
        if code is None:
            self.kill()
            reason = "the process closed its standard output and was ended"
        elif code < 0:
            cause = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
            reason = f"the process was ended by {cause}"
            if cause == "SIGKILL":
                reason += ", often a sign that memory ran out"
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log is not None else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return ChildEnded(f"{reason}: {lines[-1][:MESSAGE]}" if lines else reason, cause)


class Parent:
    """The other end, in the child: requests of the parent, and answers to it.

    Libraries print to standard output: from here on that is standard error, and the answers have a pipe of their own.
    When the parent closes its end, or has ended, this process ends at once with all that it started.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def receive(self) -> Any:
        """Wait for the next request."""
        return json.loads(self._requests.get())

    def send(self, answer: object) -> None:
        """Send an answer."""
        self._answers.write(json.dumps(answer).encode() + b"\n")
        self._answers.flush()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._requests.put(line)
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)
