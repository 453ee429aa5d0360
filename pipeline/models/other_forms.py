"""Folders around a checkpoint, and checkpoints that do not open: what they are, and the nearest that does."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.errors import ModelError, install_hint
from pipeline.models.files import CONFIG, read_json

MODULES, ADAPTER = "modules.json", "adapter_config.json"
# Modules of sentence-transformers that are a model of transformers, and those that change no embedding of length 1.
_MODELS, _KEPT = ("CLIPModel", "Transformer"), ("Normalize",)
# Model types of transformers that do not open, and what to take in their place.
_CONVOLUTIONS = ("convnext", "convnextv2", "dinov3_convnext", "mobilenet_v2", "regnet", "resnet", "timm_wrapper")
_TOWERS = ("beit", "data2vec-vision", "deit", "hiera", "swin", "swinv2", "vit_mae", "vit_msn", *_CONVOLUTIONS)
_PAIRS = ("align", "blip", "blip-2", "clipseg", "clap", "flava", "groupvit", "owlv2", "owlvit", "xclip")
_TEXTS = ("bert", "clip_text_model", "distilbert", "mpnet", "roberta", "siglip_text_model", "xlm-roberta")
_NEAREST = {
    **dict.fromkeys(_TOWERS, "dinov2 or vit, such as facebook/dinov2-base"),
    **dict.fromkeys(_PAIRS, "clip, such as openai/clip-vit-base-patch32"),
    **dict.fromkeys(("altclip", "xlm-roberta-clip"), "metaclip_2 or siglip, such as google/siglip2-base-patch16-224"),
    **dict.fromkeys(_TEXTS, "clip with both of its towers, such as openai/clip-vit-base-patch32"),
    "chinese_clip_vision_model": "chinese_clip with both of its towers",
    "metaclip_2_vision_model": "metaclip_2 with both of its towers",
    "siglip2_vision_model": "siglip_vision_model at a fixed resolution",
}


def model_folder(folder: Path, known: Collection[str]) -> Path:
    """The folder of the model in a folder of sentence-transformers; any other folder is that itself.

    Args:
        folder: of the checkpoint.
        known: the model types that open.

    Raises:
        ModelError: sentence-transformers computes more than the model, or the folder holds an adapter alone.
    """
    _refuse_adapter(folder)
    path = folder / MODULES
    modules = _modules(path) if path.is_file() else []
    if not modules or modules[0][0] not in _MODELS:
        return folder
    place = folder / modules[0][1]
    if not (place / CONFIG).is_file() or read_json(place / CONFIG).get("model_type") not in known:
        return folder
    others = [name for name, _ in modules[1:] if name not in _KEPT]
    if others:
        raise ModelError(
            f"{path}: sentence-transformers computes {', '.join(others)} after the model, which is not computed here "
            f"({' and '.join(_KEPT)} is), so that the embeddings would be others; for those of the model itself, give "
            "its files without modules.json as model.name"
        )
    _refuse_adapter(place)
    return place


def nearest(family: Any) -> str:
    """The end of a message about a model type that does not open; empty where nothing is near."""
    if not isinstance(family, str) or family not in _NEAREST:
        return ""
    extra = f"; CLIP with such an image tower opens in open_clip's form ({install_hint('open_clip')})"
    return f"; the nearest is {_NEAREST[family]}{extra if family in _CONVOLUTIONS else ''}"


def _modules(path: Path) -> list[tuple[str, str]]:
    """The name and the folder of each module of sentence-transformers; empty where they are not written as by it."""
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error}); copy it from the original checkpoint") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return []
    found = [(entry.get("type"), entry.get("path")) for entry in entries]
    if not all(isinstance(kind, str) and isinstance(place, str) for kind, place in found):
        return []
    # Nothing outside of the folder is opened.
    foreign = [place for _, place in found if len(PurePosixPath(place).parts) > 1 or place in ("..", "/")]
    if foreign:
        raise ModelError(f"{path}: the path {foreign[0]!r} of a module is no folder within this one")
    return [(str(kind).rpartition(".")[2], str(place)) for kind, place in found]


def _refuse_adapter(folder: Path) -> None:
    path = folder / ADAPTER
    if not path.is_file():
        return
    base = str(read_json(path).get("base_model_name_or_path") or "BASE")[:200]
    raise ModelError(
        f"{folder}: holds an adapter ({ADAPTER}), which is no model alone. Merge it into its base with peft, and give "
        f"the new folder as model.name: base = transformers.AutoModel.from_pretrained({base!r}); "
        f"peft.PeftModel.from_pretrained(base, {str(folder)!r}).merge_and_unload().save_pretrained('merged'); then "
        "copy the tokenizer and preprocessor_config.json of the base to it"
    )
