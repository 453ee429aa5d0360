"""Checkpoints in the layout of open_clip: models of that library, by its own code, with weights in safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import ModelConfig
from pipeline.core.concurrency import aside
from pipeline.core.errors import ModelError
from pipeline.core.records import PreprocessSpec
from pipeline.models.files import CONFIG, OPEN_CLIP_CONFIG, first_line, open_clip_weights, read_json
from pipeline.models.fingerprint import digest
from pipeline.models.hub import DEMO_FOLDER, hub_id
from pipeline.models.numbers import scale_and_bias
from pipeline.models.open_clip_config import check_model, facts, read_config, to_spec
from pipeline.models.open_clip_models import build, need_open_clip, published
from pipeline.models.open_clip_tokens import OpenClipTokenizer, open_tokenizer
from pipeline.models.open_clip_weights import fill
from pipeline.models.record import Checkpoint
from pipeline.models.tokens import Tokenizer
from pipeline.models.towers import ImageTower, Sizes, TextTower, without
from pipeline.models.trust import check_config
from pipeline.models.weights import check_tensors
from pipeline.storage.base import sha256

FAMILY = "open_clip"
# The folder of the config of a text tower of transformers, whose kind open_clip knows how to pool.
TEXT_FOLDER = "text_tower"
TEXT_KINDS = ("roberta", "xlm-roberta", "bert", "mt5", "m2m_100")
# Pixels across that a value of the last feature map of a convolutional tower stands for.
_STRIDE = 32


class OpenClipImageTower(ImageTower):
    """The image tower of a model of open_clip."""

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See :class:`ImageTower`."""
        return _first(self.model(pixel_values))


class OpenClipTextTower(TextTower):
    """The text tower of a model of open_clip: a module of its own, or the parts of a CLIP without its image tower."""

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`TextTower`; padding is told by its id."""
        encode = getattr(self.model, "encode_text", self.model)
        return _first(encode(input_ids))


def _first(output: Any) -> torch.Tensor:
    """The features; CoCa's towers return all tokens besides."""
    features: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return features


@dataclass(frozen=True, slots=True)
class Opened:
    """A model of open_clip and what belongs to it: ``values`` of its ``model_cfg``, and facts for its fingerprint."""

    model: Any
    values: Mapping[str, Any]
    spec: PreprocessSpec
    tokenizer: Tokenizer
    prints: Mapping[str, Any]


def open_folder(config: ModelConfig, folder: Path) -> Checkpoint:
    """Open the checkpoint in ``folder``, with its weights or with random ones.

    Raises:
        ModelError: open_clip is not installed, or a file is missing, damaged, another checkpoint's, or may run code.
    """
    place = folder / OPEN_CLIP_CONFIG
    values, pictures = read_config(folder)
    text = _text_config(folder, values)
    need_open_clip(config.name)
    weights = None if config.weights == "random" else open_clip_weights(folder)
    if weights is not None:
        check_tensors([weights])
    # A core reads the file while another one makes the model of it.
    read = aside(lambda: None if weights is None else sha256(weights), name="digests")
    model = build(place, _with_text(folder, values), config)
    if weights is not None:
        fill(model, weights)
    spec = to_spec(pictures, _size(model), f"{place}: preprocess_cfg")
    tokenizer, ids = open_tokenizer(folder, values["text_cfg"])
    prints = {
        "weights": {"random": str(config.seed)} if weights is None else {weights.name: read.result()},
        "architecture": digest({**facts(values), **({} if text is None else {"text": text})}),
        "tokenizer": ids,
    }
    return _assemble(config, Opened(model, values, spec, tokenizer, prints), str(place))


def open_known(config: ModelConfig) -> Checkpoint | None:
    """Open a model of open_clip's own list, by its name there or by its hub id, with random weights; None: unknown."""
    found = published(hub_id(config))
    if found is None:
        return None
    name, values, pictures = found
    text, place = values["text_cfg"], f"{config.name}, {name} of open_clip"
    if text.get("hf_model_name"):
        raise ModelError(
            f"{place}: its text tower is {text['hf_model_name']} of transformers, whose config open_clip does not "
            "have; random weights need a folder of the checkpoint here"
        )
    check_model(place, values)
    model = build(place, values, config)
    spec = to_spec(pictures, _size(model), place)
    # The demo's tokenizer saves a download, where a model has one of its own: random features have no meaning.
    tokenizer, ids = open_tokenizer(DEMO_FOLDER, {**text, "hf_tokenizer_name": None, "tokenizer_kwargs": None})
    if tokenizer.highest_id >= int(text.get("vocab_size", 49408)):
        length = int(text.get("context_length", 77))
        tokenizer, ids = open_tokenizer(DEMO_FOLDER, {"hf_tokenizer_name": "demo", "context_length": length})
    prints = {"weights": {"random": str(config.seed)}, "architecture": digest(facts(values)), "tokenizer": ids}
    return _assemble(config, Opened(model, values, spec, tokenizer, prints), place)


def _text_config(folder: Path, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``config.json`` of a text tower of transformers; None for open_clip's own."""
    name = values["text_cfg"].get("hf_model_name")
    if not name:
        return None
    path = folder / TEXT_FOLDER / CONFIG
    if not path.is_file():
        raise ModelError(
            f"{folder}: its text tower is {name} of transformers, whose config is not in the folder, and nothing of it "
            f"is downloaded; copy config.json of {name} to {path}"
        )
    config = read_json(path)
    check_config(path, config)
    if config.get("model_type") not in TEXT_KINDS:
        raise ModelError(
            f"{path}: model_type {config.get('model_type')!r:.80} is no text tower that open_clip knows how to pool; "
            f"wanted one of {', '.join(TEXT_KINDS)}, as {name} has it"
        )
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


def _with_text(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    text = dict(values["text_cfg"])
    if text.get("hf_model_name"):
        text["hf_model_name"] = str(folder / TEXT_FOLDER)
    return {**values, "text_cfg": text}


def _size(model: Any) -> tuple[int, int]:
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _assemble(config: ModelConfig, opened: Opened, place: str) -> Checkpoint:
    """Check that the parts belong together."""
    model, values, tokenizer = opened.model, opened.values, opened.tokenizer
    text = getattr(model, "text", None)
    halves = model.visual, without(model, "visual") if text is None else text
    image = OpenClipImageTower(halves[0], _image_sizes(model, values, opened.spec))
    words = OpenClipTextTower(halves[1], _text_sizes(values, tokenizer.max_tokens))
    dim = int(values["embed_dim"])
    _check_shapes(image, opened.spec, dim, place)
    if isinstance(tokenizer, OpenClipTokenizer):
        _check_tokens(words, tokenizer, values, place)
    scale, bias = scale_and_bias(config.name, model)
    return Checkpoint(
        name=config.name,
        family=FAMILY,
        image=image,
        text=words,
        tokenizer=tokenizer,
        spec=opened.spec,
        dim=dim,
        scoring="softmax" if model.logit_bias is None else "sigmoid",
        scale=scale,
        bias=bias,
        revision=config.revision,
        fingerprint={"family": FAMILY, **opened.prints, "preprocess": dataclasses.asdict(opened.spec)},
    )


def _check_shapes(image: ImageTower, spec: PreprocessSpec, dim: int, place: str) -> None:
    """Run the image tower without numbers: models of timm have sizes of their own, besides those of the config."""
    tensors = {**dict(image.named_parameters()), **dict(image.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    pixels = torch.empty(2, 3, *spec.size, device="meta")
    try:
        with torch.no_grad():
            found = tuple(torch.func.functional_call(image, meta, pixels).shape)
    # As above.
    except Exception as error:
        raise ModelError(
            f"{place}: the image tower takes no pictures of {spec.size[0]} x {spec.size[1]} pixels "
            f"(vision_cfg.image_size): {first_line(error)}"
        ) from error
    if found != (2, dim):
        raise ModelError(
            f"{place}: the image tower gives features of shape {list(found[1:])}, and embed_dim is {dim}; "
            "vision_cfg.timm_pool or timm_proj are not those of these weights"
        )


def _check_tokens(words: TextTower, tokenizer: OpenClipTokenizer, values: Mapping[str, Any], place: str) -> None:
    """Hold the tokenizer's ids against the rows of the embedding, and against the token that is pooled."""
    embedding = next(module for module in words.modules() if isinstance(module, torch.nn.Embedding))
    rows, highest = int(embedding.weight.shape[0]), tokenizer.highest_id
    if highest >= rows:
        raise ModelError(
            f"{place}: the tokenizer has tokens up to the id {highest}, and the text embedding {rows} rows; tokenizer "
            "and weights belong to different checkpoints"
        )
    text = values["text_cfg"]
    eos = int(text.get("eos_id", 2))
    if not text.get("hf_model_name") and text.get("pool_type") == "eos" and eos not in tokenizer(["a"])["input_ids"]:
        raise ModelError(
            f"{place}: the model takes a text's features at token {eos} (text_cfg.eos_id), and its tokenizer does not "
            "write that token; tokenizer and weights belong to different checkpoints"
        )


def _image_sizes(model: Any, values: Mapping[str, Any], spec: PreprocessSpec) -> Sizes:
    """Sizes of the image tower; of a convolutional one, those of a transformer that comes near to it."""
    vision, visual = values["vision_cfg"], model.visual
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        width = int(trunk.num_features)
        blocks = [len(trunk.blocks)] if hasattr(trunk, "blocks") else _depths(trunk)
        patches = getattr(getattr(trunk, "patch_embed", None), "num_patches", None)
    elif isinstance(vision.get("layers"), list):
        # The last stage of a ResNet has 32 times the channels of its stem.
        width, blocks, patches = 32 * int(vision.get("width", 64)), vision["layers"], None
    else:
        width, blocks = int(visual.conv1.out_channels), [int(visual.transformer.layers)]
        patches = visual.grid_size[0] * visual.grid_size[1]
    return Sizes(
        layers=sum(blocks),
        heads=max(1, width // int(vision.get("head_width", 64))) if _attends(visual) else 0,
        width=width,
        widest=int(width * float(vision.get("mlp_ratio", 4.0))),
        tokens=1 + (patches or (spec.size[0] // _STRIDE) * (spec.size[1] // _STRIDE)),
    )


def _attends(module: torch.nn.Module) -> bool:
    """True if a part of the module is an attention, by the name of its class."""
    return any("attention" in type(part).__name__.lower() for part in module.modules())


def _depths(trunk: torch.nn.Module) -> list[int]:
    """Blocks of the stages of a convolutional model."""
    return [len(stage.blocks) for stage in getattr(trunk, "stages", ()) if hasattr(stage, "blocks")] or [1]


def _text_sizes(values: Mapping[str, Any], tokens: int) -> Sizes:
    text = values["text_cfg"]
    width = int(text.get("width", 512))
    return Sizes(
        layers=int(text.get("layers", 12)),
        heads=int(text.get("heads", 8)),
        width=width,
        widest=int(width * float(text.get("mlp_ratio", 4.0))),
        tokens=tokens,
    )
