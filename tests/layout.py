"""``python -m tests.layout`` writes the table of packages and levels into ``CONTRIBUTING.md``."""

from __future__ import annotations

import ast
import re

from tests.conftest import ROOT
from tests.test_architecture import COMMANDS, COMMANDS_LEVEL, LEVELS, PACKAGE

PAGE = ROOT / "CONTRIBUTING.md"
HEAD = "| level | package | contents |\n| ---: | --- | --- |\n"
_TABLE = re.compile(re.escape(HEAD) + r"(?:\|[^\n]*\n)*")


def contents(package: str) -> str:
    """Return the first line of the docstring of a package."""
    doc = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text())) or ""
    return doc.splitlines()[0].removesuffix(".")


def table() -> str:
    """Return the table of packages, lowest level first."""
    lowest_first = sorted(LEVELS.items(), key=lambda item: item[::-1])
    rows = [f"| {level} | `{name}/` | {contents(name)} |\n" for name, level in lowest_first]
    commands = f"| {COMMANDS_LEVEL} | `*.py` | Commands: {', '.join(sorted(COMMANDS))} |\n"
    return HEAD + "".join(rows) + commands


def page(text: str) -> str:
    """Return the page with the current table."""
    return _TABLE.sub(lambda _: table(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
