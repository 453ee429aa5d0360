"""The artefact store used by several processes, and its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.artifacts import main
from pipeline.backends.artifacts.directories import locked
from pipeline.backends.artifacts.store import ArtifactStore
from tests.conftest import ROOT
from tests.processes import loads, run_python, wait_until
from tests.test_artifacts import BYTES, DAY, RECIPE, age, build, names

# A writer in a process of its own: says that it builds, writes a half, waits for leave, writes the whole.
WRITER = """
import contextlib, json, os, sys, time
from pathlib import Path
from pipeline.backends.artifacts import store

place = Path(sys.argv[1])
recipe = store.Recipe(**json.loads(sys.argv[2]))
if sys.argv[3] == "lockless":
    store.locked = lambda path, wait=True: contextlib.nullcontext(False)

def build(folder):
    (folder / "model.onnx").write_bytes(b"half")
    (place / f"building-{os.getpid()}").touch()
    while not (place / "go").exists():
        time.sleep(0.01)
    (folder / "model.onnx").write_bytes(bytes(range(256)) * 100)
    return {}

artifact = store.ArtifactStore(place / "store").make(recipe, build)
assert artifact.file("model.onnx").stat().st_size == 25_600
print(artifact.path)
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def start(place: Path, locks: str = "locks") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(place), json.dumps(RECIPE.origin), locks]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(place: Path, count: int) -> None:
    wait_until(lambda: len(list(place.glob("building-*"))) >= count)


@pytest.mark.parametrize("locks", ["locks", "lockless"])
def test_processes_that_make_the_same_one_leave_one_and_no_litter(tmp_path: Path, locks: str) -> None:
    writers = [start(tmp_path, locks) for _ in range(3)]
    # With locks one builds and the others wait for it; without them all build, and the rename has one winner.
    wait_for(tmp_path, 1 if locks == "locks" else 3)
    time.sleep(0.5 if locks == "locks" else 0)
    assert ArtifactStore(tmp_path / "store").artifacts() == []
    (tmp_path / "go").touch()
    outputs = {writer.communicate(timeout=60)[0] for writer in writers}
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert outputs == {f"{tmp_path / 'store' / RECIPE.fingerprint}\n"}
    assert os.listdir(tmp_path / "store") == [RECIPE.fingerprint]
    assert len(list(tmp_path.glob("building-*"))) == (1 if locks == "locks" else 3)


@pytest.mark.parametrize("cleaner", ["prune", "make"])
def test_a_killed_writer_leaves_nothing_that_is_seen_or_stays(
    store: ArtifactStore, tmp_path: Path, cleaner: str
) -> None:
    with start(tmp_path) as writer:
        wait_for(tmp_path, 1)
        litter = names(store)
        assert len(litter) == 2, "a lock and a folder"
        assert store.prune(older_than=timedelta(0)) == []
        assert names(store) == litter, "a live writer's are left"
        writer.kill()
    assert store.find(RECIPE) is None
    assert store.artifacts() == store.unreadable() == store.prune(older_than=DAY, dry=True) == []
    assert names(store) == litter
    if cleaner == "prune":
        assert store.prune(older_than=DAY) == []
        assert names(store) == []
    assert store.make(RECIPE, build).file("model.onnx").read_bytes() == BYTES
    assert names(store) == [RECIPE.fingerprint]


def test_who_waited_holds_the_lock_that_others_see(tmp_path: Path) -> None:
    path, seen = tmp_path / "lock", []

    def wait() -> None:
        with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        seen.append("held")

    waiter = threading.Thread(target=wait)
    with locked(path):
        waiter.start()
        time.sleep(0.2)
        assert not seen
    waiter.join(timeout=60)
    assert seen == ["held"]
    assert not path.exists()


def test_the_command_lists_shows_pins_verifies_and_prunes(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["--store", str(store.root), *arguments])
        return code, *capsys.readouterr()

    assert call("list") == (0, f"no artefacts in {store.root}\n", "")
    made = store.make(RECIPE, build)
    short = made.fingerprint[:12]
    header, row = call("list")[1].splitlines()
    assert header.split() == ["id", "kind", "model", "revision", "options", "size", "created", "last", "used", "pin"]
    assert row.startswith(
        f"{short}  onnx-image  demo   main      opset=18 precision=fp32 shape=[8, 3, 224, 224]  25.6 KB"
    )
    assert json.loads(call("list", "--json")[1])[0]["fingerprint"] == made.fingerprint
    assert json.loads(call("show", short)[1])["files"].keys() == {"model.onnx", "cache/engine.bin"}
    assert call("pin", short)[0] == 0
    assert call("list")[1].rstrip().endswith("pinned")
    assert call("verify", short)[0] == 0
    age(made, days=40)
    assert call("prune")[1] == "0 removed, 0 B\n"
    assert call("unpin", short)[0] == 0
    assert "1 would be removed" in call("prune", "--dry-run")[1]
    assert "0 removed" in call("prune", "--older-than", "41")[1]
    (made.path / "card.json").write_text("{")
    assert "card.json: not JSON" in call("list")[2]
    assert call("verify", short)[0] == 1
    assert call("show", short)[0] == 2
    assert "1 removed" in call("prune")[1]
    for days in ("-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit, match="2"):
            call("prune", "--older-than", days)


def test_the_command_starts_without_torch_and_knows_the_default_folder(tmp_path: Path) -> None:
    done = run_python("-m", "pipeline.artifacts", "list", XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"no artefacts in {tmp_path}/clip-pipeline/artifacts\n")
    assert loads("import pipeline.artifacts as m; m.main(['list'])", "torch") == []
