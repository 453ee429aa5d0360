"""Exported towers: from the store, or exported, compared with fp32, and then published."""

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
from pipeline.backends.compare import compare, from_json, hold, to_json
from pipeline.config.schema import ParityConfig
from pipeline.core.errors import BackendUnavailable, install_hint
from pipeline.core.records import Parity, Sample
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import Normaliser

# Part of the recipe: raise it when the same checkpoint would give another graph.
VERSION = "1"
# Batch sizes of the comparison with fp32.
BATCH_SIZES = (1, 2, 7, 64)
REFERENCE_BATCH = 16
ONNX_PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
# Texts of several lengths, for the comparison of text towers.
TEXTS = ("a cat", "a photo of a dog", "two red circles and a blue square on a table", "猫", "", "the quick brown fox")
Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphOptions:
    """Options of a tower's graph: ``precision`` is fp32, fp16 or int8; ``quantization`` is dynamic or static for int8.

    ``fused`` graphs contain operators of ONNX Runtime only. Graphs in fp16 that are not fused keep LayerNorm in fp32.
    """

    tower: str = "image"
    precision: str = "fp32"
    fused: bool = True
    quantization: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ExportedTower:
    """Exported tower to compare: ``run`` maps its inputs to embeddings, ``title`` is its name in messages."""

    run: Run
    tower: str
    precision: str
    title: str


def onnx_graph(
    checkpoint: Checkpoint,
    options: GraphOptions,
    store: ArtifactStore,
    *,
    sample: Callable[[], Sample],
    limits: ParityConfig,
) -> Artifact:
    """Return the graph ``model.onnx`` of a tower, from the store or exported.

    An image tower is compared with fp32 on ``sample()``, and calibrated on it for static quantization.

    Raises:
        BackendUnavailable: a package is missing.
        ArtifactError: the export failed, or an operator was not fused.
        ParityError: the graph is too far from fp32; it is not published.
    """
    need_packages()
    more = {}
    if options.quantization == "static":
        pixels = sample().half(0).pixels.contiguous()
        more["calibration"] = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    artifact = store.make(
        graph_recipe(checkpoint, options, **more),
        lambda folder: _build(folder, checkpoint, options, sample, limits),
    )
    hold_card(artifact, limits, precision=options.precision)
    return artifact


def graph_recipe(checkpoint: Checkpoint, options: GraphOptions, **more: str) -> Recipe:
    """Return the recipe of the graph of a tower; ``more`` are options of one that is calibrated on images."""
    details = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    return recipe(f"onnx-{options.tower}", checkpoint, {**details, **more}, ONNX_PACKAGES)


def hold_card(artifact: Artifact, limits: ParityConfig, *, precision: str) -> None:
    """Check the parity figures of the card against the current limits, which may differ from those of the export.

    Raises:
        ParityError: a figure misses its limit.
    """
    what = f"{artifact.path} of {artifact.card['model']['name']}"
    hold(from_json(artifact.card["parity"]), limits, precision=precision, what=what)


def recipe(kind: str, checkpoint: Checkpoint, options: Mapping[str, Any], packages: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe of an artefact of ``checkpoint``."""
    return Recipe(
        kind=kind,
        model={"name": checkpoint.name, "revision": checkpoint.revision, "fingerprint": checkpoint.fingerprint},
        options=options,
        versions={"export": VERSION, **{name: _version(name) for name in ("torch", "transformers", *packages)}},
    )


def check_parity(
    exported: ExportedTower, checkpoint: Checkpoint, *, sample: Callable[[], Sample], limits: ParityConfig
) -> Parity:
    """Compare an exported tower with the checkpoint at every size of ``BATCH_SIZES``; returns the figures of all sizes.

    Raises:
        ParityError: a figure misses its limit at one of the sizes.
    """
    most = max(BATCH_SIZES)
    if exported.tower == "image":
        images = sample()
        rows = torch.arange(most) % len(images.ids)
        ids = [images.ids[row] for row in rows]
        inputs = {"pixel_values": Normaliser(checkpoint.spec, images.pixels.device)(images.pixels[rows])}
    else:
        ids = [f"{TEXTS[i % len(TEXTS)]!r}" for i in range(most)]
        tokens = checkpoint.tokenize([TEXTS[i % len(TEXTS)] for i in range(most)])
        mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": mask}
    module = checkpoint.tower(exported.tower)
    with torch.inference_mode():
        pieces = [
            module(**{k: v[i : i + REFERENCE_BATCH] for k, v in inputs.items()})
            for i in range(0, most, REFERENCE_BATCH)
        ]
    reference = torch.cat(pieces)
    vectors, owners = [], list[int]()
    for size in BATCH_SIZES:
        batch = {name: value[:size].contiguous().numpy() for name, value in inputs.items()}
        found = torch.from_numpy(exported.run(batch))
        parity = compare(found, reference[:size], ids=ids[:size], bank=None)
        hold(parity, limits, precision=exported.precision, what=f"{exported.title}, batches of {size}")
        vectors.append(found)
        owners += range(size)
    return compare(torch.cat(vectors), reference[owners], ids=[ids[i] for i in owners], bank=None)


def need_packages(*packages: str, extra: str = "onnx") -> None:
    """Check that ``packages``, or those of the extra ``onnx``, are installed.

    Raises:
        BackendUnavailable: with the command that installs them.
    """
    missing = [name for name in packages or ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"not installed: {', '.join(missing)}; {install_hint(extra)}")


def session(path: Path) -> Any:
    """Open an ONNX Runtime session on the CPU for any batch size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _build(
    folder: Path, checkpoint: Checkpoint, options: GraphOptions, sample: Callable[[], Sample], limits: ParityConfig
) -> dict[str, Any]:
    started = time.perf_counter()
    path = folder / onnx_export.GRAPH
    title = (
        f"{checkpoint.name}, {options.tower} tower in ONNX {options.precision} {options.quantization or ''}".rstrip()
    )
    log.info("exporting %s; later runs load it from the store", title)
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
    names = [value.name for value in opened.get_inputs()]

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        outputs = opened.run([onnx_export.OUTPUTS[options.tower]], {name: inputs[name] for name in names})
        return np.asarray(outputs[0])

    parity = check_parity(
        ExportedTower(run, options.tower, options.precision, title),
        checkpoint,
        # Not on the half that the graph was calibrated on.
        sample=(lambda: sample().half(1)) if static else sample,
        limits=limits,
    )
    facts = {
        "inputs": {value.name: [str(axis) for axis in value.shape] for value in opened.get_inputs()},
        "outputs": {value.name: [str(axis) for axis in value.shape] for value in opened.get_outputs()},
        "operators": onnx_export.operators(path),
        "batch_sizes": list(BATCH_SIZES),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return {"parity": to_json(parity), "facts": facts}


def _export(path: Path, checkpoint: Checkpoint, options: GraphOptions) -> None:
    onnx_export.export_tower(checkpoint, options.tower, path)
    if options.fused:
        # Static scales need separate products, and ONNX Runtime's int8 attention silently ignores the causal mask of
        # texts. In both cases attention is not fused.
        attention = options.precision != "int8" or (options.quantization == "dynamic" and options.tower == "image")
        onnx_export.fuse(checkpoint, options.tower, path, attention=attention)


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


def _version(package: str) -> str:
    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
