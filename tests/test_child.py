"""Child processes: requests and answers, limits of time, and the reason of an early end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.core.child import Child, ChildEnded, ChildError
from tests.processes import is_running, wait_until


def test_a_child_ends_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import json, subprocess, time\n"
        "print(json.dumps({'pid': subprocess.Popen(['sleep', '60']).pid}), flush=True)\n"
        "time.sleep(60)"
    )
    child = Child([sys.executable, "-c", code], log=tmp_path / "log")
    grandchild = child.receive(timeout=20)["pid"]
    assert is_running(grandchild)
    child.kill()
    wait_until(lambda: not is_running(grandchild), seconds=2)
    with pytest.raises(ChildEnded, match="SIGKILL"):
        child.send({})
    child.close()


def test_a_refusal_carries_its_exit_code(tmp_path: Path) -> None:
    answer = json.dumps({"error": "no", "exit_code": 4})
    child = Child([sys.executable, "-c", f"print({answer!r})"], log=tmp_path / "log")
    with pytest.raises(ChildError, match="no") as caught:
        child.receive(timeout=20)
    assert caught.value.exit_code == 4
    child.close()


@pytest.mark.parametrize(
    ("code", "timeout", "reason"),
    [
        ("raise SystemExit('no way')", 60, "exit code 1: no way"),
        ("import time; time.sleep(60)", 0.5, r"not done within 0\.5 s"),
        ("import os; os.kill(os.getpid(), 15)", 60, "ended by SIGTERM"),
    ],
)
def test_a_command_that_fails_or_hangs_is_reported_with_its_last_line(
    tmp_path: Path, code: str, timeout: float, reason: str
) -> None:
    child = Child([sys.executable, "-c", code], log=tmp_path / "log", answers=False)
    with pytest.raises(ChildEnded, match=reason):
        child.wait(timeout=timeout)
    child.close()


def test_a_command_that_answers_no_requests_writes_to_its_log(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "print('fine' * 100_000)"], log=tmp_path / "log", answers=False)
    child.wait(timeout=60)
    child.close()
    assert (tmp_path / "log").read_text().strip() == "fine" * 100_000


def test_what_a_library_prints_is_no_answer(tmp_path: Path) -> None:
    code = (
        "from pipeline.core.child import Parent\n"
        "parent = Parent()\n"
        "print('noise', flush=True)\n"
        "parent.send(2 * parent.receive())\n"
        "parent.receive()\n"
    )
    with Child([sys.executable, "-c", code], log=tmp_path / "log") as child:
        child.send(["a" * 200_000])
        assert child.receive(timeout=60) == ["a" * 200_000] * 2
    assert (tmp_path / "log").read_text() == "noise\n"
