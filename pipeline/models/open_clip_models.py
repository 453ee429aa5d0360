"""Models by open_clip's own code: from its config, and by the names that it publishes weights under."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ModelError, install_hint
from pipeline.models.files import first_line
from pipeline.models.lean import import_open_clip

EXTRA = "open_clip"


def need_open_clip(name: str) -> Any:
    """The library open_clip.

    Raises:
        ModelError: it, or something that it needs, is not installed.
    """
    try:
        return import_open_clip()
    except ImportError as error:
        raise ModelError(
            f"{name}: a checkpoint of open_clip, which needs the library open_clip ({first_line(error)}): "
            f"{install_hint(EXTRA)}"
        ) from error


def build(place: Path | str, values: Mapping[str, Any], config: ModelConfig) -> Any:
    """The model of a ``model_cfg`` in fp32; its numbers are undefined unless the config wants random weights.

    Raises:
        ModelError: open_clip builds none of these values.
    """
    library: Any = need_open_clip(config.name)
    given = copy.deepcopy(dict(values))
    # As its factory does, which would look for weights as well.
    custom = given.pop("custom_text", False) or bool(given["text_cfg"].get("hf_model_name"))
    kind = library.CLIP if not custom else library.CoCa if "multimodal_cfg" in given else library.CustomTextCLIP
    given["vision_cfg"]["timm_model_pretrained"] = given["text_cfg"]["hf_model_pretrained"] = False
    random = config.weights == "random"
    try:
        with torch.random.fork_rng(devices=[]), nullcontext() if random else _Unset():
            torch.manual_seed(config.seed)
            model = kind(**given).eval().requires_grad_(False)
    # A library raises anything for values that it does not expect.
    except Exception as error:
        raise ModelError(
            f"{place}: open_clip builds no model of model_cfg ({first_line(error)}); copy the file from the original "
            "checkpoint"
        ) from error
    for module in model.modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__ = _Attention
    return model


class _Attention(torch.nn.MultiheadAttention):
    """torch's attention without its short cut for inference, which hides from a compiler and a proof what it runs."""

    def forward(  # type: ignore[override]
        self, query: Any, key: Any, value: Any, need_weights: bool = False, attn_mask: Any = None
    ) -> Any:
        """Attend to batches ``[N, T, W]``, as open_clip calls it."""
        # The same tensors stay the same ones, for which one product makes all parts.
        keys = key.transpose(0, 1)
        queries, values = (keys if part is key else part.transpose(0, 1) for part in (query, value))
        separate = {f"{name}_proj_weight": getattr(self, f"{name}_proj_weight") for name in "qkv"}
        output, weights = torch.nn.functional.multi_head_attention_forward(
            queries,
            keys,
            values,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            0.0,
            self.out_proj.weight,
            self.out_proj.bias,
            training=False,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            **(separate if not self._qkv_same_embed_dim else {}),
        )
        return output.transpose(0, 1), weights


class _Unset(TorchFunctionMode):
    """Leave out the random numbers of parameters, which weights replace: that takes longer than to read them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        random = getattr(func, "__name__", "") in ("normal_", "uniform_", "erfinv_")
        if random and args and isinstance(args[0], torch.nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def published(name: str) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """Name, ``model_cfg`` and ``preprocess_cfg`` of a model by its name in open_clip, or by its id on the hub.

    One without published weights has open_clip's default pictures.
    """
    library: Any = need_open_clip(name)
    pairs = [(model, library.get_pretrained_cfg(model, tag)) for model, tag in library.list_pretrained()]
    hubs = [(model, tag) for model, tag in pairs if "/".join(str(tag.get("hf_hub")).split("/")[:2]) == name]
    # Some weights serve two models; their repository is called after one.
    hubs.sort(key=lambda pair: pair[0] != name.rpartition("/")[2])
    tags = hubs or [(model, tag) for model, tag in pairs if model == name]
    model = tags[0][0] if tags else name
    values = library.get_model_config(model) if model in library.list_models() else None
    return None if values is None else (model, values, dict(tags[0][1]) if tags else {})
