"""A process without a home folder and a name of its user, as in a container under a number of its own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.processes import give_home
from tests.conftest import ROOT
from tests.jobs import scene

USER_VARIABLES = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME", "HF_HOME")
NUMBER = 54_321


AS_A_NUMBER = ("unshare", f"--map-user={NUMBER}", f"--map-group={NUMBER}")


def nameless(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user without a name, a home, or any variable that names them."""
    kept = {name: value for name, value in os.environ.items() if name not in USER_VARIABLES}
    command = [*AS_A_NUMBER, sys.executable, *arguments]
    environment = {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder, on a system that runs a process under a number without a name."""
    try:
        subprocess.run([*AS_A_NUMBER, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system has no user namespaces")
    return tmp_path


@pytest.mark.slow
def test_a_job_runs_without_a_home_and_leaves_no_folder_of_that_name(place: Path) -> None:
    (place / "photos").mkdir()
    for number in range(3):
        (place / "photos" / f"{number}.jpg").write_bytes(scene(number)[0])
    (place / "tmp").mkdir()
    for command in (
        ("pipeline.manifest", "folder", "photos", "m.parquet"),
        ("pipeline.run", "manifest.path=m.parquet", "output.dir=out", "report.html=false"),
        ("pipeline.run", "manifest.path=m.parquet", "output.dir='~/out'", "run.dry=true"),
        ("pipeline.verify", "out"),
    ):
        done = nameless("-m", *command, cwd=place, TMPDIR=str(place / "tmp"))
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert not (place / "~").exists()
    assert (place / "tmp" / f"clip-pipeline-home-{NUMBER}" / ".cache" / "clip-pipeline").is_dir()


@pytest.mark.parametrize("planted", ["open", "a link", "another's", "a file"])
def test_a_home_that_another_user_may_have_planted_is_not_used(place: Path, planted: str) -> None:
    folder = place / f"clip-pipeline-home-{NUMBER}"
    if planted == "a link":
        (place / "real").mkdir(mode=0o700)
        folder.symlink_to(place / "real")
    elif planted == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777 if planted == "open" else 0o700)
        if planted == "another's":
            try:
                os.chown(folder, 12_345, 12_345)
            except PermissionError:
                pytest.skip("only root gives a folder to another user")
    code = "from pipeline.core.processes import give_home; import os; give_home(); print(os.environ['HOME'])"
    done = nameless("-c", code, cwd=place, TMPDIR=str(place))
    assert done.returncode == 0, done.stderr
    home = Path(done.stdout.strip())
    assert home.parent == place
    assert home != folder
    assert stat.S_IMODE(home.lstat().st_mode) == 0o700


def test_a_home_that_there_is_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    give_home()
    assert os.environ["HOME"] == str(tmp_path)


@pytest.mark.parametrize(
    "key", ["manifest.path", "output.dir", "manifest.root", "metrics.textfile", "model.name", "prompts.path"]
)
def test_the_home_of_an_unknown_user_is_no_traceback(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.jpg").write_bytes(scene(0)[0])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.run", f"{key}=~nosuchuser/x.prom", "run.dry=true"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
