"""Work beside the main thread's: its result, its error, and a process that ends before it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.aside import aside
from tests.conftest import ROOT

BUSY = """
import time
import torch
from pipeline.aside import aside, own_exit_code

def work():
    torch.set_num_threads(1)
    numbers, end = torch.ones(200, 200), time.monotonic() + 30
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


@pytest.mark.parametrize(("code", "wanted"), [("4", 4), ("None", 0), ("'no'", 1)])
def test_a_process_ends_with_its_own_exit_code_though_torch_is_at_work_aside(code: str, wanted: int) -> None:
    command = [sys.executable, "-c", BUSY.replace("CODE", code)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (wanted, "said\n"), ended.stderr
