"""Small checkpoints of open_clip, one of every shape of tower, in folders as open_clip writes them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pipeline.models.open_clip_models import need_open_clip

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
WORDS = ["a", "red", "circle", "photo", "of", "two", "blue", "stars", "cat", ",", "."]
SIGLIP_TEXT = {
    **TEXT,
    "vocab_size": 64,
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-06},
    "act_kwargs": {"approximate": "tanh"},
}
SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
BERT = {**ROBERTA, "model_type": "bert"}
MT5 = {
    "model_type": "mt5",
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 1,
}
NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}


def _timm(name: str, side: int, pool: str, proj: str | None) -> dict[str, Any]:
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": side,
    }


def _transformers(kind: str, pooler: str) -> dict[str, Any]:
    return {"hf_model_name": kind, "hf_tokenizer_name": kind, "hf_pooler_type": pooler, "context_length": 16}


def _clip(vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text or TEXT, **more}


def _register() -> None:
    """Models of timm with fewer and narrower layers, under names of their own; open_clip takes them by name alone."""
    from timm.models import eva, fastvit, is_model, register_model, vitamin

    def small_fastvit(pretrained: bool = False, **options: Any) -> Any:
        return fastvit.fastvit_mci0(layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), **options)

    def small_eva02(pretrained: bool = False, **options: Any) -> Any:
        sizes = {"img_size": 56, "embed_dim": 48, "depth": 2, "ref_feat_shape": (4, 4)}
        return eva.eva02_tiny_patch14_224(**{**options, **sizes})

    def small_pe_core(pretrained: bool = False, **options: Any) -> Any:
        sizes = {"img_size": 64, "embed_dim": 48, "depth": 2, "ref_feat_shape": (4, 4)}
        return eva.vit_pe_core_tiny_patch16_384(**{**options, **sizes, "attn_pool_num_heads": 2})

    def small_vitamin(pretrained: bool = False, **options: Any) -> Any:
        convolutions = vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        stages = vitamin.VitCfg(
            embed_dim=(16, 24, 48), depths=(1, 1, 1), stem_width=16, conv_cfg=convolutions, head_type="1d"
        )
        sizes = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
        return vitamin._create_vitamin(
            "small_vitamin",
            embed_cfg=stages,
            mlp_layer=vitamin.GeGluMlp,
            class_token=False,
            **{**options, **sizes, "global_pool": "avg"},
        )

    for model in (small_fastvit, small_eva02, small_pe_core, small_vitamin):
        if not is_model(model.__name__):
            register_model(model)


# The towers of the published models, with fewer and narrower layers.
SHAPES: dict[str, dict[str, Any]] = {
    "ViT": _clip(VISION),
    "ViT-quickgelu": _clip(VISION, quick_gelu=True),
    "SigLIP": _clip(
        _timm("test_vit", 160, "map", "none"), SIGLIP_TEXT, embed_dim=64, init_logit_bias=-10, custom_text=True
    ),
    "MobileCLIP": _clip(_timm("small_fastvit", 64, "avg", None), {**TEXT, "no_causal_mask": True}, custom_text=True),
    "EVA02": _clip(_timm("small_eva02", 56, "token", None), custom_text=True),
    "CoCa": _clip(
        {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 8, "output_tokens": True},
        {**TEXT, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**TEXT, "attn_pooler_heads": 2},
        custom_text=True,
    ),
    "ConvNeXt": _clip(_timm("test_convnext", 160, "", "linear")),
    "ResNet": _clip({"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}),
    "ViTamin": _clip(_timm("small_vitamin", 64, "", "linear"), custom_text=True),
    "CLIPA": _clip(
        {**VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {
            **TEXT,
            "vocab_size": 64,
            "hf_tokenizer_name": "bert-base-uncased",
            "tokenizer_kwargs": {"strip_sep_token": True},
            "pool_type": "last",
            "no_causal_mask": True,
        },
    ),
    "PE-Core": _clip(_timm("small_pe_core", 64, "map", None), custom_text=True),
    "RoBERTa": _clip(VISION, _transformers("roberta", "mean_pooler")),
    "BERT": _clip(VISION, _transformers("bert", "cls_pooler")),
    "mT5": _clip(VISION, _transformers("mt5", "mean_pooler")),
    "NLLB": _clip(VISION, {**_transformers("m2m_100", "cls_pooler"), "hf_proj_type": "linear"}),
}
TEXT_CONFIGS = {"roberta": ROBERTA, "m2m_100": NLLB, "bert": BERT, "mt5": MT5}


def write_open_clip(folder: Path, shape: str, **changes: Any) -> Path:
    """A checkpoint of random weights, each of which counts; ``changes`` are those of its ``model_cfg``."""
    library = need_open_clip("the tests")
    _register()
    values = {**copy.deepcopy(SHAPES[shape]), **changes}
    kind = values["text_cfg"].get("hf_model_name")
    if kind:
        # open_clip itself reads the config where the name says.
        values["text_cfg"]["hf_model_name"] = str(folder / "text_tower")
        (folder / "text_tower").mkdir(parents=True)
        (folder / "text_tower" / "config.json").write_text(json.dumps(TEXT_CONFIGS[kind]))
    folder.mkdir(exist_ok=True)
    if "hf_tokenizer_name" in values["text_cfg"]:
        _write_tokenizer(folder, values["text_cfg"])
    pictures = SQUASH if shape in ("SigLIP", "PE-Core", "CLIPA") else {"interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values, "preprocess_cfg": pictures}))
    # The same weights each time: of some, the quantized tower is further from fp32 than the tests allow.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = library.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        model.load_state_dict({name: _filled(name, tensor) for name, tensor in model.state_dict().items()})
        _measure(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


def _filled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    dice = torch.Generator().manual_seed(sum(name.encode()))
    if name in ("logit_scale", "logit_bias"):
        return torch.full_like(tensor, 4.0 if name == "logit_scale" else -3.0)
    if not tensor.is_floating_point():
        return tensor.clone()
    noise = torch.randn(tensor.shape, generator=dice)
    if tensor.ndim > 1:
        return noise / math.sqrt(tensor[0].numel())
    # Factors of norms stay near to 1, biases and scales of layers near to 0.
    return tensor.clone().round() + 0.2 * noise


def _measure(model: Any) -> None:
    """Statistics of the batch norms, without which activations would grow from layer to layer."""
    norms = [module for module in model.visual.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    size = model.visual.image_size
    if norms:
        with torch.no_grad():
            model.visual(torch.rand(4, 3, *((size, size) if isinstance(size, int) else size)) * 2 - 1)
    model.eval()


def _write_tokenizer(folder: Path, text: dict[str, Any]) -> None:
    """A tokenizer of words, whose ends are those of the family."""
    first, last = ("<s>", "</s>") if text.get("hf_model_name") else ("[CLS]", "[SEP]")
    vocabulary = {name: number for number, name in enumerate([first, "<pad>", last, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([first, "<pad>", last, "<unk>"])
    ends = [(name, vocabulary[name]) for name in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": first, "cls_token": first, "eos_token": last, "sep_token": last}
    settings = {**names, "pad_token": "<pad>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
