"""Records of the benchmark of a GPU: its steps, and what became of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bench.gpu_watch import Sample

# The groups in their order, and the share of the whole time after which each has ended. Time that is left goes to the
# groups behind it, and at last to the steps that did not fit.
GROUPS = {"pipeline": 0.42, "tests": 0.54, "forward": 0.70, "backends": 0.84, "cluster": 1.0}


@dataclass(frozen=True, slots=True)
class Ran:
    """The processes of a step that have ended: seconds, samples of the machine, the files of their logs."""

    seconds: float
    samples: tuple[Sample, ...]
    logs: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the benchmark.

    Attributes:
        name: name of its JSON file.
        group: one of :data:`GROUPS`.
        title: its words in the table.
        commands: the processes, which run side by side, each on its share of the cores.
        collect: returns the figures of what they left; may raise OSError, ValueError or LookupError.
        least: seconds below which it is not begun.
        most: seconds after which it is ended.
        absent: the reason why it cannot run on this machine; empty for none.
        needs: a file of an earlier step.
        environment: variables of its processes.
        grace_seconds: seconds that its processes get to end after SIGINT, when their time is up.
        during: called again and again with the process while it runs.
    """

    name: str
    group: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    collect: Callable[[Ran], dict[str, Any]]
    least: float
    most: float
    absent: str = ""
    needs: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    grace_seconds: float = 0.0
    during: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a step, as written to its JSON file.

    ``status`` is ``done``, ``failed``, ``stopped`` (its time was up), ``interrupted``, ``absent`` (not possible on this
    machine) or ``skipped`` (no time left); ``reason`` says why it is not ``done``.
    """

    name: str
    group: str
    title: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    commands: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GpuBench:
    """The whole benchmark, as written to ``gpu.json``."""

    started: str
    command: str
    minutes: float
    rows: int
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    outcomes: tuple[Outcome, ...]
