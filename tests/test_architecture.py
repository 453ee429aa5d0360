"""The layout of ``pipeline/``: levels, import cycles, and what may lie at its root."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import loads

PACKAGE = ROOT / "pipeline"
# A module imports from its own package or from packages of lower levels; commands may import from all.
LEVELS: Mapping[str, int] = {
    "core": 1,
    "config": 2,
    "storage": 2,
    "dataset": 3,
    "images": 3,
    "manifest": 3,
    "models": 3,
    "telemetry": 3,
    "backends": 4,
    "report": 4,
    "engine": 5,
    "bench": 6,
    "job": 6,
    "serve": 6,
    "api": 7,
    "doctor": 7,
    "nightly": 7,
    "browse": 8,
}
COMMANDS_LEVEL = 9
COMMANDS = {"artifacts", "convert", "dedup", "export", "relabel", "run", "sample", "search", "verify"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in MODULES}


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of this package that a file imports, at its top and inside of functions."""
    return frozenset(_imports(ast.parse(path.read_text()))) - {dotted(path)}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module in NAMES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else node.module


def package_of(module: str) -> str:
    """The package directly below ``pipeline``, or an empty string for a module at its root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and NAMES[module].name == "__init__.py") else ""


def level_of(module: str) -> int:
    package = package_of(module)
    return COMMANDS_LEVEL if not package or module.endswith(".__main__") else LEVELS[package]


@pytest.mark.parametrize("package", ["", *LEVELS])
def test_a_module_imports_only_from_its_package_or_from_lower_levels(package: str) -> None:
    upwards = [
        f"{module} (level {level_of(module)}) imports {other} (level {level_of(other)})"
        for module, path in NAMES.items()
        if package_of(module) == package
        for other in sorted(imports(path))
        if package_of(other) != package and level_of(other) >= level_of(module)
    ]
    # The package's own __init__ imports the API when a name of it is asked for: test_api.py.
    assert [line for line in upwards if not line.startswith("pipeline (")] == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imports(path) for name, path in NAMES.items() if name != "pipeline"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_root_has_packages_and_commands_only() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*COMMANDS, "__init__", "__main__"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*LEVELS}


def test_an_init_file_imports_nothing() -> None:
    inits = {name for name, path in NAMES.items() if path.name == "__init__.py"} - {"pipeline"}
    assert {name: found for name in inits if (found := imports(NAMES[name]))} == {}


def test_a_file_reads_in_one_sitting() -> None:
    assert {name for name, path in NAMES.items() if len(path.read_text().splitlines()) > 350} == set()


def test_only_clusters_import_dask() -> None:
    users = {name for name, path in NAMES.items() if "import dask" in path.read_text()}
    assert {name for name in users if not name.startswith("pipeline.job.cluster.")} == set()


def test_the_main_command_starts_without_torch() -> None:
    assert loads("import pipeline.run, pipeline.config.compose", "torch", "pyarrow") == []
