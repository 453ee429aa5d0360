"""Style and types, so that the one test command covers every gate."""

from __future__ import annotations

import pytest

from tests.processes import run_python


@pytest.mark.parametrize(
    "arguments",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), pytest.param(("mypy",), marks=pytest.mark.slow)],
    ids=["ruff check", "ruff format", "mypy strict"],
)
def test_gate(arguments: tuple[str, ...]) -> None:
    done = run_python("-m", *arguments, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
