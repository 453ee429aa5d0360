"""Failpoints: named places where a test makes the process die, fail or wait.

Off, at the price of one look at an empty table, unless the environment arms some::

    PIPELINE_FAILPOINTS="storage.linked[_commits]=kill@3; part.write=raise:ENOSPC; encode=delay:0.5@2+"

``name=action`` acts every time; ``@N`` acts the Nth time only and ``@N+`` from then on; ``name[text]`` counts only
the times at which the place handles something (a file's name, an image's bytes) that holds the text. Actions:
``kill`` (SIGKILL) or ``kill:SIGSEGV``, ``raise:ENOSPC`` (an ``OSError`` of that number), ``delay:SECONDS``,
``grow:BYTES`` (ask for that much memory).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

VARIABLE = "PIPELINE_FAILPOINTS"
# Every failpoint, in the order in which a job comes by.
POINTS = (
    "lease.taken",
    "ids.write",
    "plan.settled",
    "rows",
    "read",
    "decode",
    "child.decode",
    "decoded",
    "encode",
    "encoded",
    "label",
    "part.build",
    "part.write",
    "part.written",
    "storage.staged",
    "storage.synced",
    "storage.linked",
    "storage.replaced",
    "storage.durable",
    "object.put",
    "object.created",
    "part.published",
    "commit.done",
    "commit.lost",
    "finalize.begin",
    "finalize.checked",
    "finalize.cleared",
    "finalize.done",
    "report.written",
)
_RULE = re.compile(
    r"(?P<point>[a-z.]+)(\[(?P<text>[^\]]*)\])?=(?P<action>[a-z]+)(:(?P<value>[\w.]+))?(@(?P<nth>\d+)(?P<on>\+)?)?"
)


@dataclass(slots=True)
class _Rule:
    action: str
    value: str
    text: bytes
    nth: int
    on: bool
    hits: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, data: bytes) -> bool:
        if self.text not in data:
            return False
        with self.lock:
            self.hits += 1
            return self.nth == 0 or self.hits == self.nth or (self.on and self.hits > self.nth)

    def act(self, point: str) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), getattr(signal, self.value or "SIGKILL"))
            # A signal to oneself may take a moment to arrive.
            time.sleep(5)
        elif self.action == "raise":
            number = getattr(errno, self.value)
            raise OSError(number, f"{os.strerror(number)} (failpoint {point})")
        elif self.action == "delay":
            time.sleep(float(self.value))
        else:
            bytearray(int(float(self.value)))


_armed: dict[str, list[_Rule]] = {}


def failpoint(name: str, data: bytes | str = b"") -> None:
    """Do here what is armed for ``name``, if anything; ``data`` is what the place handles."""
    if not _armed:
        return
    handled = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    # All count the hit before one acts on it.
    for rule in [rule for rule in _armed.get(name, ()) if rule.due(handled)]:
        rule.act(name)


def arm(text: str) -> None:
    """Arm what ``text`` says, instead of what is armed.

    Raises:
        ValueError: it names no failpoint, or no action.
    """
    _armed.clear()
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = _RULE.fullmatch(part)
        if match is None or match["point"] not in POINTS or match["action"] not in ("kill", "raise", "delay", "grow"):
            raise ValueError(f"{VARIABLE}: {part!r} is not POINT[TEXT]=ACTION:VALUE@N with one of {', '.join(POINTS)}")
        rule = _Rule(
            action=match["action"],
            value=match["value"] or "",
            text=(match["text"] or "").encode(),
            nth=int(match["nth"] or 0),
            on=bool(match["on"]),
        )
        _armed.setdefault(match["point"], []).append(rule)


@contextmanager
def armed(text: str) -> Iterator[None]:
    """Arm failpoints in this process for the time being."""
    arm(text)
    try:
        yield
    finally:
        arm(os.environ.get(VARIABLE, ""))


arm(os.environ.get(VARIABLE, ""))
