"""Python and the packages: against the ranges that are supported, and the versions that the tests pass with."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipeline.doctor.check import Check, Status, Subject

GROUP = "versions"
NAME = "clip-pipeline"
# In a checkout a link to the file at its root; a wheel holds the file itself.
TESTED = Path(__file__).resolve().parent.joinpath("constraints.txt")
CHECKOUT = Path(__file__).absolute().parent.parent.parent
# Distributions that put different files into the same place: whichever came last is what runs.
RIVALS = (
    ("onnxruntime", "onnxruntime-gpu"),
    ("faiss-cpu", "faiss-gpu"),
    ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
)
# Of packages that differ from the tested ones, how many are named.
NAMED = 6


def look(subject: Subject) -> Iterator[Check]:
    """Python, packages that are missing or out of range, those that were not tested, and those in each other's way."""
    yield _python()
    wanted = [requirement for requirement in requirements() if not requirement.extras_wanted]
    broken = [text for one in wanted if (text := one.problem())]
    if broken:
        yield Check(GROUP, "packages", Status.FAIL, "; ".join(broken), install())
    else:
        fact = f"{len(wanted)} packages are there, within the supported ranges"
        yield Check(GROUP, "packages", Status.OK, fact)
    yield _tested()
    both = [pair for pair in RIVALS if all(installed(name) for name in pair)]
    if both:
        names = "; ".join(" and ".join(pair) for pair in both)
        first, second = both[0]
        yield Check(
            GROUP,
            "conflicts",
            Status.FAIL,
            f"{names} overwrite each other's files: which one runs depends on the order they were installed in",
            f"pip uninstall -y {first} {second}, then pip install {second}",
        )
    else:
        yield Check(GROUP, "conflicts", Status.OK, "no two packages overwrite each other's files")


class Needed:
    """One requirement of this package, and what is installed of it."""

    def __init__(self, text: str, extra: str = "") -> None:
        self.requirement = Requirement(text)
        self.extras_wanted = extra
        self.name = self.requirement.name
        self.version = installed(self.name)

    def problem(self) -> str:
        """What is wrong with it, or an empty text."""
        wanted = self.requirement.specifier
        if self.version is None:
            return f"{self.name} is not installed"
        if not wanted.contains(self.version, prereleases=True):
            return f"{self.name} {self.version} is installed, supported is {wanted}"
        return ""


@cache
def requirements() -> tuple[Needed, ...]:
    """Those of the package itself and of every extra but ``test``, as they hold on this machine.

    Raises:
        PackageNotFoundError: this is neither a checkout nor installed.
    """
    if in_checkout():
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        listed = [(text, "") for text in project["dependencies"]]
        listed += [(text, extra) for extra, texts in project["optional-dependencies"].items() for text in texts]
    else:
        listed = [_with_extra(text) for text in metadata.requires(NAME) or []]
    found = [Needed(text, extra) for text, extra in listed if extra not in ("test", "compat")]
    return tuple(
        one
        for one in found
        if one.requirement.marker is None or one.requirement.marker.evaluate({"extra": one.extras_wanted})
    )


def supported_python() -> str:
    """The range of Python's versions, such as ``>=3.11,<3.14``."""
    if in_checkout():
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(project["requires-python"])
    return metadata.metadata(NAME)["Requires-Python"]


def in_checkout() -> bool:
    """Whether this runs from a checkout, whose pyproject.toml is newer than what pip once wrote down."""
    return (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "conf").is_dir()


def install(extra: str = "") -> str:
    """The command that installs this package, with an extra."""
    if in_checkout():
        return f"pip install -c constraints.txt -e '.[{extra}]'" if extra else "pip install -c constraints.txt -e ."
    return f"pip install -U '{NAME}[{extra}]'" if extra else f"pip install -U {NAME}"


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def tested() -> dict[str, str]:
    """Canonical names and versions of ``constraints.txt``."""
    lines = (line.partition("#")[0].strip() for line in TESTED.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


def _with_extra(text: str) -> tuple[str, str]:
    """A line of the metadata, and the extra that its marker names."""
    marker = str(Requirement(text).marker or "")
    _, found, rest = marker.partition('extra == "')
    return text, rest.partition('"')[0] if found else ""


def _python() -> Check:
    wanted, version = supported_python(), platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(GROUP, "Python", Status.OK, f"{version}, supported is {wanted}")
    way_out = "install a supported Python, and this package into a new environment of it"
    return Check(GROUP, "Python", Status.FAIL, f"{version}, supported is {wanted}", way_out)


def _tested() -> Check:
    """Of all that this package asks for and that is installed."""
    names = {canonicalize_name(one.name): one.version for one in requirements() if one.version is not None}
    known = {name: version for name, version in names.items() if name in tested()}
    others = [
        f"{name} {version} (tested {tested()[name]})"
        for name, version in sorted(known.items())
        # Builds for other devices (+cpu, +cu130) are of the same version.
        if Version(version or "0").public != Version(tested()[name]).public
    ]
    if not others:
        return Check(GROUP, "tested versions", Status.OK, f"all {len(known)} packages are of the tested versions")
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    fact = f"{len(others)} of {len(known)} packages are of others: {', '.join(others[:NAMED])}{more}"
    way_out = "supported, but not what the tests ran with"
    if in_checkout():
        way_out += f"; for the tested ones: {install()}"
    else:
        way_out += f"; for the tested ones: pip install -c {TESTED} {NAME}"
    return Check(GROUP, "tested versions", Status.WARN, fact, way_out)
