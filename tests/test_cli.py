"""Work beside the main thread's: its result, its error, and a process that ends before it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.core.concurrency import aside
from tests.conftest import ROOT
from tests.processes import run_python

BUSY = """
import importlib, time
from pipeline.core.cli import own_exit_code
from pipeline.core.concurrency import aside

library = importlib.import_module("LIBRARY")

def work():
    numbers, end = library.ones((200, 200)), time.monotonic() + 30
    while time.monotonic() < end:
        numbers @ numbers

with own_exit_code():
    aside(work, name="busy")
    time.sleep(0.2)
    print("said")
    raise SystemExit(CODE)
"""


def test_a_result_and_an_error_are_in_the_future() -> None:
    assert aside(lambda: 3, name="three").result(10) == 3
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0, name="none").result(10)


@pytest.mark.parametrize(("library", "code", "wanted"), [("torch", "4", 4), ("numpy", "None", 0), ("numpy", "'no'", 1)])
def test_a_process_ends_with_its_own_exit_code_while_another_thread_computes(
    library: str, code: str, wanted: int
) -> None:
    ended = run_python("-c", BUSY.replace("LIBRARY", library).replace("CODE", code))
    assert (ended.returncode, ended.stdout) == (wanted, "said\n"), ended.stderr


SAYING = """
import sys
from pipeline.core.cli import own_exit_code
with own_exit_code():
    print("x" * SIZE)
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("size", "wanted"), [(10, 3), (1_000_000, 141)])
def test_a_process_whose_reader_has_gone_ends_without_a_word(size: int, wanted: int) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-c", SAYING.replace("SIZE", str(size))]
    # Empty, it counts as not set: else each write would be tried at once.
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(command, cwd=ROOT, env=env, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(theirs)
    assert (ended.returncode, ended.stderr) == (wanted, "")


def test_a_broken_pipe_that_is_not_standard_output_is_an_error() -> None:
    body = "with own_exit_code():\n    raise BrokenPipeError('a store')"
    code = f"from pipeline.core.cli import own_exit_code\n{body}"
    ended = run_python("-c", code)
    assert ended.returncode == 1
    assert "a store" in ended.stderr
