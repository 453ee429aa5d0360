"""A script without a main guard: the processes of its cluster would run it again, and it is told so once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.jobs import scene

LIGHT = """
import multiprocessing, os, sys
from pipeline.job.cluster import main_guard

print("ran", flush=True)

def begin():
    main_guard.leave_if_run_again()
    with main_guard.watched() as mark:
        process = multiprocessing.get_context("spawn").Process(target=print, args=("worked",))
        process.start()
        process.join()
        if mark.exists():
            main_guard.refuse("local")
    assert main_guard.VARIABLE not in os.environ
    print("done")
"""
EMBED = """
from pipeline import embed
embed("photos", output="out", model="demo", progress=False, settings={"cluster": "local", "cluster.workers": 2})
"""
RUN = """
from pathlib import Path
from pipeline.config.compose import compose_config
from pipeline.job.main import run_job
from pipeline.manifest.build import from_folder
if not Path("m.parquet").exists():
    from_folder("photos", "m.parquet")
run_job(compose_config(["cluster=local", "cluster.workers=1", "manifest.path=m.parquet", "output.dir=out"]))
"""


def run_script(folder: Path, text: str, seconds: float) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=seconds, check=False)


def test_a_script_whose_top_level_begins_a_job_is_told_so(tmp_path: Path) -> None:
    ended = run_script(tmp_path, f"{LIGHT}\nbegin()\n", 60)
    assert (ended.returncode, ended.stdout) == (2, "ran\nran\n"), ended.stderr
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"error: cluster=local: {tmp_path}/script.py has no main guard")
    assert line.endswith('if __name__ == "__main__":')


def test_a_script_with_a_main_guard_runs_once(tmp_path: Path) -> None:
    ended = run_script(tmp_path, f"{LIGHT}\nif __name__ == '__main__':\n    begin()\n", 60)
    assert (ended.returncode, ended.stdout) == (0, "ran\nran\nworked\ndone\n"), ended.stderr
    assert ended.stderr == ""


@pytest.mark.slow
@pytest.mark.needs("distributed")
@pytest.mark.parametrize("script", [EMBED, RUN], ids=["embed", "run_job"])
def test_a_job_on_a_cluster_of_a_script_without_a_main_guard_ends_with_one_message(tmp_path: Path, script: str) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(scene(number)[0])
    ended = run_script(tmp_path, script, 300)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("has no main guard") == 1
    assert "Traceback" not in ended.stderr
    said = [line for line in ended.stderr.splitlines() if "model=demo" not in line]
    assert len([line for line in said if line.startswith("error: ")]) == 1
    assert len(said) < 10
    assert ended.stdout == ""
