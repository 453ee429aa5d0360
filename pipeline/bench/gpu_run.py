"""Run the steps of the benchmark of a GPU: how much time each gets, its processes, its JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench.command import progress
from pipeline.bench.gpu_records import GROUPS, Outcome, Ran, Step
from pipeline.bench.gpu_watch import Watch
from pipeline.core.child import Child, ChildEnded

# Time between two looks at the processes, and time that the table needs.
POLL, TABLE_SECONDS = 0.05, 8.0
# The last line of a traceback.
EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt|Unavailable)\b")
# Models that the machine does not have are no reason to ask the network.
OFFLINE = {"HF_HUB_OFFLINE": "1"}


class Stopped(Exception):
    """The time of a step was up."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The time of all steps: ``seconds`` from ``began`` on, by the clock ``now``."""

    seconds: float
    began: float
    now: Callable[[], float] = time.monotonic

    def left(self, group: str | None = None) -> float:
        """Seconds until a group must have ended; None for the last one."""
        share = 1.0 if group is None else GROUPS[group]
        return self.began + share * (self.seconds - TABLE_SECONDS) - self.now()


def run_steps(
    steps: Sequence[Step], budget: Budget, start: Callable[[Step, float], Outcome], *, keep: Callable[[Outcome], None]
) -> tuple[list[Outcome], bool]:
    """Run the steps; return what became of each, in order, and whether an interruption ended them early.

    A step that does not fit into the time of its group is tried again when all others are done.

    Args:
        start: runs a step within so many seconds.
        keep: called with each outcome as soon as it is known.
    """
    found: dict[str, Outcome] = {}

    def settle(step: Step, outcome: Outcome) -> None:
        found[step.name] = outcome
        keep(outcome)

    interrupted = False
    try:
        for grouped in (True, False):
            for step in (step for step in steps if step.name not in found):
                left = budget.left(step.group if grouped else None)
                if reason := step.absent or _lacks(step):
                    settle(step, _without(step, "absent", reason))
                elif left >= step.least and not interrupted:
                    settle(step, start(step, min(step.most, left)))
                    interrupted = found[step.name].status == "interrupted"
    except KeyboardInterrupt:
        interrupted = True
    for step in (step for step in steps if step.name not in found):
        left = max(0.0, budget.left())
        need = f"it takes {step.least:.0f} s at least, and {left:.0f} s of --minutes were left"
        status, reason = ("interrupted", "not begun") if interrupted else ("skipped", need)
        settle(step, _without(step, status, reason))
    return [found[step.name] for step in steps], interrupted


def _lacks(step: Step) -> str:
    file = step.needs
    return f"an earlier step did not leave {file.name}" if file is not None and not file.exists() else ""


def run_step(step: Step, limit: float, logs: Path) -> Outcome:
    """Run the processes of a step within ``limit`` seconds, and collect its figures, also those of one that failed."""
    progress(f"{step.group}: {step.title} (at most {limit:.0f} s)")
    began, status, reason = time.monotonic(), "done", ""
    paths = tuple(logs / f"{step.name}{f'-{i}' if i else ''}.log" for i in range(len(step.commands)))
    samples: list[Watch] = []
    try:
        with ExitStack() as opened:
            children = [opened.enter_context(child) for child in _start(step, paths)]
            samples.append(opened.enter_context(Watch([child.pid for child in children])))
            _wait(step, children, limit)
    except KeyboardInterrupt:
        status, reason = "interrupted", "ended by the interruption"
    except Stopped:
        status, reason = "stopped", f"not done within {limit:.0f} s"
    except ChildEnded as error:
        status, reason = "failed", _explained(error, paths)
    except OSError as error:
        status, reason = "failed", f"cannot be started: {error}"
    seconds, figures = time.monotonic() - began, {}
    try:
        figures = step.collect(Ran(seconds, samples[0].samples() if samples else (), paths))
    except (OSError, ValueError, LookupError) as error:
        # One that failed may leave nothing; its own reason says more.
        if status == "done":
            status, reason = "failed", f"left no figures: {type(error).__name__}: {error}"
    commands = tuple(map(shlex.join, step.commands))
    outcome = Outcome(step.name, step.group, step.title, status, reason, round(seconds, 2), commands, figures)
    progress(f"{step.group}: {step.title}: {status} after {seconds:.0f} s{f': {reason}' if reason else ''}")
    return outcome


def _explained(error: ChildEnded, logs: Sequence[Path]) -> str:
    """The reason why a process ended, with the last exception of its log where another line is the last one."""
    raised = [line for log in logs for line in log.read_text(errors="replace").splitlines() if EXCEPTION.match(line)]
    return str(error) if not raised or raised[-1] in str(error) else f"{error} ({raised[-1][:200]})"


def write(outcome: Outcome, out: Path) -> None:
    """Write the JSON file of a step."""
    from pipeline.storage.local import LocalStorage

    text = json.dumps(dataclasses.asdict(outcome), indent=1, ensure_ascii=False)
    LocalStorage(str(out)).write(f"{outcome.name}.json", f"{text}\n".encode())


def _without(step: Step, status: str, reason: str) -> Outcome:
    progress(f"{step.group}: {step.title}: {status}: {reason}")
    return Outcome(step.name, step.group, step.title, status, reason)


def _start(step: Step, logs: Sequence[Path]) -> Iterator[Child]:
    for share, command, log in zip(_core_shares(len(step.commands)), step.commands, logs, strict=True):
        with _affinity(share):
            child = Child(command, log=log, environment={**OFFLINE, **step.environment}, answers=False)
        yield child


def _core_shares(count: int) -> list[set[int]]:
    """Equal shares of the cores, neighbours together; empty where the system has no affinity, or for one process."""
    if count == 1 or not hasattr(os, "sched_getaffinity"):
        return [set()] * count
    known = sorted(os.sched_getaffinity(0))
    size = max(1, len(known) // count)
    return [{known[(i * size + k) % len(known)] for k in range(size)} for i in range(count)]


@contextmanager
def _affinity(share: set[int]) -> Iterator[None]:
    """Keep this thread, and the processes that it starts, to some cores."""
    before = os.sched_getaffinity(0) if share else set()
    if share:
        os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        if share:
            os.sched_setaffinity(0, before)


def _wait(step: Step, children: Sequence[Child], limit: float) -> None:
    """Wait until all processes have ended.

    Raises:
        Stopped: they did not within ``limit`` seconds.
        ChildEnded: one has failed.
    """
    deadline = time.monotonic() + limit
    while any(child.running for child in children):
        if time.monotonic() > deadline:
            _interrupt(children, step.grace_seconds)
            raise Stopped
        if step.during is not None:
            step.during(children[0].pid)
        time.sleep(POLL)
    for child in children:
        child.wait(timeout=1)


def _interrupt(children: Sequence[Child], grace_seconds: float) -> None:
    """Let the processes end by themselves, which those that write their results at the end need."""
    if grace_seconds:
        for child in children:
            child.interrupt()
        deadline = time.monotonic() + grace_seconds
        while any(child.running for child in children) and time.monotonic() < deadline:
            time.sleep(POLL)
