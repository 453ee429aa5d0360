"""Checks of Python and the packages: the supported ranges, and the versions that the tests ran with."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipeline.doctor.check import Check, Status, Subject

GROUP = "versions"
NAME = "clip-pipeline"
# In a checkout a link to the file at its root; a wheel holds the file itself.
TESTED = Path(__file__).resolve().parent.joinpath("constraints.txt")
CHECKOUT = Path(__file__).absolute().parents[2]
# Distributions that write different files to the same place: the last one installed wins.
RIVALS = (
    ("onnxruntime", "onnxruntime-gpu"),
    ("faiss-cpu", "faiss-gpu"),
    ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
)
# Packages of untested versions that are named.
NAMED = 6


@dataclass(frozen=True, slots=True)
class Needed:
    """Requirement of this package or of its ``extra``, and the installed version."""

    requirement: Requirement
    extra: str
    version: str | None

    @property
    def name(self) -> str:
        """Name of the distribution."""
        return self.requirement.name

    def problem(self) -> str:
        """Return what is wrong with the installed version, or an empty string."""
        supported = self.requirement.specifier
        if self.version is None:
            return f"{self.name} is not installed"
        if not supported.contains(self.version, prereleases=True):
            return f"{self.name} {self.version} is installed, supported is {supported}"
        return ""


def look(subject: Subject) -> Iterator[Check]:
    """Check Python, missing and unsupported packages, untested versions, and packages that overwrite one another."""
    yield _python()
    needed = [one for one in requirements() if not one.extra]
    if problems := [problem for one in needed if (problem := one.problem())]:
        yield Check(GROUP, "packages", Status.FAIL, "; ".join(problems), install())
    else:
        fact = f"{len(needed)} packages are installed, within the supported ranges"
        yield Check(GROUP, "packages", Status.OK, fact)
    yield _tested()
    yield _conflicts()


@cache
def requirements() -> tuple[Needed, ...]:
    """Return those of the package itself and of every extra but ``test`` that apply to this machine.

    Raises:
        PackageNotFoundError: this is neither a checkout nor installed.
    """
    if in_checkout():
        project = _project()
        listed = [(Requirement(text), "") for text in project["dependencies"]]
        listed += [
            (Requirement(text), extra) for extra, texts in project["optional-dependencies"].items() for text in texts
        ]
    else:
        listed = [_with_extra(Requirement(text)) for text in metadata.requires(NAME) or []]
    return tuple(
        Needed(one, extra, installed(one.name))
        for one, extra in listed
        if extra not in ("test", "compat") and (one.marker is None or one.marker.evaluate({"extra": extra}))
    )


def supported_python() -> str:
    """Return the supported versions of Python, such as ``>=3.11,<3.14``."""
    return str(_project()["requires-python"]) if in_checkout() else metadata.metadata(NAME)["Requires-Python"]


def in_checkout() -> bool:
    """Return True in a checkout, whose pyproject.toml is newer than the metadata that pip recorded."""
    return (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "conf").is_dir()


def install() -> str:
    """Return the command that installs this package."""
    return "pip install -c constraints.txt -e ." if in_checkout() else f"pip install -U {NAME}"


def installed(name: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def tested() -> dict[str, str]:
    """Return the versions of ``constraints.txt`` by canonical name."""
    lines = (line.partition("#")[0].strip() for line in TESTED.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


@cache
def _project() -> dict[str, Any]:
    return dict(tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def _with_extra(requirement: Requirement) -> tuple[Requirement, str]:
    """Return a requirement of the metadata, and the extra that its marker names."""
    _, found, rest = str(requirement.marker or "").partition('extra == "')
    return requirement, rest.partition('"')[0] if found else ""


def _python() -> Check:
    supported, version = supported_python(), platform.python_version()
    fact = f"{version}, supported is {supported}"
    if SpecifierSet(supported).contains(version, prereleases=True):
        return Check(GROUP, "Python", Status.OK, fact)
    way_out = "install a supported Python, and this package into a new environment of it"
    return Check(GROUP, "Python", Status.FAIL, fact, way_out)


def _tested() -> Check:
    """Compare the installed packages with the tested versions."""
    names = {canonicalize_name(one.name): one.version for one in requirements() if one.version is not None}
    known = {name: version for name, version in names.items() if name in tested()}
    others = [
        f"{name} {version} (tested {tested()[name]})"
        for name, version in sorted(known.items())
        # Builds for other devices (+cpu, +cu130) are of the same version.
        if Version(version).public != Version(tested()[name]).public
    ]
    if not others:
        return Check(GROUP, "tested versions", Status.OK, f"all {len(known)} packages are of the tested versions")
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    fact = f"{len(others)} of {len(known)} packages are of others: {', '.join(others[:NAMED])}{more}"
    command = install() if in_checkout() else f"pip install -c {TESTED} {NAME}"
    way_out = f"supported, but not what the tests ran with; for the tested ones: {command}"
    return Check(GROUP, "tested versions", Status.WARN, fact, way_out)


def _conflicts() -> Check:
    pairs = [pair for pair in RIVALS if all(installed(name) for name in pair)]
    if not pairs:
        return Check(GROUP, "conflicts", Status.OK, "no two packages overwrite each other's files")
    names = "; ".join(" and ".join(pair) for pair in pairs)
    first, second = pairs[0]
    return Check(
        GROUP,
        "conflicts",
        Status.FAIL,
        f"{names} overwrite each other's files: the last one installed runs",
        f"pip uninstall -y {first} {second}, then pip install {second}",
    )
