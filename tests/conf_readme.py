"""``python -m tests.conf_readme`` writes ``conf/README.md`` from the schemas and from the comments of the YAML files.

A new group, option or key is taken up by itself; what is said of it is the comment above it in its YAML file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from pipeline.config.ranges import AUTO
from pipeline.config.schema import Config, conf_dir
from pipeline.config.validate import AUTOMATIC, CHOICES, RANGES, limits

README = Path(__file__).resolve().parent.parent / "conf" / "README.md"
HEAD = """# The config

What `python -m pipeline.run` can be told. A group is a folder, its options are the files in it: `GROUP=OPTION` chooses
one, `KEY=VALUE` sets a value, `--cfg job` prints what comes of it. Everything is checked against the schemas in
`pipeline/config/schema.py` and the rules in `pipeline/config/validate.py` before any work begins; all mistakes come in
one message.

This page is made from them and from the comments in the YAML files by `python -m tests.conf_readme`; a test compares.
"""
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", list[str]: "list of texts"}
# Keys that stand in the schema alone.
ELSEWHERE = {"images.formats": "formats that may be decoded, whatever a file is called; why these, says the schema"}
SHARED, CHOSEN = "as the key above", "set by the option"


def comments(path: Path) -> dict[str, str]:
    """What the comment above each key of a YAML file says; a key right below another one shares its comment."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            lines.append(line.removeprefix("#").strip())
        elif match := re.match(r"(\w+):", line):
            found[match[1]] = " ".join(lines) if lines else SHARED
            lines = []
    return found


def options_of(group: str) -> list[Path]:
    """The files of a group, by name."""
    return sorted((conf_dir() / group).glob("*.yaml"))


def told(group: str) -> tuple[dict[str, str], dict[str, str]]:
    """What the YAML files of a group say of its options, and of its keys.

    In a group with several options the comment at the top of a file is about the option, not about its first key.
    """
    options, keys = {}, {}
    files = options_of(group)
    for path in files:
        said = comments(path)
        if len(files) > 1:
            first = next(iter(said))
            options[path.stem] = said.pop(first)
            keys.setdefault(first, CHOSEN)
        keys |= {key: text for key, text in said.items() if keys.get(key, CHOSEN) in (CHOSEN, SHARED)}
    return options, keys


def kind_of(hint: Any) -> str:
    """A type in words."""
    for kind, text in WORDS.items():
        if hint == kind:
            return text
        if hint == kind | None:
            return f"{text}, or null"
    return "numbers by name"


def shown(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, dict):
        return "<br>".join(f"`{name}: {number}`" for name, number in value.items())
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("\n...\n")
    return f"`{text.strip()}`"


def values_of(key: str) -> str:
    """What a value may be, besides its type."""
    if key in CHOICES:
        return " ".join(f"`{choice}`" for choice in CHOICES[key])
    return limits(key).removeprefix("must be ") if key in RANGES else ""


def section(group: str, kind: Any) -> Iterator[str]:
    """The lines about one group."""
    options, keys = told(group)
    about = str(kind.__doc__).split("\n")[0].partition(": ")[2]
    yield f"\n## {group}\n"
    yield f"{about[0].upper()}{about[1:]}\n"
    if options:
        yield f"| `{group}=` | |\n| --- | --- |"
        yield from (f"| `{name}` | {cell(text)} |" for name, text in options.items())
        yield ""
    yield "| key | type | default | values | |\n| --- | --- | --- | --- | --- |"
    hints = get_type_hints(kind)
    for field in fields(kind):
        key = f"{group}.{field.name}"
        default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
        text = AUTO if key in AUTOMATIC and default == 0 else default
        columns = (
            kind_of(hints[field.name]),
            shown(text),
            values_of(key),
            cell(keys.get(field.name) or ELSEWHERE[key]),
        )
        yield f"| `{key}` | {' | '.join(columns)} |"


def cell(text: str) -> str:
    """Text within a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """The whole file."""
    lines = [line for group, kind in get_type_hints(Config).items() for line in section(group, kind)]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(page())
