"""Processes as others can name them: on which machine, which number, and whether they still live; and their cores."""

from __future__ import annotations

import ctypes
import getpass
import os
import resource
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Of linux/prctl.h.
_SET_PDEATHSIG = 1

_commands: set[int] = set()


@dataclass(frozen=True, slots=True)
class Process:
    """A process of some machine.

    ``boot`` and ``space`` tell machines and containers of one name apart, ``started`` (clock ticks since the boot)
    tells processes of one number apart; they are empty where the system does not say.
    """

    host: str
    pid: int
    user: str
    boot: str
    space: str
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user or 'an unknown user'} on {self.host}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def give_home() -> None:
    """Name a home folder and a user to the libraries of a process that has none, as under a number without a name.

    Their caches would otherwise land in a folder ``~`` of the current one, or end with a traceback. The folder is a
    temporary one, kept for later processes of this user, and readable by them alone.
    """
    if os.path.expanduser("~") == "~":
        folder = os.path.join(tempfile.gettempdir(), f"clip-pipeline-home-{os.getuid()}")
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            found = os.lstat(folder)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                # Another user may have planted it.
                folder = tempfile.mkdtemp(prefix="clip-pipeline-home-")
        os.environ["HOME"] = folder
    try:
        getpass.getuser()
    except (OSError, KeyError):
        os.environ["USER"] = str(os.getuid())


def mark_as_command() -> None:
    """Mark this process as one that runs a command of this package, and nothing else."""
    _commands.add(os.getpid())


def runs_a_command() -> bool:
    """True for such a process; in others, libraries must stay as their programs expect them."""
    return os.getpid() in _commands


def end_with(parent: int) -> None:
    """End this process with the thread of ``parent`` that started it, also if that one is killed (Linux).

    Raises:
        SystemExit: it has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started this one has ended")


def this_process() -> Process:
    """The one that asks."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        # A container may run under a number that has no name.
        user = str(os.getuid())
    pid = os.getpid()
    return Process(host=socket.gethostname(), pid=pid, user=user, boot=_boot(), space=_space(), started=_stat(pid)[1])


def has_process(pid: int) -> bool:
    """True if this machine, or this container, has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It lives, under another user.
        return True
    return True


def is_gone(process: Process) -> bool:
    """True if a process has certainly ended; False if that cannot be known from here."""
    here = this_process()
    if (process.host, process.boot, process.space) != (here.host, here.boot, here.space):
        return False
    if not has_process(process.pid):
        return True
    state, started = _stat(process.pid)
    # A zombie only waits for its parent to notice.
    return state in ("Z", "X") or bool(started and process.started and started != process.started)


def _stat(pid: int) -> tuple[str, str]:
    """State and start time on Linux; empty elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Spent:
    """Core seconds, in user and in kernel mode: of this process with all its threads, and of its children."""

    own: float
    children: float

    @property
    def total(self) -> float:
        """Both."""
        return self.own + self.children

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.own + other.own, self.children + other.children)

    def __sub__(self, earlier: Spent) -> Spent:
        return Spent(self.own - earlier.own, self.children - earlier.children)


def spent(among: Iterable[int] | None = None) -> Spent:
    """Core seconds used so far; what children have started counts too. Of those that live, on Linux only.

    Living processes are found in all of the machine, or ``among`` some.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    every, tick = running(among), os.sysconf("SC_CLK_TCK")
    living = sum(sum(every[pid][1:]) for pid in descendants([os.getpid()], every))
    return Spent(own=time.process_time(), children=ended.ru_utime + ended.ru_stime + living / tick)


def running(among: Iterable[int] | None = None) -> dict[int, tuple[int, int, int]]:
    """Processes, by default all: their parent, and core time (clock ticks) of their own and of children waited for.

    Empty where the system does not tell.
    """
    found = {}
    if among is None:
        among = map(int, filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()))
    for pid in among:
        with suppress(OSError), open(f"/proc/{pid}/stat", errors="replace") as file:
            # proc(5): behind the name come state and parent, and as fields 14 to 17 the times.
            fields = file.read().rpartition(")")[2].split()
            if len(fields) > 14:
                user, kernel, waited_user, waited_kernel = map(int, fields[11:15])
                found[pid] = (int(fields[1]), user + kernel, waited_user + waited_kernel)
    return found


def descendants(pids: Sequence[int], every: Mapping[int, tuple[int, int, int]] | None = None) -> list[int]:
    """The living processes that ``pids``, or those that they started, have started; ``every`` is :func:`running`."""
    every = running() if every is None else every
    found, known = list[int](), set(pids)
    # A process may have a lower number than its parent.
    while more := [pid for pid, row in every.items() if row[0] in known and pid not in known]:
        found += more
        known.update(more)
    return found
