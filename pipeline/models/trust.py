"""Refuse checkpoints that name code or pickles, before a library reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError

# transformers downloads a value with a slash from the hub as a kernel, and runs it.
_KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")


def check_config(path: Path, values: Any) -> None:
    """Refuse a ``config.json`` that names code, except ``auto_map``, which is never followed.

    Raises:
        ModelError: with the key.
    """
    for key, value in _texts("", values):
        if "/" in value and any(part in _KERNELS for part in key.split(".")):
            raise ModelError(
                f"{path}: {key}={value!r} names code on the hub, and no code of a checkpoint is run; take the entry "
                "out of a copy of the checkpoint, and give its folder as model.name"
            )


def check_weights(folder: Path, weights: list[Path]) -> None:
    """Refuse an index of weights that names other files than the safetensors files of the folder.

    Raises:
        ModelError: the index names another file, or cannot be read.
    """
    names = {path.name for path in weights}
    for path in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(path.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: not an index of weights: {error!r}") from error
        if not named <= names:
            raise ModelError(
                f"{path}: names {', '.join(sorted(map(str, named - names))[:3])}; only *.safetensors files in the same "
                "folder are read, since other formats can run code when they are loaded"
            )


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(f"{key}.{name}" if key else str(name), one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(key, one)
    elif isinstance(value, str):
        yield key, value
