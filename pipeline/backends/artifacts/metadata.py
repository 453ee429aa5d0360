"""Card of an artefact (``card.json``): its recipe and files, and the checks of both."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.backends.artifacts.directories import contents
from pipeline.core.errors import ArtifactError
from pipeline.storage.base import sha256

CARD = "card.json"
# Part of every fingerprint: raise it on a change after which earlier cards are no longer valid.
LAYOUT = 1
# Keys of a card that the store writes, and their types.
SHAPE: dict[str, type] = {
    "layout": int,
    "fingerprint": str,
    "kind": str,
    "model": dict,
    "options": dict,
    "versions": dict,
    "files": dict,
    "size": int,
    "created": str,
    "gates": dict,
    "digest": str,
}


def fingerprint_of(
    *, kind: str, model: Mapping[str, Any], options: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """Return the SHA-256, in hex, of the recipe in canonical JSON; of the model, only fingerprint and revision count.

    Raises:
        ArtifactError: the model has no fingerprint, or something is not plain JSON.
    """
    if not model.get("fingerprint"):
        raise ArtifactError(f"{kind}: the recipe has no model fingerprint; a changed model would not be detected")
    counts = {"fingerprint": model["fingerprint"], "revision": model.get("revision")}
    parts = {"layout": LAYOUT, "kind": kind, "model": counts, "options": options, "versions": versions}
    return _digest(plain(parts, f"the recipe of {kind}"))


def plain(value: Any, what: str) -> Any:
    """Return a copy of ``value`` in JSON types; different values never give equal JSON.

    Raises:
        ArtifactError: it holds a key that is not text, a number that is not finite, or another type.
    """
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ArtifactError(f"{what}: the key {wrong[0]!r} is not text; a card holds plain JSON")
        return {str(key): plain(item, f"{what}, {key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, what) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise ArtifactError(f"{what}: {value!r} is not text, a number, a list or a mapping; a card holds plain JSON")


def new_card(origin: Mapping[str, Any], folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card of the files in ``folder``, with the four parts of the recipe and the ``facts`` of the export.

    Raises:
        ArtifactError: there are no files, or links among them, or the facts have reserved keys.
        OSError: a file cannot be read.
    """
    if taken := sorted(facts.keys() & SHAPE.keys()):
        raise ArtifactError(f"{origin['kind']}: the facts may not replace the card's own {', '.join(taken)}")
    sizes, odd = contents(folder)
    # Some file systems of macOS ignore case.
    odd += [f"{name}: the store writes the card itself" for name in sizes if name.lower() == CARD]
    if odd or not sizes:
        raise ArtifactError(f"{origin['kind']}: {'; '.join(odd) or 'the export wrote no file'}")
    card = {
        "layout": LAYOUT,
        "fingerprint": fingerprint_of(**origin),
        **plain(origin, "the recipe"),
        "files": {name: {"size": sizes[name], "sha256": sha256(folder / name)} for name in sorted(sizes)},
        "size": sum(sizes.values()),
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        **plain(facts, "the facts"),
        "gates": {},
    }
    return sealed(card)


def sealed(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card with a digest of its contents, so that a later change is detected."""
    body = {key: value for key, value in card.items() if key != "digest"}
    return {**body, "digest": _digest(body)}


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write a card and flush it to disk; raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(card, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_card(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the card of a folder and its problems; the card is empty if it cannot be used."""
    path = folder / CARD
    try:
        # A link is not followed, and reading a pipe would block.
        if folder.is_symlink() or not folder.is_dir():
            return {}, [f"{folder.name}: not a folder of the store"]
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return {}, [f"{CARD}: not a plain file"]
        card = json.loads(path.read_bytes())
        if wrong := _schema_problem(card):
            return {}, [f"{CARD}: {wrong}"]
        return card, _recipe_problems(folder, card)
    except FileNotFoundError:
        return {}, [f"{CARD}: missing"]
    except OSError as error:
        return {}, [f"{CARD}: {error.strerror or error}"]
    except (ValueError, RecursionError):
        return {}, [f"{CARD}: not JSON, or nested too deeply"]


def inspect(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the card of a folder, and all problems of the card and of the files, including their digests."""
    card, problems = read_card(folder)
    if not card:
        return card, problems
    try:
        sizes, odd = contents(folder)
    except OSError as error:
        return card, [*problems, f"{error.filename}: {error.strerror or error}"]
    problems += odd
    for name, entry in card["files"].items():
        if wrong := _file_problem(folder, name, entry, sizes):
            problems.append(f"{name}: {wrong}")
    problems += [f"{name}: the card names no such file" for name in sorted(sizes.keys() - card["files"] - {CARD})]
    return card, problems


def is_inside(name: str) -> bool:
    """Return True if a name in a card is that of a file below the card's folder."""
    path = PurePosixPath(name)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts and name not in (".", CARD)


def _file_problem(folder: Path, name: str, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    if not is_inside(name):
        return "a name that leaves the folder"
    # Only files that were listed without following links are opened.
    if name not in sizes:
        return "missing"
    if sizes[name] != entry["size"]:
        return f"{sizes[name]:,} bytes, expected {entry['size']:,}"
    try:
        return "" if sha256(folder / name) == entry["sha256"] else "its content changed since the export"
    except OSError as error:
        return error.strerror or str(error)


def _schema_problem(card: Any) -> str:
    if not isinstance(card, dict):
        return "not a JSON object"
    for key, kind in SHAPE.items():
        if not isinstance(card.get(key), kind):
            return f"{key} is {card.get(key)!r:.40}" if key in card else f"no {key}"
    for name, entry in card["files"].items():
        good = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        if not good:
            return f"the entry of {name} is {entry!r:.40}"
    return ""


def _recipe_problems(folder: Path, card: Mapping[str, Any]) -> list[str]:
    problems = []
    try:
        fingerprint = fingerprint_of(**{key: card[key] for key in ("kind", "model", "options", "versions")})
    except ArtifactError:
        fingerprint = ""
    if not fingerprint == card["fingerprint"] == folder.name:
        problems.append(f"{CARD}: another recipe than that of the folder's name")
    if sealed(card)["digest"] != card["digest"]:
        problems.append(f"{CARD}: changed since it was written")
    return problems


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
