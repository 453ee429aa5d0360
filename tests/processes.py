"""Processes that tests start or watch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT

# PYTHONWARNINGS of a child process: warnings are errors, but for those of the source of other packages, which Python
# may compile at its first import.
WARNINGS = "error,ignore:invalid escape sequence:DeprecationWarning,ignore:invalid escape sequence:SyntaxWarning"


def run_python(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments at the root of the checkout, with additions to the environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def loads(code: str, *packages: str) -> list[str]:
    """Return those of ``packages`` that a new process has imported after ``code``."""
    done = run_python("-c", f"import sys; {code}; print([name for name in {packages} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


def is_running(pid: int) -> bool:
    """Return False for a process that has ended, also if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(done: Callable[[], object], seconds: float = 60, *, log: Path | None = None) -> None:
    """Wait until ``done`` returns something true; fails with the content of ``log`` after ``seconds``."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, log.read_text() if log else f"not within {seconds} s"
        time.sleep(0.01)
