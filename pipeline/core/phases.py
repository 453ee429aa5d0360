"""Phases of a run on the clock: seconds with a name, one after the other, that add up to all of its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_current: Phases | None = None


class Phases:
    """Seconds by the name of the phase, in the order in which the phases end.

    All time belongs to one phase: that of a phase within another one is not counted in the outer one.

    Args:
        began: beginning of the first phase, on ``clock``.
        clock: seconds since the epoch.
    """

    def __init__(self, began: float, *, clock: Callable[[], float] = time.time) -> None:
        self.began, self._clock, self._last = began, clock, began
        self._seconds: dict[str, float] = {}
        self._thread = threading.get_ident()

    def ended(self, name: str) -> None:
        """Count the time since the end of the phase before as ``name``."""
        now = self._clock()
        # The clock of the machine may have been set back.
        self._seconds[name] = self._seconds.get(name, 0.0) + max(0.0, now - self._last)
        self._last = now

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Count the body as ``name``, and not as the phase that it is a part of."""
        outer = self._clock() - self._last
        self._last += outer
        try:
            yield
        finally:
            self.ended(name)
            self._last -= outer

    def take(self) -> dict[str, float]:
        """Return the seconds that were counted since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Let :func:`phase` count here, in the thread that made these phases."""
        global _current
        before, _current = _current, self
        try:
            yield
        finally:
            _current = before

    @property
    def here(self) -> bool:
        """True in the thread that made these phases; what others do meanwhile is no phase of its own."""
        return threading.get_ident() == self._thread


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the body as a phase of the run, if one counts them and this is its thread."""
    if _current is None or not _current.here:
        yield
        return
    with _current.within(name):
        yield


def listed(seconds: Mapping[str, float], *, most: int | None = None) -> str:
    """Return ``imports 1.2 s, model 0.4 s``: all that show in tenths, or the ``most`` longest, longest first."""
    shown = {name: value for name, value in seconds.items() if value >= 0.05}
    if most is not None:
        shown = dict(sorted(shown.items(), key=lambda item: -item[1])[:most])
    rest = sum(seconds.values()) - sum(shown.values())
    words = [f"{name} {value:.1f} s" for name, value in shown.items()]
    return ", ".join([*words, *([f"other {rest:.1f} s"] if rest >= 0.05 else [])])
