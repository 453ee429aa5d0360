"""Table of the probes, and the runner that gives each of them a time limit.

A probe is a module with a function ``look(subject)`` that yields checks. Most run in a thread: they read small files
or ask a server or a disk, and one that hangs is abandoned with its thread. A slow probe runs in a process of its own,
``python -m pipeline.doctor.probes``, since it opens native libraries (decoders, the GPU, a backend). Those can end the
process with a segmentation fault or at a memory limit, and one that hangs in a driver may hold Python's global lock, so
that no thread could time it out.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from pipeline.config.schema import from_dict
from pipeline.core.child import Child, ChildEnded, Parent
from pipeline.core.concurrency import aside
from pipeline.doctor.check import Check, Status, Subject, from_json

# Advice by the cause of an end; a signal that is not listed is a crash.
CRASHED = "a library may be broken or built for another machine: install the packages again"
ADVICE = {
    "timeout": "something does not answer: a network disk, a server, a GPU",
    "SIGKILL": "take a smaller loader.batch_size or more memory",
}
NO_PROCESS = "raise the limits (ulimit -a shows them; in a container --pids-limit), or free some memory"
# The next check of a probe within so many seconds; None after the last one.
Receive = Callable[[float], Check | None]


@dataclass(frozen=True, slots=True)
class Probe:
    """A group of checks, its module in this package, and its time limit in seconds.

    A ``slow`` probe runs in a process of its own and is left out by ``--quick``. A ``general`` one needs no config.
    """

    group: str
    module: str
    seconds: float
    slow: bool = False
    general: bool = False


# In the order of the report. A module is imported when its probe runs, so that a broken package fails there.
PROBES = (
    Probe("versions", "versions", 20, general=True),
    Probe("extras", "extras", 20),
    Probe("processor and memory", "cpu", 20, general=True),
    Probe("GPUs", "gpu", 30, general=True),
    Probe("hub and model", "hub", 30),
    Probe("manifest", "manifest", 60),
    Probe("output", "output", 60),
    Probe("disks", "disk", 60),
    Probe("decoders", "decoders", 120, slow=True),
    Probe("backends", "backends", 300, slow=True),
    Probe("one batch", "batch", 1800, slow=True),
)


def examine(probes: Sequence[Probe], subject: Subject, *, limit: float | None = None) -> Generator[Check]:
    """Yield the checks of every probe, in order, as soon as each is known.

    A probe that exceeds ``limit`` seconds, or its own limit if that is None, or that crashes becomes a failed check.
    """
    for probe in probes:
        seconds = probe.seconds if limit is None else limit
        deadline = time.monotonic() + seconds
        start = _in_process if probe.slow else _in_thread
        try:
            with start(probe, subject) as receive:
                while (check := receive(deadline - time.monotonic())) is not None:
                    yield check
        except ChildEnded as error:
            late = f"no answer within {seconds:g} s; --timeout sets another limit"
            fact = late if error.cause == "timeout" else str(error)
            yield Check(probe.group, probe.module, Status.FAIL, fact, ADVICE.get(error.cause, CRASHED))
        except OSError as error:
            fact = f"no process can be started for this check: {error.strerror or error}"
            yield Check(probe.group, probe.module, Status.FAIL, fact, NO_PROCESS)


@contextmanager
def _in_thread(probe: Probe, subject: Subject) -> Iterator[Receive]:
    found: queue.SimpleQueue[Check | None] = queue.SimpleQueue()

    def run() -> None:
        for check in _checks(probe, subject):
            found.put(check)
        found.put(None)

    def receive(seconds: float) -> Check | None:
        try:
            return found.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise ChildEnded("no answer", "timeout") from None

    aside(run, name=probe.module)
    yield receive


@contextmanager
def _in_process(probe: Probe, subject: Subject) -> Iterator[Receive]:
    """Start the process of a probe; its files go to the scratch folder, and so are removed with it."""
    log, environment = None, dict[str, str]()
    if subject.scratch is not None:
        log, compiled = Path(subject.scratch, f"{probe.module}.txt"), str(Path(subject.scratch, "compiled"))
        environment = {"TMPDIR": subject.scratch, "TORCHINDUCTOR_CACHE_DIR": compiled, "TRITON_CACHE_DIR": compiled}
    command = [sys.executable, "-m", "pipeline.doctor.probes", probe.module]
    with Child(command, log=log, environment=environment) as child:
        # In a thread, since a long list of labels is more than a pipe holds.
        aside(partial(child.send, asdict(subject)), name="subject")

        def receive(seconds: float) -> Check | None:
            content = child.receive(timeout=seconds)
            return None if content is None else from_json(content)

        yield receive


def _run(module: str) -> None:
    """Run a probe in this process, and send every check, then null; the parent ends the process."""
    parent = Parent()
    content = parent.receive()
    subject = Subject(**{**content, "config": from_dict(content["config"])})
    for check in _checks(next(probe for probe in PROBES if probe.module == module), subject):
        parent.send(check.to_json())
    parent.send(None)
    # Threads of libraries are not waited for.
    threading.Event().wait()


def _checks(probe: Probe, subject: Subject) -> Iterator[Check]:
    """Yield the checks of a probe; an error becomes a failed check, so that the other probes go on."""
    try:
        yield from import_module(f"pipeline.doctor.{probe.module}").look(subject)
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0]
        fact = f"this check failed with {type(error).__name__}: {words}"
        yield Check(probe.group, probe.module, Status.FAIL, fact, _advice(error))


def _advice(error: Exception) -> str:
    from pipeline.doctor.versions import install

    if isinstance(error, ImportError) and not (error.name or "").startswith("pipeline"):
        return f"a package is missing or broken: {install()}"
    return "if no other line explains it, this is a bug of the pipeline: please report it"


if __name__ == "__main__":
    _run(sys.argv[1])
