"""Refuse checkpoints that name code or pickles, before a library reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError

# transformers downloads a value with a slash from the hub as a kernel, and runs it.
_KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")

# The ways of attention that PyTorch has on every device.
_ATTENTION = ("eager", "sdpa")
# Keys with which transformers reads other files, or weights that are packed.
_LOADING = ("quantization_config", "compression_config", "transformers_weights", "adapter_config")


def check_config(path: Path, values: Any) -> None:
    """Refuse a ``config.json`` that names code, except ``auto_map``, which is never followed; or another way to load.

    Raises:
        ModelError: with the key.
    """
    for place, settings in (("", values), *((f"{key}.", one) for key, one in values.items() if isinstance(one, dict))):
        for key in _LOADING:
            if settings.get(key) is not None:
                method = settings[key].get("quant_method") if isinstance(settings[key], dict) else settings[key]
                raise ModelError(
                    f"{path}: {place}{key} asks for weights that are loaded in another way ({method}); only plain "
                    "weights in safetensors are read here: take the checkpoint without it (backend=torch_int8 and "
                    "others quantise it here)"
                )
    for key, value in _texts("", values):
        if any(part in _KERNELS for part in key.split(".")) and "/" not in value and value not in _ATTENTION:
            raise ModelError(
                f"{path}: {key}={value!r} asks for a way of attention that needs other packages or a GPU; take the "
                f"entry out of a copy of the checkpoint, or set it to {' or '.join(_ATTENTION)}"
            )
        if "/" in value and any(part in _KERNELS for part in key.split(".")):
            raise ModelError(
                f"{path}: {key}={value!r} names code on the hub, and no code of a checkpoint is run; take the entry "
                "out of a copy of the checkpoint, and give its folder as model.name"
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
