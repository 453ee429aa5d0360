"""The rows of the table: all that exist, or those of ``--only``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.bench.records import Row
from pipeline.config.choices import BACKENDS
from pipeline.config.schema import nearest
from pipeline.config.validate import CHOICES
from pipeline.core.errors import Problem

# The mode of torch.compile that suits the device, which ``for_device`` puts in its place.
COMPILED = "compiled"
REFERENCE = Row("torch", "fp32")
ROWS = (
    REFERENCE,
    Row("torch", "fp32", COMPILED),
    Row("torch", "bf16"),
    Row("torch", "bf16", COMPILED),
    Row("torch", "fp16"),
    Row("torch", "fp16", COMPILED),
    Row("torchscript"),
    Row("torch_int8", "int8"),
    Row("torch_fp8", "fp8"),
    Row("onnx", "fp32"),
    Row("onnx", "fp16"),
    Row("onnx_int8", "int8", quantization="dynamic"),
    Row("onnx_int8", "int8", quantization="static"),
    Row("tensorrt", "fp16"),
)
BATCHES = {"cpu": (1, 8, 32, 64), "cuda": (1, 8, 32, 64, 128, 256)}


def read_only(text: str) -> tuple[list[Row], list[Problem]]:
    """The rows of ``--only``, and its problems.

    A backend alone stands for all its rows; words after it, in any order, choose one:
    ``torch:bf16:compiled``, ``torch:fp16:max-autotune``, ``onnx_int8:static``.
    """
    rows: list[Row] = []
    problems = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, *words = part.split(":")
        if name not in BACKENDS:
            allowed = f"must be one of {', '.join(BACKENDS)}"
            problems.append(Problem("--only", part, allowed, nearest(name, BACKENDS)))
            continue
        row, wrong = _read_words(name, words)
        if wrong:
            known = _words_of(name)
            problems.append(Problem("--only", part, f"backend {name} takes {', '.join(known)}", nearest(wrong, known)))
        rows += [row] if words else [row for row in ROWS if row.backend == name]
    if not rows and not problems:
        problems.append(Problem("--only", text, "must name at least one backend, such as torch:bf16,onnx_int8"))
    return list(dict.fromkeys(rows)), problems


def read_batches(text: str) -> tuple[list[int], list[Problem]]:
    """The batch sizes of ``--batches``, ascending, and its problems."""
    sizes, problems = set(), []
    for part in text.split(","):
        if part.strip().isdecimal() and 1 <= int(part) <= 65_536:
            sizes.add(int(part))
        else:
            problems.append(Problem("--batches", part, "must be whole numbers from 1 to 65536, such as 1,8,32"))
    return sorted(sizes), problems


def for_device(rows: Sequence[Row], device: str) -> list[Row]:
    """The rows as they are opened on ``cpu`` or ``cuda``, the reference first."""
    mode = "reduce-overhead" if device == "cuda" else "default"
    chosen = [replace(row, compile=mode) if row.compile == COMPILED else row for row in rows]
    return list(dict.fromkeys([REFERENCE, *chosen]))


def _read_words(name: str, words: list[str]) -> tuple[Row, str]:
    """The row, and the first word that is no option of the backend (or empty)."""
    precisions = BACKENDS[name].precisions
    row = Row(name, precisions[0] if len(precisions) == 1 else "auto")
    for word in words:
        if word not in _words_of(name):
            return row, word
        if word in precisions:
            row = replace(row, precision=word)
        elif word in CHOICES["backend.quantization"]:
            row = replace(row, quantization=word)
        else:
            row = replace(row, compile=word)
    return row, ""


def _words_of(name: str) -> list[str]:
    words = list(BACKENDS[name].precisions)
    if name == "torch":
        words += [COMPILED, *CHOICES["backend.compile"][1:]]
    if name == "onnx_int8":
        words += CHOICES["backend.quantization"]
    return words
