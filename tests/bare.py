"""A pytest plugin that hides all packages but those of a bare installation: ``pytest -p tests.bare -m gpu``.

A CUDA image has the base packages and pytest alone. Whatever else is installed here cannot be imported with this
plugin, so that a run shows what such an image shows.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def needed(names: Iterable[str]) -> set[str]:
    """The distributions ``names`` and all that they need here, without their extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = _plain(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@cache
def hidden() -> frozenset[str]:
    """The importable packages here that neither the base dependencies nor pytest bring."""
    base = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    kept = needed([*(Requirement(line).name for line in base), "pytest"])
    return frozenset(
        package
        for package, owners in packages_distributions().items()
        if not kept & set(map(_plain, owners)) and package not in ("pipeline", "tests", "conf")
    )


def hide(packages: frozenset[str]) -> None:
    """Let no import find ``packages`` from now on, as if they were not installed."""
    for loaded in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[loaded]
    find = PathFinder.find_spec
    PathFinder.find_spec = staticmethod(  # type: ignore[method-assign]
        lambda name, *more: None if name.partition(".")[0] in packages else find(name, *more)
    )


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pytest_configure() -> None:
    """Hide them in the process that has this plugin."""
    hide(hidden())
