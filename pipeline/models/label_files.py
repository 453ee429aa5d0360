"""Labels and their prompts, from the config or from a YAML, CSV or Parquet file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pipeline.config.schema import PromptsConfig
from pipeline.core.errors import PromptsError
from pipeline.storage.urls import from_here

# A label and one of its prompts, or None for the templates, as a file holds them.
Pair: TypeAlias = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Distinct names, each with the prompts whose features are averaged."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]


def read_labels(config: PromptsConfig) -> LabelSet:
    """The label set of a config; empty where it names none.

    A YAML file holds a list of labels, or a mapping from a label to its prompt or prompts. A CSV or
    Parquet file has a column ``label`` and, if wanted, a column ``prompt``; several rows of one label are
    averaged. A label without prompts of its own takes every template.

    Raises:
        PromptsError: the file cannot be read, or a label is empty or not text.
    """
    if config.path is None:
        pairs: list[Pair] = [(name, None) for name in config.labels]
        place = "prompts.labels"
    else:
        place = f"prompts.path={config.path}"
        pairs = _read_pairs(Path(config.path).expanduser(), place)
    collected: dict[str, list[str]] = {}
    for number, (name, prompt) in enumerate(pairs, start=1):
        if not isinstance(name, str) or not name.strip() or not is_text(name):
            raise PromptsError(
                f"{place}: label {number} is {name!r}; labels are texts (in YAML, quote yes, no and numbers)"
            )
        prompts = collected.setdefault(name, [])
        if prompt is None:
            if prompts:
                raise PromptsError(f"{place}: the label {name!r} stands there twice; take one out")
            prompts += [template.replace("{}", name) for template in config.templates]
        elif isinstance(prompt, str) and prompt.strip() and is_text(prompt):
            prompts.append(prompt)
        else:
            raise PromptsError(f"{place}: the prompt of {name!r} is {prompt!r}; prompts are texts")
    if config.path is not None and not collected:
        raise PromptsError(f"{place}: the file holds no labels")
    return LabelSet(names=tuple(collected), prompts=tuple(map(tuple, collected.values())))


def is_text(text: str) -> bool:
    """True if the text can be encoded as UTF-8, unlike a string with half a character of a terminal or a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_pairs(path: Path, place: str) -> list[Pair]:
    if not path.is_file():
        raise PromptsError(f"{place}: no such file{from_here(str(path))}")
    *others, last = READERS
    if path.suffix.lower() not in READERS:
        raise PromptsError(f"{place}: wanted a file that ends in {', '.join(others)} or {last}")
    try:
        return READERS[path.suffix.lower()](path, place)
    except (OSError, ValueError, csv.Error) as error:
        raise PromptsError(f"{place}: {error}") from error


def _read_yaml(path: Path, place: str) -> list[Pair]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PromptsError(f"{place}: not YAML: {error}") from error
    if isinstance(content, list):
        return [(name, None) for name in content]
    if isinstance(content, dict):
        return [
            (name, prompt)
            for name, value in content.items()
            for prompt in (value if isinstance(value, list) and value else [value])
        ]
    raise PromptsError(f"{place}: wanted a list of labels, or a mapping from labels to prompts")


def _read_csv(path: Path, place: str) -> list[Pair]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    return _pairs_of(rows, list(rows[0]) if rows else [], place)


def _read_parquet(path: Path, place: str) -> list[Pair]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return _pairs_of(table.to_pylist(), table.column_names, place)


def _pairs_of(rows: list[dict[str, Any]], columns: Sequence[str], place: str) -> list[Pair]:
    if rows and "label" not in columns:
        raise PromptsError(f"{place}: no column 'label'; its columns are {', '.join(columns)}")
    return [(row.get("label"), row.get("prompt") or None) for row in rows]


# Readers by the ending of the file. Each takes the file and its name in messages, and returns labels with prompts.
READERS: dict[str, Callable[[Path, str], list[Pair]]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
}
