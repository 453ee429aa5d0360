"""Lines of the report in a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.doctor.check import Check, Status

COLOURS = {Status.OK: "32", Status.WARN: "33", Status.FAIL: "31", Status.SKIP: "2"}
# Longer lines than these are hard to read.
WIDEST = 100
NAME = 18


def lines(check: Check, *, colour: bool, columns: int | None = None) -> str:
    """Return a check as lines: status, name and fact, and advice below them."""
    width = min(columns or shutil.get_terminal_size((80, 24)).columns, WIDEST) - 1
    status = f"{check.status:<4}"
    if colour:
        status = f"\x1b[{COLOURS[check.status]}m{status}\x1b[0m"
    indent = " " * (8 + NAME)
    name = plain(check.name)
    # A long name has a line of its own.
    head = f"  {status}  {name:<{NAME}}" if len(name) < NAME else f"  {status}  {name}\n{indent}"
    fact = _wrapped(plain(check.fact), width=width, indent=indent)
    text = f"{head}{fact}"
    if check.way_out and check.status is not Status.OK:
        text += f"\n{indent}-> {_wrapped(plain(check.way_out), width=width, indent=indent + '   ')}"
    return text


def verdict(checks: Sequence[Check], seconds: float) -> str:
    """Return the last line: the result, and the number of checks by status."""
    counts = count(checks)
    failed = [plain(check.name) for check in checks if check.status is Status.FAIL]
    kinds = [f"{counts['ok']} ok"]
    if counts["warn"]:
        kinds.append(f"{counts['warn']} to look at (warn)")
    if counts["skip"]:
        kinds.append(f"{counts['skip']} not needed or left out (skip)")
    others = ", ".join(kinds)
    if failed:
        names = ", ".join(dict.fromkeys(failed))
        text = f"not ready: {len(failed)} {'thing fails' if len(failed) == 1 else 'things fail'}: {names}; {others}"
    else:
        text = f"ready: nothing fails; {others}"
    return "\n".join(textwrap.wrap(f"{text} ({seconds:.0f} s)", 79, break_on_hyphens=False))


def count(checks: Sequence[Check]) -> Mapping[str, int]:
    """Return the number of checks by status."""
    found = Counter(check.status for check in checks)
    return {status.value: found[status] for status in Status}


def plain(text: str) -> str:
    """Return the text on one line, without control characters."""
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _wrapped(text: str, *, width: int, indent: str) -> str:
    wrapped = textwrap.wrap(text, max(20, width - len(indent)), break_on_hyphens=False, break_long_words=False)
    return f"\n{indent}".join(wrapped)
