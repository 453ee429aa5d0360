"""The package as it is handed out: all of it in the wheel, and at work where no checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.__main__ import COMMANDS
from tests.conftest import ROOT

SOURCES = ("pipeline", "conf", "pyproject.toml", "README.md", "LICENSE")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(folder: Path, kind: str) -> Path:
    """Build a ``wheel`` or an ``sdist`` of the sources in ``folder``, as pip does it."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [made] = (folder / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    return build(sources, "wheel")


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel, which borrows from this one what it depends on and no more."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    for place in sorted(borrowed()):
        (packages / place.name).symlink_to(place)
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True)
    return python.parent


def borrowed() -> set[Path]:
    """Entries of site-packages that belong to the dependencies of the package, without extras."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    while wanted:
        need = wanted.pop()
        if canonicalize_name(need.name) in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        found[canonicalize_name(need.name)] = there = metadata.distribution(need.name)
        wanted += [Requirement(line) for line in there.requires or []]
    tops = {(each, path.parts[0]) for each in found.values() for path in each.files or [] if path.parts[0] != ".."}
    return {Path(str(each.locate_file(top))) for each, top in tops if top != "__pycache__"}


def say(command: list[str | Path], cwd: Path, code: int = 0) -> str:
    """Run a command with nothing of the checkout on its path; returns what it says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def names(folder: Path) -> set[str]:
    """The files below a folder of the checkout, relative to it."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_every_package_is_named_in_the_project() -> None:
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("__init__.py")}
    named = {*PROJECT["tool"]["setuptools"]["packages"]} - {"pipeline.conf"}
    assert named == {".".join(package.parts) for package in packages}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {f"pipeline/{name}" for name in names(ROOT / "pipeline")}
    wanted |= {f"pipeline/conf/{name}" for name in names(ROOT / "conf") if name.endswith(".yaml")}
    assert held == wanted
    for name in ("pipeline/py.typed", "pipeline/conf/config.yaml", "pipeline/engine/demo/model/model.safetensors"):
        assert name in held


def test_the_wheel_says_what_it_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    needs = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert sum("extra ==" not in need for need in needs) == len(PROJECT["project"]["dependencies"])
    assert wheel.stat().st_size < 20e6


@pytest.mark.slow
def test_a_wheel_of_the_source_archive_is_the_same(sources: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(sources, "sdist")) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    [folder] = tmp_path.iterdir()
    with zipfile.ZipFile(build(folder, "wheel")) as ours, zipfile.ZipFile(wheel) as other:
        assert {info.filename: info.CRC for info in ours.infolist() if "RECORD" not in info.filename} == {
            info.filename: info.CRC for info in other.infolist() if "RECORD" not in info.filename
        }


@pytest.mark.slow
def test_the_wheel_runs_the_job_where_no_checkout_is(elsewhere: Path, tmp_path: Path) -> None:
    job: list[str | Path] = ["manifest.demo_scenes=12", "output.dir=out", "report.progress=none"]
    said = say([elsewhere / "clip-pipeline", *job], tmp_path)
    assert "12 images in" in said
    # Nothing of it needs an extra.
    assert "warning" not in said
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert (tmp_path / "out" / "_report.html").exists()
    assert "nothing to do" in say([elsewhere / "python", "-m", "pipeline.run", *job], tmp_path)
    code = """
import pipeline, sys
from pipeline import embed, open_dataset
assert pipeline.__file__.startswith(sys.prefix), pipeline.__file__
made = embed("out/../scenes/" + sys.argv[1], keep=["truth"], progress=False)
print((made.embeddings == open_dataset("out").embeddings).all(), made.search("a red circle", top=1)[0].rank)
"""
    [manifest] = (tmp_path / "scenes").glob("*.parquet")
    assert say([elsewhere / "python", "-c", code, manifest.name], tmp_path) == "True 1\n"


@pytest.mark.slow
def test_the_short_command_runs_every_command_and_names_them(elsewhere: Path, tmp_path: Path) -> None:
    assert "GROUP=OPTION" in say([elsewhere / "clip-pipeline", "--help"], tmp_path)
    assert "is complete" in say([elsewhere / "clip-pipeline", "--cfg", "job", "output.dir=is complete"], tmp_path)
    assert "WebDataset" in say([elsewhere / "clip-pipeline", "manifest", "--help"], tmp_path)
    assert "no dataset" in say([elsewhere / "python", "-m", "pipeline", "verify", "nowhere"], tmp_path, code=2)
    wrong = say([elsewhere / "clip-pipeline", "serch", "out"], tmp_path, code=2)
    assert "did you mean search?" in wrong
    assert "doctor" in wrong
    assert "the config has a problem" in say([elsewhere / "clip-pipeline", "run", "labels.top_k=0"], tmp_path, code=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_module(command: str) -> None:
    place = ROOT / "pipeline" / COMMANDS[command].removeprefix("pipeline.")
    assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
