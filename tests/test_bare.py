"""``pytest -m gpu`` where the base packages and pytest alone are installed, as on a plain CUDA image."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.bare import hidden
from tests.conftest import ROOT
from tests.processes import run_python

FILES = {path.stem: path for path in sorted((ROOT / "tests").glob("test_*.py"))}

# Packages that others depend on.
BRINGS = {
    "distributed": ("dask", "psutil"),
    "fastapi": ("starlette",),
    "nbclient": ("nbformat",),
    "onnx": ("google",),
}


@cache
def statements(path: Path) -> tuple[ast.stmt, ...]:
    """The statements that an import of the file runs, without those for type checkers only."""
    return tuple(_run(ast.parse(path.read_text()).body))


def _run(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for each in body:
        if isinstance(each, ast.ClassDef):
            yield from _run(each.body)
        elif isinstance(each, ast.If) and "TYPE_CHECKING" not in ast.unparse(each.test):
            yield from _run([*each.body, *each.orelse])
        else:
            yield each


def imported(path: Path) -> Iterator[str]:
    for each in statements(path):
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names)
        elif isinstance(each, ast.ImportFrom) and each.module and each.level == 0:
            yield each.module
            yield from (f"{each.module}.{alias.name}" for alias in each.names)


def wanted(path: Path, seen: set[Path]) -> set[str]:
    """The packages, without those of this repository, that an import of the file needs."""
    found: set[str] = set()
    for name in imported(path):
        first = name.partition(".")[0]
        if first not in ("pipeline", "tests"):
            found.add(first)
            continue
        base = ROOT.joinpath(*name.split("."))
        for inner in (base.with_suffix(".py"), base / "__init__.py"):
            if inner.is_file() and inner not in seen:
                seen.add(inner)
                found |= wanted(inner, seen)
    return found


def skips_without(path: Path) -> set[str]:
    """The packages without which the file says at its top that it is skipped."""
    calls = [each.value for each in statements(path) if isinstance(each, ast.Expr) and isinstance(each.value, ast.Call)]
    return {
        ast.literal_eval(call.args[0]).partition(".")[0]
        for call in calls
        if ast.unparse(call.func) == "pytest.importorskip"
    }


@pytest.mark.slow
def test_a_file_that_needs_more_than_the_base_packages_skips_without_them() -> None:
    missing = {}
    for name, path in FILES.items():
        said = skips_without(path)
        said |= {each for package in said for each in BRINGS.get(package, ())}
        if left := (wanted(path, {path}) & hidden()) - said:
            missing[name] = left
    assert missing == {}


def gpu_tests(*options: str) -> str:
    """What ``pytest -m gpu`` prints where nothing else is installed."""
    plugins = ("-p", "no:cacheprovider", "-p", "tests.bare")
    done = run_python("-m", "pytest", *plugins, "-m", "gpu", *options, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_gpu_tests_are_collected_with_the_base_packages_and_pytest_alone() -> None:
    output = gpu_tests("--collect-only")
    assert "test_nvidia.py::test_damaged_files_never_come_from_the_gpu" in output
    assert re.search(r"test_cluster\.py:\d+: needs the extra dask", output)


@pytest.mark.slow
def test_a_case_without_its_package_is_skipped_and_says_so() -> None:
    output = gpu_tests("tests/test_backends.py", "-k", "fp8 or onnx or tensorrt")
    assert "torchao is not installed" in output
    assert "onnxruntime is not installed" in output
