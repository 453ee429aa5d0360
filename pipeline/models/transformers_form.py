"""Checkpoints in the layout of transformers, by the ``model_type`` of their config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from pipeline.config.schema import ModelConfig
from pipeline.core.concurrency import aside
from pipeline.core.errors import ModelError
from pipeline.core.log_format import silence
from pipeline.models import dual, vision
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.config_check import open_config
from pipeline.models.files import CONFIG, CheckpointFiles, explain_other_layout, guarded, loaded_weights, read_json
from pipeline.models.hub import DEMO_FOLDER, find_weights
from pipeline.models.other_forms import model_folder, nearest
from pipeline.models.preprocessor import read_spec, to_spec
from pipeline.models.record import Checkpoint
from pipeline.models.trust import check_config
from pipeline.models.weights import PLAIN, check_tensors, load_model
from pipeline.storage.base import sha256

# Values of model_type that open.
KNOWN = (*dual.FAMILIES, *vision.FAMILIES)
# The imports of transformers for loading a model log messages as well.
silence()


def open_folder(config: ModelConfig, folder: Path) -> Checkpoint:
    """Open the checkpoint in ``folder``, with its weights or with random ones.

    Raises:
        ModelError: of a family that is not supported, or a file of it is missing, damaged, or another checkpoint's.
    """
    folder = model_folder(folder, KNOWN)
    values, settings = _read_config(folder)
    spec = read_spec(folder, settings.model_type)
    if config.weights == "random":
        return _open_random(config, settings, CheckpointFiles(folder, spec, values, {"random": str(config.seed)}))
    place = find_weights(config, folder)
    weights = loaded_weights(place)
    tensors = check_tensors(weights)
    # A core reads the files while another one makes the model of them.
    digests = aside(lambda: {path.name: sha256(path) for path in weights}, name="digests")
    alone = settings.model_type in vision.FAMILIES
    model = load_model(folder, place, vision.build_of(settings, tensors) if alone else PLAIN)
    return _assemble(config, model, CheckpointFiles(folder, spec, values, digests.result()))


def open_known(config: ModelConfig) -> Checkpoint:
    """Open a model of :data:`ARCHITECTURES` with random weights."""
    values, preprocessor = ARCHITECTURES[config.name]
    settings = AutoConfig.for_model(**values)
    spec = to_spec(preprocessor, settings.model_type, config.name)
    # The demo's tokenizer saves a download: the features of random weights have no meaning.
    return _open_random(config, settings, CheckpointFiles(DEMO_FOLDER, spec, values, {"random": str(config.seed)}))


def _open_random(config: ModelConfig, settings: Any, read: CheckpointFiles) -> Checkpoint:
    build = PLAIN
    if settings.model_type in vision.FAMILIES:
        build = vision.build_of(settings, None)
    else:
        dual.take_token_ids(settings, read.folder)
    with torch.random.fork_rng(devices=[]), guarded(read.folder, "no model can be built from its config"):
        torch.manual_seed(config.seed)
        model = build(settings)
    return _assemble(config, model, read)


def _assemble(config: ModelConfig, model: Any, read: CheckpointFiles) -> Checkpoint:
    model.eval().requires_grad_(False)
    assemble = vision.assemble if model.config.model_type in vision.FAMILIES else dual.assemble
    return assemble(config, model, read)


def _read_config(folder: Path) -> tuple[dict[str, Any], Any]:
    """The values of ``config.json``, and the config that transformers makes of them."""
    path = folder / CONFIG
    other = explain_other_layout(folder)
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint{other and '; '}{other}")
    values = read_json(path)
    family = values.get("model_type")
    if family == "siglip2":
        raise ModelError(
            f"{folder}: model_type 'siglip2' is SigLIP 2's NaFlex variant, which gives every picture its own number of "
            "patches, and batches here have one shape; take SigLIP 2 at a fixed resolution, such as "
            "google/siglip2-base-patch16-224 or google/siglip2-so400m-patch16-256"
        )
    if not isinstance(family, str) or family not in KNOWN:
        raise ModelError(
            f"{folder}: model_type {family!r} is not supported; supported are {', '.join(KNOWN)}"
            f"{nearest(family)}{other and '; '}{other}"
        )
    check_config(path, values)
    return values, open_config(path, values)
