"""Constraints that annotate fields of the schema: choices, ranges of numbers, forms of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

AUTO, DEFAULT = "auto", "default"


class DefaultNumber(int):
    """A number that nobody typed, and that another device may replace; a typed one is an ordinary int."""


class OneOf:
    """A choice among words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.allowed = f"must be one of {', '.join(words)}"

    def accepts(self, value: object) -> bool:
        """Return true for one of the words."""
        return value in self.words


@dataclass(frozen=True)
class Range:
    """A number from ``lowest`` to ``highest``, where there is a highest.

    ``word`` may be typed instead of a number. The config keeps 0 for the word ``auto``.
    """

    lowest: float
    highest: float | None = None
    word: str = ""

    @property
    def allowed(self) -> str:
        """The range in words, for messages."""
        if self.word == AUTO:
            return f"must be a whole number from 1 to {self.highest}, or {AUTO}"
        limits = f"at least {self.lowest}" if self.highest is None else f"from {self.lowest} to {self.highest}"
        return f"must be {limits}{f', or {self.word}' if self.word else ''}"

    def accepts(self, value: float) -> bool:
        """Return true for a number within the range; NaN, which compares as false, is not."""
        return value >= self.lowest and (self.highest is None or value <= self.highest)


@dataclass(frozen=True)
class Text:
    """A text, or every text of a list, for which ``accepts`` is true; ``words`` are matched for a hint."""

    accepts: Callable[[str], object]
    allowed: str
    words: tuple[str, ...] = ()


def filled(allowed: str) -> Text:
    """A text that is not empty."""
    return Text(bool, allowed)
