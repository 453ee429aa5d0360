"""The house: every module imports from its own room or from lower floors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A room or a flat door, and its floor. The job stands between the cluster and the doors.
FLOORS = {
    "records": 0,
    "members": 0.5,
    "errors": 0,
    "limits": 0,
    "log_lines": 0.2,
    "silences": 0,
    "config": 1,
    "checks": 1.2,
    "hydra_settings": 1.2,
    "command_line": 1.2,
    "addresses": 1,
    "failpoints": 0,
    "processes": 0,
    "threads": 0,
    "aside": 0,
    "storage": 1.5,
    "overrides": 1.5,
    "manifest": 2,
    "images": 2.5,
    "models": 2,
    "dataset": 2,
    "report": 2,
    "metrics": 2.1,
    "parity": 2.2,
    "reading": 3,
    "artifacts": 3,
    "demo": 3,
    "backends": 4,
    "results": 4.5,
    "worker": 5,
    "batch_size": 5.2,
    "gallery": 5,
    "drawing": 5.2,
    "what_if": 5.2,
    "triton": 4,
    "vectors": 7,
    "bench": 8,
    "export": 8,
    "verify": 8,
    "doctor": 8,
    "relabel": 8,
    "search": 8,
    "convert": 8,
    "setup": 5.5,
    "cluster": 6,
    "measured": 6,
    "ending": 6.5,
    "job": 7,
    "estimate": 7.2,
    "health": 7.2,
    "nightly": 7.5,
    "run": 8,
    "service": 7.5,
    "serve": 8,
    "api": 8.5,
    "command": 9,
    "__main__": 9.5,
}
PACKAGE = ROOT / "pipeline"
# The package's own __init__ is the one that hands names on, and imports them when they are asked for: test_api.py.
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "pipeline" else [f"pipeline.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("pipeline.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_room_or_from_lower_floors(path: Path) -> None:
    room = room_of(path)
    # A room's own __main__ is a door.
    floor = FLOORS["run"] if path.name == "__main__.py" and room != "__main__" else FLOORS[room]
    above = {other for other in imported_rooms(path) if other != room and FLOORS[other] >= floor}
    assert not above, f"{path.name} on floor {floor} imports {above}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=lambda path: path.parent.name)
def test_an_init_file_hands_nothing_on(path: Path) -> None:
    if path.parent.name != "backends":
        assert not imported_rooms(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_reads_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_only_the_cluster_room_imports_dask() -> None:
    users = {room_of(path) for path in MODULES if "dask" in path.read_text() and "import dask" in path.read_text()}
    assert users <= {"cluster"}


def test_the_door_opens_without_torch() -> None:
    code = "import sys, pipeline.run, pipeline.overrides; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
