"""Labels and their prompts, from the config or from a YAML, CSV or Parquet file."""

from __future__ import annotations

import csv
import io
import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import PromptsConfig
from pipeline.core.errors import PromptsError, short
from pipeline.models.label_yaml import Entry, read_entries
from pipeline.storage.urls import from_here, local_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Distinct names, each with the prompts whose features are averaged."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]


def read_labels(config: PromptsConfig) -> LabelSet:
    """The label set of a config; empty where it names none.

    A YAML file holds a list of labels, or a mapping from a label to its prompt or prompts; either may stand under the
    key ``labels``. A CSV or Parquet file has a column ``label`` and, if wanted, a column ``prompt``; several rows of
    one label are averaged. A label without prompts of its own takes every template, and ``{}`` in a prompt is its
    label.

    Raises:
        PromptsError: the file cannot be read, a label is empty or not text, or two labels cannot be told apart.
    """
    if config.path is None:
        entries = [Entry(name, None, f"[{place}]") for place, name in enumerate(config.labels)]
        place = "prompts.labels"
    else:
        place = f"prompts.path={config.path}"
        entries = _read_entries(local_file(config.path), place)
    collected: dict[str, list[str]] = {}
    first: dict[str, Entry] = {}
    for number, entry in enumerate(entries, start=1):
        name, prompt = entry.name, entry.prompt
        if not isinstance(name, str) or not name.strip() or not is_text(name):
            raise PromptsError(
                f"{place}, {entry.place}: label {number} is {_short(name)}; labels are texts (in YAML, quote yes, no, "
                "numbers and dates)"
            )
        begun = first.setdefault(name, entry)
        if begun is not entry and (prompt is None or begun.prompt is None):
            raise PromptsError(
                f"{place}: the label {_short(name)} stands there twice ({begun.place} and {entry.place}); take one "
                "out, or give each of them a prompt of its own"
            )
        prompts = collected.setdefault(name, [])
        if prompt is None:
            prompts += [fill(template, name) for template in config.templates]
        elif isinstance(prompt, str) and prompt.strip() and is_text(prompt):
            prompts.append(fill(prompt, name))
        else:
            raise PromptsError(
                f"{place}, {entry.place}: the prompt of {_short(name)} is {_short(prompt)}; prompts are texts"
            )
    if config.path is not None and not collected:
        raise PromptsError(f"{place}: the file holds no labels")
    labels = LabelSet(names=tuple(collected), prompts=tuple(map(tuple, collected.values())))
    refuse_same(labels, place, [first[name].place for name in labels.names])
    return labels


def fill(template: str, name: str) -> str:
    """The prompt of a label: the template with the name in the place of ``{}``."""
    return template.replace("{}", name)


def as_read(text: str) -> str:
    """The text as it is compared with others: in Unicode's composed form, without spaces around it."""
    return unicodedata.normalize("NFC", text).strip()


def refuse_same(labels: LabelSet, place: str, places: Sequence[str]) -> None:
    """Refuse two labels that nobody can tell apart: by name or by prompts, after :func:`as_read`.

    Args:
        labels: the label set.
        place: the place of the label set in messages.
        places: the place of each label in it.

    Raises:
        PromptsError: with both labels and their places.
    """
    names: dict[str, int] = {}
    prompts: dict[tuple[str, ...], int] = {}
    for number, (name, texts) in enumerate(zip(labels.names, labels.prompts, strict=True)):
        other = names.setdefault(as_read(name), number)
        if other != number:
            what = "differ in spaces or in the form of their Unicode characters only; take one out"
        else:
            other = prompts.setdefault(tuple(sorted(map(as_read, texts))), number)
            what = f"have the same prompts ({_short(texts[0])}); give each its own, or a template with {{}}"
        if other != number:
            both = f"{_short(labels.names[other])} ({places[other]}) and {_short(name)} ({places[number]})"
            raise PromptsError(f"{place}: the labels {both} {what}")


def is_text(text: str) -> bool:
    """True if the text can be encoded as UTF-8, unlike a string with half a character of a terminal or a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    return short(repr(value))


def _read_entries(path: Path, place: str) -> list[Entry]:
    if not path.is_file():
        raise PromptsError(f"{place}: no such file{from_here(str(path))}")
    *others, last = READERS
    if path.suffix.lower() not in READERS:
        raise PromptsError(f"{place}: wanted a file that ends in {', '.join(others)} or {last}")
    try:
        return READERS[path.suffix.lower()](path, place)
    except (OSError, ValueError) as error:
        raise PromptsError(f"{place}: {error}") from error


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        ValueError: it is in another encoding.
    """
    data = path.read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    encoding = "UTF-16" if utf16 else "UTF-8"
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line}: not {encoding} (byte {data[error.start]:#04x}); save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line}: holds the character NUL, as UTF-16 without its mark does; save it as UTF-8")
    return text


def _read_yaml(path: Path, place: str) -> list[Entry]:
    return read_entries(_read_text(path), place)


def _read_csv(path: Path, place: str) -> list[Entry]:
    text = _read_text(path)
    # In "label, prompt" the space after each comma is no part of the values.
    spaced = ", " in (text.splitlines() or [""])[0]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=spaced)
    rows: list[tuple[str, list[str]]] = []
    try:
        for row in reader:
            if row:
                rows.append((f"line {reader.line_num}", row))
    except csv.Error as error:
        raise PromptsError(f"{place}, line {reader.line_num}: not CSV ({error}); check its quotes") from error
    if not rows:
        return []
    (_, header), *content = rows
    columns = [name.strip() for name in header]
    if "label" not in columns and len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        raise PromptsError(f"{place}: no column 'label' in {columns[0]!r}; separate its columns by commas")
    _check_columns(columns, place)
    for line, row in content:
        if len(row) != len(columns):
            raise PromptsError(
                f"{place}, {line}: {len(row)} values, and the header has {len(columns)}; put a text with a comma "
                f"in double quotes ({_short(','.join(row))})"
            )
    return _entries_of(((line, dict(zip(columns, row, strict=True))) for line, row in content))


def _read_parquet(path: Path, place: str) -> list[Entry]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if table.num_rows:
        _check_columns(table.column_names, place)
    wanted = [name for name in ("label", "prompt") if name in table.column_names]
    return _entries_of((f"row {row}", values) for row, values in enumerate(table.select(wanted).to_pylist()))


def _check_columns(columns: Sequence[str], place: str) -> None:
    """Refuse columns without ``label``, twice the same one, and one that is nearly called ``label`` or ``prompt``."""
    if "label" not in columns:
        raise PromptsError(f"{place}: no column 'label'; its columns are {', '.join(columns)}")
    for name in columns:
        wanted = name.strip().lower().removesuffix("s")
        if wanted in ("label", "prompt") and (name != wanted or columns.count(name) > 1):
            what = "stands there twice" if name == wanted else f"is not read; call it {wanted!r}, or take it out"
            raise PromptsError(f"{place}: the column {name!r} {what}")
    others = [name for name in columns if name not in ("label", "prompt")]
    if others and "prompt" not in columns:
        log.warning("%s: only 'label' is read, not %s; prompts have a column 'prompt'", place, ", ".join(others))


def _entries_of(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Entry]:
    entries = []
    for place, row in rows:
        prompts = row.get("prompt")
        if prompts is None or prompts in ("", []):
            prompts = [None]
        entries += [
            Entry(row["label"], prompt, place) for prompt in (prompts if isinstance(prompts, list) else [prompts])
        ]
    return entries


# Readers by the ending of the file. Each takes the file and its name in messages, and returns labels with prompts.
READERS: dict[str, Callable[[Path, str], list[Entry]]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
}
