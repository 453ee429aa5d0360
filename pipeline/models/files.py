"""The files of a checkpoint's folder: JSON, read with errors that name it, and the names of the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError, PipelineError
from pipeline.core.records import PreprocessSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
# In the order in which open_clip takes them.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", WEIGHTS)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Content of a checkpoint besides its model: ``values`` of its config, and digests of its ``weights``."""

    folder: Path
    spec: PreprocessSpec
    values: dict[str, Any]
    weights: dict[str, str]


def check_side(name: str, spec: PreprocessSpec, side: int) -> None:
    """Hold the preprocessing against the side of the pictures that a model takes.

    Raises:
        ModelError: it gives others.
    """
    if spec.size != (side, side):
        raise ModelError(
            f"{name}: the preprocessor makes pictures of {spec.size[0]} x {spec.size[1]} pixels, "
            f"the model takes {side} x {side}; config.json and preprocessor_config.json belong to different checkpoints"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, in UTF-8 without a byte order mark, as transformers reads it.

    Raises:
        ModelError: it is none.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); save it as UTF-8"
        ) from error
    if text.startswith("\ufeff"):
        raise ModelError(f"{path}: begins with a byte order mark, which JSON does not allow; save it as UTF-8 without")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON object: {error}; copy it from the original checkpoint") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object: it holds a {type(values).__name__}")
    return values


@contextmanager
def guarded(folder: Path, what: str) -> Iterator[None]:
    """Turn any error of a library that reads a checkpoint into one that names the file, or else the folder.

    Raises:
        ModelError: ``what`` and the first line of the error; or the JSON file that is none.
    """
    try:
        yield
    except PipelineError:
        raise
    # Libraries raise anything for values that they do not expect.
    except Exception as error:
        for path in sorted(folder.glob("*.json")):
            read_json(path)
        raise ModelError(f"{folder}: {what} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The type and the beginning of an error's message, on one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:200]}{'...' if len(text) > 200 else ''}" if text else name


def loaded_weights(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: ``model.safetensors``, or the shards that its index names.

    Raises:
        ModelError: there are none, or one that the index names is not there.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if not others or not (folder / INDEX).is_file():
        found = f", only {', '.join(others[:3])}, which transformers does not load" if others else ""
        raise ModelError(
            f"{folder}: no *.safetensors in the layout of transformers ({WEIGHTS}, or {INDEX} and its shards){found}; "
            "other formats can run code when they are loaded. Choose a revision that has them (model.revision=...), or "
            "convert the checkpoint with save_pretrained()"
        )
    names = shards_of(folder)
    foreign = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if foreign or not names:
        raise ModelError(
            f"{folder / INDEX}: names {', '.join(foreign[:3]) or 'no file'}; only *.safetensors files in the same "
            "folder are read, since other formats can run code when they are loaded"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(names)} files of the weights are missing: {', '.join(missing[:3])}, "
            f"which {INDEX} names; download the checkpoint again, or copy them here"
        )
    return [folder / name for name in names]


def is_open_clip(folder: Path) -> bool:
    """True for a checkpoint in open_clip's form, which none in that of transformers stands beside.

    Repositories of timm have a ``config.json`` of its own, without ``model_type``.
    """
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return False
    weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    return not weights or not (folder / CONFIG).is_file() or "model_type" not in read_json(folder / CONFIG)


def open_clip_weights(folder: Path) -> Path:
    """The safetensors file that open_clip loads.

    Raises:
        ModelError: there is none; with the way to make one of a pickle.
    """
    for name in OPEN_CLIP_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    wanted = folder / OPEN_CLIP_WEIGHTS[0]
    pickles = [path for ending in ("bin", "pt", "pth") for path in sorted(folder.glob(f"*.{ending}"))]
    if not pickles:
        raise ModelError(f"{folder}: no {wanted.name} beside {OPEN_CLIP_CONFIG}; download it again, or copy it here")
    raise ModelError(
        f"{folder}: no {wanted.name}, only {pickles[0].name}, a pickle, which can run code when it is loaded. Convert "
        f'it once, without running code in it: python -c "import torch, safetensors.torch as s; w = torch.load('
        f"{str(pickles[0])!r}, map_location='cpu', weights_only=True); w = w.get('state_dict', w); "
        f's.save_file({{k: v.contiguous().clone() for k, v in w.items()}}, {str(wanted)!r})"'
    )


def shards_of(folder: Path) -> list[str]:
    """The names of the files of sharded weights, as their index has them; empty where there is no index.

    Raises:
        ModelError: the index cannot be read.
    """
    path = folder / INDEX
    if not path.is_file():
        return []
    try:
        return sorted({str(name) for name in read_json(path)["weight_map"].values()})
    except (ModelError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: not an index of weights: {error}") from error


def explain_other_layout(folder: Path) -> str:
    """The name and the way out of a folder without ``config.json``, where its layout is another library's."""
    if (folder / "modules.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        clip = next((name for name in inner if "clip" in name.lower()), None)
        way_out = f"give its CLIP, model.name={folder / clip}" if clip else "give the folder of the CLIP within it"
        return f"this is a folder of sentence-transformers; {way_out}"
    if any((folder / name).is_file() for name in (*OPEN_CLIP_WEIGHTS[:2], "open_clip_pytorch_model.bin")):
        return f"this is a checkpoint of open_clip without its {OPEN_CLIP_CONFIG}; copy it from the original one"
    return ""


def is_number(value: object) -> bool:
    """True for a finite int or float, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
