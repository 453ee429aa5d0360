"""Table of the probes, and the runner that gives each of them a time limit.

A probe is a module with a function ``look(subject)`` that yields checks. Most run in a thread: they read small files
or ask a server or a disk, and one that hangs is abandoned with its thread. A slow probe runs in a process of its own,
``python -m pipeline.doctor.probes``, since it opens native libraries (decoders, the GPU, a backend). Those can end the
process with a segmentation fault or at a memory limit, and one that hangs in a driver may hold Python's global lock, so
that no thread could time it out.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.core.concurrency import aside
from pipeline.doctor.check import Check, Status, Subject, from_json

# Time that a process gets to end.
GRACE_SECONDS = 2.0
HUNG = "something does not answer: a network disk, a server, a GPU; --timeout sets another limit"
CRASHED = "a library may be broken or built for another machine: install the packages again"
KILLED = "often a sign that memory ran out: take a smaller loader.batch_size or more memory"
NO_PROCESS = "raise the limits (ulimit -a shows them; in a container --pids-limit), or free some memory"


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
        receiver, sender = Pipe(duplex=False)
        seconds = probe.seconds if limit is None else limit
        with receiver:
            if not probe.slow:
                aside(partial(_send_checks, probe, subject, sender), name=probe.module)
                yield from _received(receiver, probe, seconds)
                continue
            try:
                with sender:
                    process = _start(probe, subject, sender)
            except OSError as error:
                fact = f"no process can be started for this check: {error.strerror or error}"
                yield Check(probe.group, probe.module, Status.FAIL, fact, NO_PROCESS)
                continue
            try:
                yield from _received(receiver, probe, seconds, process, _messages(probe, subject))
            finally:
                _end(process)


def _received(
    receiver: Connection,
    probe: Probe,
    seconds: float,
    process: subprocess.Popen[bytes] | None = None,
    messages: Path | None = None,
) -> Iterator[Check]:
    """Yield what the probe sends until it is done, crashes or exceeds its time."""
    deadline = time.monotonic() + seconds
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            content = json.loads(receiver.recv_bytes())
        except EOFError:
            fact, way_out = _crash(process)
            break
        if content is None:
            return
        yield from_json(content)
    else:
        fact, way_out = f"no answer within {seconds:g} s", HUNG
    last = _last_line(messages)
    yield Check(probe.group, probe.module, Status.FAIL, f"{fact}; last message: {last}" if last else fact, way_out)


def _crash(process: subprocess.Popen[bytes] | None) -> tuple[str, str]:
    """Return a sentence about the end of a process, and advice."""
    if process is None:
        return "this check ended without a result", CRASHED
    code = None
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(GRACE_SECONDS)
    if code is None or code >= 0:
        return f"the process of this check ended with exit code {code}", CRASHED
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    return f"the process of this check was ended by {name}", KILLED if name == "SIGKILL" else CRASHED


def _last_line(messages: Path | None) -> str:
    if messages is None or not messages.exists():
        return ""
    lines = messages.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _messages(probe: Probe, subject: Subject) -> Path | None:
    """Return the file that standard output and standard error of a probe's process go to."""
    return None if subject.scratch is None else Path(subject.scratch, f"{probe.module}.txt")


def _start(probe: Probe, subject: Subject, sender: Connection) -> subprocess.Popen[bytes]:
    """Start the process of a probe; its files go to the scratch folder, and so are removed with it."""
    environment = dict(os.environ)
    if subject.scratch is not None:
        compiled = str(Path(subject.scratch, "compiled"))
        environment |= {"TMPDIR": subject.scratch, "TORCHINDUCTOR_CACHE_DIR": compiled, "TRITON_CACHE_DIR": compiled}
    with open(_messages(probe, subject) or os.devnull, "ab") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.doctor.probes", probe.module, str(sender.fileno())],
            stdin=subprocess.PIPE,
            stdout=messages,
            stderr=messages,
            pass_fds=(sender.fileno(),),
            env=environment,
            # A process group of its own, so that what the probe starts ends with it.
            start_new_session=True,
        )
    # In a thread, since a long list of labels is more than a pipe holds.
    aside(partial(_feed, process, pickle.dumps(subject)), name="subject")
    return process


def _feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        process.stdin.write(data)
        process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process of a probe and all that it started.

    A process that waits for a disk or a driver may survive even this; it is abandoned.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()


def _run(module: str, descriptor: int) -> None:
    """Run a probe in this process; the subject comes from standard input, the checks go to ``descriptor``."""
    probe = next(probe for probe in PROBES if probe.module == module)
    subject = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _send_checks(probe, subject, Connection(descriptor, readable=False))
    # Threads of libraries are not waited for.
    os._exit(0)


def _end_with_parent() -> None:
    """End this process and all that it started at the end of standard input, which is the end of the parent."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def _send_checks(probe: Probe, subject: Subject, sender: Connection) -> None:
    """Send every check as JSON, then null."""
    # The reader leaves when the time is over.
    with suppress(BrokenPipeError), sender:
        for check in _checks(probe, subject):
            sender.send_bytes(json.dumps(check.to_json()).encode())
        sender.send_bytes(b"null")


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
    _run(sys.argv[1], int(sys.argv[2]))
