"""A command that runs to its end in a process of its own: how long it took, what it spent, and why it failed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.processes import spent


class CommandFailed(PipelineError):
    """The command ended with another code than 0, or not in time."""


@dataclass(frozen=True, slots=True)
class Ran:
    """``began`` in seconds since the epoch, seconds until the process was gone, and core seconds of all it started."""

    began: float
    seconds: float
    core_seconds: float


def run_command(command: Sequence[str], *, log: Path, timeout: float) -> Ran:
    """Run ``command``, its output into the file ``log``; whatever ends this ends all that it started.

    Raises:
        CommandFailed: with the last line that it said.
    """
    before = spent()
    began, clock = time.time(), time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env={**os.environ}
        )
    try:
        code = process.wait(timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise CommandFailed(f"not done within {timeout:g} s; --timeout sets another limit") from error
        raise
    seconds = time.perf_counter() - clock
    if code:
        words = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise CommandFailed(f"{how}: {words[-1]}" if words else how)
    # Other children of this process wait meanwhile, and spend next to nothing.
    return Ran(began=began, seconds=seconds, core_seconds=(spent() - before).children)
