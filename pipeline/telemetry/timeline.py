"""The seconds of every stage in equal slices of time, whose number is bounded for any length of run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from pipeline.core.records import Timeline

# The first width of a slice in seconds, and the number of slices above which the width doubles.
FINEST = 0.25
MOST = 160
IMAGES = "images"


class Slices:
    """Sums in slices of time; not thread-safe.

    Slices are numbered from the epoch, so that those of several processes coincide.
    """

    def __init__(self) -> None:
        self._epoch = time.time() - time.perf_counter()
        self._width = FINEST
        self._sums: dict[int, defaultdict[str, float]] = {}
        self._now: defaultdict[str, float] = defaultdict(float)
        self._number, self._end = -1, 0.0

    def add(self, name: str, amount: float, now: float) -> None:
        """Count ``amount`` in the slice of ``now``, a value of :func:`time.perf_counter`."""
        if now >= self._end:
            self._turn(now)
        self._now[name] += amount

    def spend(self, name: str, seconds: float, now: float) -> None:
        """Count ``seconds`` that ended at ``now`` in every slice that they overlap."""
        if now >= self._end:
            self._turn(now)
        before = seconds - self._width + self._end - now
        if before <= 0:
            self._now[name] += seconds
            return
        if before <= self._width:
            self._now[name] += seconds - before
            self._slice(self._number - 1)[name] += before
            return
        end, first = self._epoch + now, self._epoch + now - seconds
        for number in range(int(first / self._width), int(end / self._width) + 1):
            low, high = number * self._width, (number + 1) * self._width
            self._slice(number)[name] += max(0.0, min(high, end) - max(low, first))
        self._narrow()

    def total(self) -> Timeline:
        """All slices so far, without gaps."""
        return _line(self._width, self._sums)

    def _turn(self, now: float) -> None:
        self._number = int((self._epoch + now) / self._width)
        self._now = self._slice(self._number)
        self._end = (self._number + 1) * self._width - self._epoch
        self._narrow()

    def _slice(self, number: int) -> defaultdict[str, float]:
        found = self._sums.get(number)
        if found is None:
            found = self._sums[number] = defaultdict(float)
        return found

    def _narrow(self) -> None:
        while max(self._sums) - min(self._sums) >= MOST:
            self._width *= 2
            self._sums = _halved(self._sums)
            self._number //= 2
            self._now = self._slice(self._number)
            self._end = (self._number + 1) * self._width - self._epoch


def merge(lines: Iterable[Timeline]) -> Timeline | None:
    """The sum of the timelines of several processes or parts of a job; None if all are empty."""
    given = [line for line in lines if line.amounts]
    if not given:
        return None
    width = max(line.width for line in given)
    sums: dict[int, defaultdict[str, float]] = {}
    for line in given:
        for name, amounts in line.amounts.items():
            for number, amount in enumerate(amounts):
                at = int((line.began + (number + 0.5) * line.width) / width)
                sums.setdefault(at, defaultdict(float))[name] += amount
    while max(sums) - min(sums) >= MOST:
        width, sums = 2 * width, _halved(sums)
    return _line(width, sums)


def _halved(sums: Mapping[int, Mapping[str, float]]) -> dict[int, defaultdict[str, float]]:
    """Merge every two neighbours."""
    halved: dict[int, defaultdict[str, float]] = {}
    for number, amounts in sums.items():
        into = halved.setdefault(number // 2, defaultdict(float))
        for name, amount in amounts.items():
            into[name] += amount
    return halved


def _line(width: float, sums: Mapping[int, Mapping[str, float]]) -> Timeline:
    if not sums:
        return Timeline(began=0.0, width=width)
    first, last = min(sums), max(sums)
    names = dict.fromkeys(name for amounts in sums.values() for name in amounts)
    nothing: Mapping[str, float] = {}
    return Timeline(
        began=first * width,
        width=width,
        amounts={
            str(name): tuple(round(sums.get(number, nothing).get(name, 0.0), 3) for number in range(first, last + 1))
            for name in names
        },
    )
