"""Seconds of the cores that this process and its children have spent."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spent:
    """Core seconds, in user and in kernel mode: of this process with all its threads, and of its children."""

    own: float
    children: float

    @property
    def total(self) -> float:
        """Both."""
        return self.own + self.children

    def __sub__(self, earlier: Spent) -> Spent:
        return Spent(self.own - earlier.own, self.children - earlier.children)


def spent() -> Spent:
    """What was spent so far. Children that live are counted on Linux alone, elsewhere only those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(own=time.process_time(), children=ended.ru_utime + ended.ru_stime + _living_children())


def _living_children() -> float:
    """What the living children of this process, and those that they waited for, have spent."""
    try:
        names = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return 0.0
    ours, ticks = str(os.getpid()), 0
    for name in names:
        try:
            with open(f"/proc/{name}/stat", errors="replace") as file:
                # proc(5): behind the name come state and parent, and as fields 14 to 17 the times.
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if len(fields) > 14 and fields[1] == ours:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
