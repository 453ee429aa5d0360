"""Model repository for ``tritonserver --model-repository``: one model for each tower, a client and its settings.

Triton reads every folder as a model, and every numbered folder of a model as a version; it ignores other files.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from pipeline.backends.artifacts.onnx_export import GRAPH
from pipeline.backends.artifacts.store import Artifact
from pipeline.backends.triton.model_config import (
    WARMUP,
    Graph,
    Serving,
    filled,
    model_config,
    place_of,
    problem_of,
    read_graph,
    slug,
)
from pipeline.backends.triton.pbtxt import to_text
from pipeline.config.schema import ImagesConfig
from pipeline.core.errors import ArtifactError, ConfigError
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.local import appearing
from pipeline.storage.urls import explained

VERSION = "1"
CONFIG = "config.pbtxt"
# Text lengths are rounded up to a multiple of this, so that texts of different lengths can share a batch.
MULTIPLE = 8
EXAMPLE = "a photo of a cat"


def write_repository(
    out: str, checkpoint: Checkpoint, artifacts: Mapping[str, Artifact], images: ImagesConfig, serving: Serving
) -> list[str]:
    """Write the model repository ``out`` atomically; returns the names of its models.

    Args:
        out: a local folder that does not exist yet.
        checkpoint: the model that was exported.
        artifacts: its ONNX graphs by tower, ``image`` or ``text``, already compared with fp32.
        images: the decoding settings of the job, for the client.
        serving: the serving settings of the models.

    Raises:
        ConfigError: ``out`` exists, or is not a local folder.
        ArtifactError: Triton cannot serve a graph, or the tokenizer is not from the library ``tokenizers``.
        StorageError: the folder cannot be written.
    """
    if problem := problem_of(out):
        raise ConfigError([problem])
    place = place_of(out)
    with explained(str(place)), appearing(place) as folder:
        models = {}
        for tower, artifact in artifacts.items():
            name = f"{slug(checkpoint.name)}_{tower}"
            models[tower] = _model(folder / name, checkpoint, artifact, serving)
            if tower == "text":
                _write_tokenizer(folder / name / "tokenizer.json", checkpoint)
        card = _card(checkpoint, models, images, serving)
        _write(folder / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        _write(folder / "README.md", readme(card))
        shutil.copyfile(Path(__file__).with_name("client.py"), folder / "client.py")
    return [model["name"] for model in models.values()]


def readme(card: Mapping[str, Any]) -> str:
    """Render the repository's README from the contents of ``card.json``."""
    loader = PackageLoader("pipeline.backends.triton", ".")
    # Markdown for people, not HTML.
    environment = Environment(loader=loader, trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("README.md.j2").render(card=card)


def _model(folder: Path, checkpoint: Checkpoint, artifact: Artifact, serving: Serving) -> dict[str, Any]:
    """Write one model; returns its entry in the card."""
    version = folder / VERSION
    version.mkdir(parents=True)
    for name in artifact.card["files"]:
        target = version / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.file(name), target)
    longest = checkpoint.max_tokens if checkpoint.text is not None else 0
    graph = read_graph(version / GRAPH, artifact.card["options"]["precision"], longest)
    config = model_config(
        folder.name,
        graph,
        serving,
        about={
            "model": checkpoint.name,
            "revision": checkpoint.revision or "",
            "artifact": artifact.fingerprint,
        },
    )
    _write(folder / CONFIG, to_text(config))
    _write_warmup(folder / WARMUP, checkpoint, graph)
    tensors = {side: [dataclasses.asdict(one) for one in getattr(graph, side)] for side in ("inputs", "outputs")}
    for one in (*tensors["inputs"], *tensors["outputs"]):
        one["data_type"] = one.pop("type")
    facts = {"precision": graph.precision, "ir": graph.ir, "opset": graph.opset, "artifact": artifact.fingerprint}
    return {"name": folder.name, **tensors, **facts, "parity": dict(artifact.card["parity"])}


def _write_warmup(folder: Path, checkpoint: Checkpoint, graph: Graph) -> None:
    """Write the rows of the warm-up request of a text model: a tokenized text, since zeros are not a valid one."""
    texts = [tensor for tensor in graph.inputs if len(tensor.dims) == 1]
    if not texts:
        return
    folder.mkdir()
    _, tokenizer = checkpoint.texts()
    ids = tokenizer([EXAMPLE])["input_ids"][0].numpy()
    for tensor in texts:
        row = np.full(filled(tensor, tokenizer.max_tokens), tokenizer.pad_id, dtype=np.int64)
        row[: len(ids)] = ids
        if tensor.name == "attention_mask":
            row = (np.arange(len(row)) < len(ids)).astype(np.int64)
        (folder / tensor.name).write_bytes(row.astype("<i8").tobytes())


def _write_tokenizer(path: Path, checkpoint: Checkpoint) -> None:
    from tokenizers import Tokenizer

    backend = checkpoint.texts()[1].backend()
    if backend is None:
        raise ArtifactError(
            f"{checkpoint.name}: its tokenizer is Python code, which a Triton client cannot run; "
            "take a checkpoint with a tokenizer.json, or export with --tower image"
        )
    # A copy: truncation and padding are state of the tokenizer.
    own = Tokenizer.from_str(backend.to_str())
    own.no_padding()
    own.enable_truncation(checkpoint.max_tokens)
    own.save(str(path))


def _card(
    checkpoint: Checkpoint, models: Mapping[str, dict[str, Any]], images: ImagesConfig, serving: Serving
) -> dict[str, Any]:
    """Return the contents of ``card.json``: preprocessing, tokens, scores, and the origin of the models."""
    spec = checkpoint.cropped(images.crop_corner)
    model = {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "family": checkpoint.family,
        "dim": checkpoint.dim,
        "fingerprint": checkpoint.fingerprint,
    }
    card: dict[str, Any] = {"model": model, "models": dict(models), "serving": dataclasses.asdict(serving)}
    if "image" in models:
        card["pictures"] = {
            "exif": images.exif,
            "transparency": images.transparency,
            "resize": spec.resize,
            "crop": spec.crop,
            "corner": spec.corner,
            "resample": Image.Resampling(spec.resample).name,
            "mean": spec.mean,
            "std": spec.std,
        }
    if "text" in models:
        _, tokenizer = checkpoint.texts()
        card["texts"] = {
            "tokenizer": f"{models['text']['name']}/tokenizer.json",
            "max_tokens": tokenizer.max_tokens,
            "multiple": tokenizer.max_tokens if tokenizer.padded else MULTIPLE,
            "pad_id": tokenizer.pad_id,
            "lowercase": tokenizer.lowered,
        }
    if checkpoint.scoring is not None:
        card["scores"] = {"function": checkpoint.scoring, "scale": checkpoint.scale, "bias": checkpoint.bias}
    return card


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
