"""Work beside the main thread's: its result, its error, and a process that ends before it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.core.cli import ErrorOutput, run_command
from pipeline.core.concurrency import aside
from tests.conftest import ROOT
from tests.processes import run_python

BUSY = """
import importlib, time
from pipeline.core.cli import own_exit_code
from pipeline.core.cli import ErrorOutput, run_command
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


@pytest.mark.parametrize(
    ("library", "code", "wanted"),
    [pytest.param("torch", "4", 4, marks=pytest.mark.slow), ("numpy", "None", 0), ("numpy", "'no'", 1)],
)
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


@pytest.mark.parametrize(
    "command",
    [
        ["pipeline.verify", "FILE"],
        ["pipeline.verify", "FILE", "--repair"],
        ["pipeline.search", "FILE/within", "a cat"],
        ["pipeline.browse", "FILE/within"],
        ["pipeline.convert", "FILE", "--to", "numpy", "--out", "FILE/x"],
        ["pipeline.report", "FILE"],
        ["pipeline.manifest", "folder", "tests", "FILE/m.parquet"],
        pytest.param(["pipeline.run", "output.dir=FILE", "report.html=false"], marks=pytest.mark.slow),
        pytest.param(
            ["pipeline.nightly", "--date", "2026-11-01", "--store", "FILE", "manifest.path=m.parquet"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_file_in_the_place_of_a_folder_is_told_in_one_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    ended = run_python("-m", *(word.replace("FILE", str(tmp_path / "file")) for word in command))
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr
    assert str(tmp_path / "file") in ended.stderr
    assert len([line for line in ended.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert (tmp_path / "file").read_text() == "no folder"


STARTED = """
import os, sys
CLOSED = {closed}
for number in CLOSED:
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", *{command}])
"""
COMMANDS = [
    ["pipeline", "--help"],
    ["pipeline.run", "manifest.path=m.parquet"],
    ["pipeline.verify", "out"],
    ["pipeline.search", "out", "a cat"],
    ["pipeline.browse", "out"],
    ["pipeline.relabel", "out", "output.dir=other"],
    ["pipeline.convert", "out", "--to", "numpy", "--out", "x"],
    ["pipeline.manifest", "folder", "photos", "m.parquet"],
    ["pipeline.nightly", "--date", "2026-11-01", "--store", "nights", "manifest.path=m.parquet"],
    ["pipeline.report", "out"],
    ["pipeline.artifacts", "list"],
    ["pipeline.export"],
    ["pipeline.bench"],
    ["pipeline.serve"],
    ["pipeline.doctor", "--quick"],
]


@pytest.mark.parametrize(
    "command",
    [
        command
        if command[0] in ("pipeline.run", "pipeline.verify", "pipeline.nightly")
        else pytest.param(command, marks=pytest.mark.slow)
        for command in COMMANDS
    ],
    ids=lambda command: command[0],
)
def test_a_command_in_a_folder_that_was_removed_says_so(command: list[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    remove = f"import os; os.rmdir({str(gone)!r}); "
    code = remove + STARTED.format(closed=(), command=command)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=gone, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert "the current folder is gone" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


@pytest.mark.parametrize(
    "closed", [(0, 1, 2), *(pytest.param(closed, marks=pytest.mark.slow) for closed in ((1,), (2,), (0, 1), (1, 2)))]
)
def test_a_command_without_standard_streams_ends_with_its_own_exit_code(closed: tuple[int, ...]) -> None:
    for command, code in ((["pipeline.verify", "nothing"], 2), (["pipeline.search", "nothing", "x"], 2)):
        ended = run_python("-c", STARTED.format(closed=closed, command=command))
        assert ended.returncode == code
        assert "Traceback" not in ended.stderr + ended.stdout
        assert ("no dataset is here" in ended.stderr) == (2 not in closed)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "code", "wanted"),
    [
        (["pipeline.artifacts", "--store", "STORE", "list"], 1, "error: standard output cannot be written: No space"),
        pytest.param(
            *(["pipeline.run", "--help"], 1, "error: standard output cannot be written: No space"),
            marks=pytest.mark.slow,
        ),
        (["pipeline.verify", "nothing"], 2, "error: nothing: no dataset is here"),
    ],
)
def test_output_that_cannot_be_written_is_told_in_one_line(
    command: list[str], code: int, wanted: str, unbuffered: str, tmp_path: Path
) -> None:
    words = [str(tmp_path) if word == "STORE" else word for word in command]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    [line] = ended.stderr.splitlines()
    assert line.startswith(wanted)


def test_what_opens_later_does_not_take_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    body = (
        "import os; os.close(1); from pipeline.core.cli import provide_streams; provide_streams(); "
        f"file = open({str(tmp_path / 'rows')!r}, 'wb'); os.write(1, b'said by a library'); print('more'); file.close()"
    )
    ended = run_python("-c", body)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "rows").read_bytes() == b""


def test_an_interrupt_that_leaves_a_condition_without_its_lock_is_an_interrupt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    condition = threading.Condition()

    def interrupted(release: bool) -> None:
        with condition:
            if release:
                # As where the signal comes while a wait takes back its lock.
                condition.release()
            raise KeyboardInterrupt

    assert run_command(lambda: interrupted(True), ErrorOutput("stopped")) == 75
    assert run_command(lambda: interrupted(False), ErrorOutput("stopped")) == 75
    assert capsys.readouterr().err == "error: stopped\n" * 2
    with pytest.raises(RuntimeError, match="un-acquired"):
        run_command(condition.release, ErrorOutput("stopped"))


@pytest.mark.parametrize(("end", "code"), [("", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit('bad')", 1)])
def test_a_process_ends_with_its_threads_and_exit_handlers_but_with_its_modules_whole(end: str, code: int) -> None:
    script = f"""
import atexit, sys, threading, time
from pipeline.core.cli import quick_end

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
kept.itself = kept
with quick_end():
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
    {end}
"""
    done = run_python("-c", script)
    assert done.returncode == code
    assert done.stdout.splitlines()[:2] == ["thread", "handler"]
    assert ("taken apart" in done.stdout) == (code == 1)
    assert ("bad" in done.stderr) == (code == 1)


def test_an_error_that_nobody_foresaw_is_left_to_python() -> None:
    done = run_python("-c", "from pipeline.core.cli import quick_end\nwith quick_end():\n    1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("end", ["", "sys.exit(3)"])
def test_output_that_finds_no_room_at_the_end_is_reported_as_python_does(end: str) -> None:
    script = f"import sys\nfrom pipeline.core.cli import quick_end\nwith quick_end():\n    print('lost')\n    {end}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
    assert done.returncode == 120
    assert "No space left on device" in done.stderr
