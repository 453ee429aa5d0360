"""Exported towers: found in the store, or made, compared with fp32, and only then published."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backends.artifacts import onnx_export, quantize
from pipeline.backends.artifacts.store import Artifact, ArtifactStore, Recipe
from pipeline.backends.compare import compare, from_json, hold
from pipeline.config.schema import ParityConfig
from pipeline.core.errors import BackendUnavailable, install_hint
from pipeline.core.records import Parity, Sample
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower, Normaliser, TextTower

# Part of the recipe: raise it when the same checkpoint would come out as another graph.
VERSION = "1"
# An export must hold at each of these.
BATCH_SIZES = (1, 2, 7, 64)
REFERENCE_BATCH = 16
ONNX_PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
# Texts of several lengths, for the comparison of text towers.
TEXTS = ("a cat", "a photo of a dog", "two red circles and a blue square on a table", "猫", "", "the quick brown fox")
Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphOptions:
    """Which graph of a tower: ``precision`` fp32, fp16 or int8, and how int8 scales its activations.

    ``fused`` graphs hold operators that only ONNX Runtime knows. Plain fp16 graphs keep LayerNorm in fp32.
    """

    tower: str = "image"
    precision: str = "fp32"
    fused: bool = True
    quantization: str | None = None


def onnx_graph(
    checkpoint: Checkpoint,
    options: GraphOptions,
    store: ArtifactStore,
    *,
    sample: Callable[[], Sample],
    limits: ParityConfig,
) -> Artifact:
    """The graph ``model.onnx`` of a tower, from the store or exported now.

    An image tower is compared with fp32 on ``sample()``, and calibrated on it if its scales are static.

    Raises:
        BackendUnavailable: a package is missing.
        ArtifactError: the export failed, or an operator was not fused.
        ParityError: the graph is too far from fp32; nothing is published.
    """
    need_packages()
    details: dict[str, Any] = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    if options.quantization == "static":
        pixels = sample().half(0).pixels.contiguous()
        details["calibration"] = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    artifact = store.make(
        recipe(f"onnx-{options.tower}", checkpoint, details, ONNX_PACKAGES),
        lambda folder: _build(folder, checkpoint, options, sample, limits),
    )
    hold_card(artifact, limits, precision=options.precision)
    return artifact


def hold_card(artifact: Artifact, limits: ParityConfig, *, precision: str) -> None:
    """Pass if the figures on the card are within today's limits: it may have been made under others.

    Raises:
        ParityError: they are not.
    """
    what = f"{artifact.path} of {artifact.card['model']['name']}"
    hold(from_json(artifact.card["parity"]), limits, precision=precision, what=what)


def recipe(kind: str, checkpoint: Checkpoint, options: Mapping[str, Any], packages: tuple[str, ...] = ()) -> Recipe:
    """What an artefact of ``checkpoint`` follows from."""
    return Recipe(
        kind=kind,
        model={"name": checkpoint.name, "revision": checkpoint.revision, "fingerprint": checkpoint.fingerprint},
        options=options,
        versions={"export": VERSION, **{name: _version(name) for name in ("torch", "transformers", *packages)}},
    )


def check_parity(
    run: Run,
    checkpoint: Checkpoint,
    *,
    tower: str,
    precision: str,
    sample: Callable[[], Sample],
    limits: ParityConfig,
    what: str,
) -> Parity:
    """Compare an exported tower with the checkpoint's at every size of ``BATCH_SIZES``; the figures of all sizes.

    Raises:
        ParityError: a figure misses its limit at one of the sizes.
    """
    most = max(BATCH_SIZES)
    if tower == "image":
        pictures = sample()
        rows = torch.arange(most) % len(pictures.ids)
        ids = [pictures.ids[row] for row in rows]
        inputs = {"pixel_values": Normaliser(checkpoint.spec, pictures.pixels.device)(pictures.pixels[rows])}
        module: torch.nn.Module = ImageTower(checkpoint)
    else:
        ids = [f"{TEXTS[i % len(TEXTS)]!r}" for i in range(most)]
        tokens = checkpoint.tokenize([TEXTS[i % len(TEXTS)] for i in range(most)])
        mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": mask}
        module = TextTower(checkpoint)
    with torch.inference_mode():
        pieces = [
            module(**{k: v[i : i + REFERENCE_BATCH] for k, v in inputs.items()})
            for i in range(0, most, REFERENCE_BATCH)
        ]
    reference = torch.cat(pieces)
    vectors, owners = [], list[int]()
    for size in BATCH_SIZES:
        found = torch.from_numpy(run({name: value[:size].contiguous().numpy() for name, value in inputs.items()}))
        parity = compare(found, reference[:size], ids=ids[:size], bank=None)
        hold(parity, limits, precision=precision, what=f"{what}, batches of {size}")
        vectors.append(found)
        owners += range(size)
    return compare(torch.cat(vectors), reference[owners], ids=[ids[i] for i in owners], bank=None)


def need_packages(*packages: str, extra: str = "onnx") -> None:
    """Pass if ``packages``, or those of the extra ``onnx``, can be imported.

    Raises:
        BackendUnavailable: with what to install.
    """
    missing = [name for name in packages or ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"not installed: {', '.join(missing)}; {install_hint(extra)}")


def session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU for any batch size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _build(
    folder: Path, checkpoint: Checkpoint, options: GraphOptions, sample: Callable[[], Sample], limits: ParityConfig
) -> dict[str, Any]:
    started = time.perf_counter()
    path = folder / onnx_export.GRAPH
    what = f"{checkpoint.name}, {options.tower} tower in ONNX {options.precision} {options.quantization or ''}".rstrip()
    log.info("exporting %s; once, then it comes from the store", what)
    static = options.quantization == "static"
    if options.precision == "fp32":
        _export(path, checkpoint, options)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            source = Path(temporary) / onnx_export.GRAPH
            _export(source, checkpoint, options)
            _convert(source, path, checkpoint, options, sample)
    onnx_export.check_graph(path, options.tower)
    opened = session(path)
    parity = check_parity(
        lambda inputs: opened.run([onnx_export.OUTPUTS[options.tower]], _known(opened, inputs))[0],
        checkpoint,
        tower=options.tower,
        precision=options.precision,
        # What a graph was calibrated on says little about it.
        sample=(lambda: sample().half(1)) if static else sample,
        limits=limits,
        what=what,
    )
    facts = {
        "inputs": {value.name: [str(axis) for axis in value.shape] for value in opened.get_inputs()},
        "outputs": {value.name: [str(axis) for axis in value.shape] for value in opened.get_outputs()},
        "operators": onnx_export.operators(path),
        "batch_sizes": list(BATCH_SIZES),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return {"parity": dataclasses.asdict(parity), "facts": facts}


def _export(path: Path, checkpoint: Checkpoint, options: GraphOptions) -> None:
    onnx_export.export_tower(checkpoint, options.tower, path)
    if options.fused:
        # Fixed scales belong to single products; and ONNX Runtime's int8 attention drops the causal mask of texts
        # without a word. In both cases attention stays in its parts.
        whole = options.precision != "int8" or (options.quantization == "dynamic" and options.tower == "image")
        onnx_export.fuse(checkpoint, options.tower, path, attention=whole)


def _convert(
    source: Path, path: Path, checkpoint: Checkpoint, options: GraphOptions, sample: Callable[[], Sample]
) -> None:
    if options.precision == "fp16":
        quantize.to_fp16(source, path, fp32_norms=not options.fused)
    elif options.quantization == "static":
        pixels = sample().half(0).pixels
        quantize.to_static_int8(source, path, Normaliser(checkpoint.spec, pixels.device)(pixels).numpy())
    else:
        quantize.to_dynamic_int8(source, path)


def _known(opened: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {value.name: inputs[value.name] for value in opened.get_inputs()}


def _version(package: str) -> str:
    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
