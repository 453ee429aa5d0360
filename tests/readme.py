"""Every command of ``README.md``, and what becomes of it in :mod:`tests.test_readme`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
# Words that begin a command in running text; what begins otherwise is a setting, a file, a column, ...
BEGINNINGS = r"(?:python3?|pip|pytest|dask worker|export|eval|source|clip-pipeline) "
# What differs where the commands are tried: the hub, the user's folders, and how much is done.
SUBSTITUTIONS = {
    "~/Pictures": "Pictures",
    "model=clip_vit_b32": "model=demo",
    "model=clip_vit_l14": "model=demo",
    'model="clip_vit_b32"': 'model="demo"',
}


@dataclass(frozen=True)
class Run:
    """The command is run, with further words at its end."""

    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slow:
    """The command is run in a process of its own, with words replaced, by a test that takes longer."""

    replaced: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Prove:
    """The command's options are parsed and its config is composed; it is not run, for a reason."""

    why: str


@dataclass(frozen=True)
class Elsewhere:
    """Not run here; ``where`` is a file that holds ``text``, and does it or something that stands for it."""

    where: str
    text: str


PIP = Prove("needs the index of packages; the extra is looked up")
# Begins with the command as the README has it; the longest beginning counts.
ROWS: dict[str, Run | Slow | Prove | Elsewhere] = {
    "python3 -m venv .venv": Elsewhere(".ci/run", "python3 -m venv"),
    "source .venv/bin/activate": Elsewhere(".ci/run", "python3 -m venv"),
    "pip install": PIP,
    "python -m pytest -n 2": Elsewhere(".ci/run", "pytest -n 2"),
    "python -m pipeline.run": Run(("manifest.demo_scenes=24", "loader.batch_size=8", "report.progress=none")),
    "python -m pipeline.run manifest.path=": Run(("report.progress=none",)),
    "python -m pipeline.run run.dry=true": Run(("report.progress=none",)),
    "python -m pipeline.run --help": Elsewhere("tests/test_run_door.py", '"--help"'),
    "python -m pipeline.doctor": Elsewhere("tests/test_doctor.py", "pipeline.doctor"),
    "python -m pipeline.manifest folder": Run(),
    "python -m pipeline.bench": Prove("measures for minutes; tests/test_bench.py runs it"),
    "python -m pipeline.bench pipeline": Prove("measures for minutes; tests/test_bench_pipeline.py runs it"),
    "python -m pipeline.export": Prove("exports for a minute; tests/test_export_door.py runs it"),
    "python -m pipeline.artifacts list": Run(),
    "python -m pipeline.verify": Run(),
    "python -m pipeline.relabel": Run(),
    "python -m pipeline.search": Run(),
    "python -m pipeline.convert": Run(),
    "python -m pipeline.report": Run(),
    "python -m pipeline.report --compare": Prove("two runs of the same job: tests/test_report_door.py"),
    "python -m pipeline.report --history": Prove("a store of nights"),
    "python jobs/nightly.py": Run(),
    "python -m pipeline.serve": Prove("serves until it is told to end; tests/test_serve.py runs it"),
    "python jobs/deploy/up.py": Elsewhere("tests/test_deploy.py", "up.py"),
    "curl ": Elsewhere("tests/test_serve.py", "/predict"),
    "python -m tests.soak": Slow(replaced=(("200", "1"),)),
    "python -m tests.fuzz": Slow(replaced=(("10000", "20"),)),
    "python -m tests.relabel_cost": Elsewhere("tests/relabel_cost.py", "python -m tests.relabel_cost"),
    "clip-pipeline": Elsewhere("tests/test_wheel.py", "clip-pipeline"),
    "eval ": Elsewhere("tests/test_run_door.py", "install=bash"),
    "dask worker ADDRESS": Elsewhere("tests/test_cluster.py", "--memory-limit"),
    "export PART=": Elsewhere("tests/test_readme.py", "export PART="),
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def spans() -> list[str]:
    """Every piece of code in running text and tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL))


def commands() -> list[str]:
    """Every command, once, in the README's order; those that name a door without telling it anything are left out."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [text for text in spans() if re.match(BEGINNINGS, text)]
    parts = [part for line in lines for part in re.split(r" && ", line)]
    found = dict.fromkeys(part.removeprefix(".venv/bin/") for part in parts if not re.match(r"\s*(#|$)", part))
    return [part for part in found if not re.fullmatch(r"python -m pipeline\.(?!run$)\w+(?: folder)?", part)]


def row_of(command: str) -> Run | Slow | Prove | Elsewhere | None:
    """What becomes of a command; None where no row begins as it does."""
    begins = [start for start in ROWS if command == start or command.startswith((f"{start} ", start))]
    exact = [start for start in begins if command == start or not command[len(start) :].startswith(".")]
    return ROWS[max(exact, key=len)] if exact else None


def substituted(text: str) -> str:
    """As it is tried."""
    for words, others in SUBSTITUTIONS.items():
        text = text.replace(words, others)
    return text


def words_of(command: str, more: tuple[str, ...] = ()) -> list[str]:
    """The words of a command after the substitutions, comments left out."""
    return [*shlex.split(substituted(command), comments=True), *more]
