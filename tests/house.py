"""``python -m tests.house`` writes the floors of the house into ``CONTRIBUTING.md``, from the test that holds them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import ROOT
from tests.test_architecture import FLOORS, PACKAGE

PAGE = ROOT / "CONTRIBUTING.md"
HEAD = "| floor | rooms (folders) and files |\n| ---: | --- |\n"
_TABLE = re.compile(re.escape(HEAD) + r"(?:\|[^\n]*\n)*")


def named(room: str) -> str:
    """A room as it lies on disk."""
    return f"`{room}/`" if Path(PACKAGE / room).is_dir() else f"`{room}.py`"


def table() -> str:
    """The floors, lowest first."""
    floors = sorted(set(FLOORS.values()))
    rows = [(floor, sorted(room for room, level in FLOORS.items() if level == floor)) for floor in floors]
    return HEAD + "".join(f"| {floor:g} | {', '.join(map(named, rooms))} |\n" for floor, rooms in rows)


def page(text: str) -> str:
    """The page with the table of today."""
    return _TABLE.sub(lambda _: table(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
