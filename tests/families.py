"""Small checkpoints of every family, with the model and the processor that transformers has for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pipeline.config.schema import ModelConfig
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.hub import DEMO_FOLDER

ENGLISH = ["a red circle", "A Photo, of two Blue stars.", "a cat"]
CHINESE = ["一只猫", "一张红色圆形的照片", "a Cat 狗"]
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TEXT, "hidden_size": 48, "image_size": 32, "patch_size": 8}


@dataclass(frozen=True)
class Case:
    """A small checkpoint in a folder, opened here and by transformers; ``padding`` is the family's.

    ``features`` are the image features of its own library, and ``levels`` the most that pixels differ from its
    processor's, in levels of 255.
    """

    checkpoint: Checkpoint
    model: Any
    processor: Any
    texts: list[str]
    padding: dict[str, Any]
    features: Callable[[Any], torch.Tensor] | None = None
    levels: float = 0.0

    def inputs(self, texts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return dict(self.processor(text=texts, images=images, return_tensors="pt", **self.padding))

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        processor = getattr(self.processor, "image_processor", self.processor)
        pixels: torch.Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.features is not None:
            return self.features(self.model(pixel_values=pixels))
        features: torch.Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features


def save(model: Any, folder: Path, preprocessor: dict[str, Any]) -> None:
    """Weights that make every part of the model count, and what the image processor reads."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        if hasattr(model, "logit_scale"):
            model.logit_scale.fill_(4.0)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def write_clip(folder: Path, *, eos: int | None = None, act: str = "quick_gelu") -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "eos_token_id": tokenizer.eos_token_id if eos is None else eos,
        "hidden_act": act,
    }
    vision = {**VISION, "hidden_act": act}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    save(model, folder, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    tokenizer.save_pretrained(folder)
    return model


def write_chinese_clip(folder: Path) -> Any:
    letters = sorted(set("".join(CHINESE).replace(" ", "").lower()) | set("绿蓝方星"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in "act")]
    text = {**TEXT, "vocab_size": len(vocabulary), "max_position_embeddings": 512}
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)).eval()
    save(model, folder, {"size": {"height": 32, "width": 32}, "do_center_crop": False})
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return model


def write_metaclip(folder: Path) -> Any:
    """XLM-R's tokenizer, whose EOS is 2, which CLIP's old configs wrote without meaning it."""
    words = ["▁a", "▁red", "▁circle", "▁photo", "▁of", "▁two", "▁blue", "▁stars", "▁cat", "▁A", "▁un", "▁chat", "▁猫"]
    ends = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    tokenizer = Tokenizer(models.Unigram([*ends, *((word, -1.0) for word in words)], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([*(name for name, _ in ends), "<mask>"])
    special = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    text = {
        **TEXT,
        **{"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 16},
        **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    }
    model = MetaClip2Model(MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=24)).eval()
    save(model, folder, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {**names, "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def write_siglip(folder: Path, *, tokens: int = 64) -> Any:
    """SigLIP's tokenizer lowers, drops punctuation and ends with </s>, which is also the padding."""
    words = ["▁a", "▁red", "▁circle", "▁photo", "▁of", "▁two", "▁blue", "▁stars", "▁cat"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((word, -1.0) for word in words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "SiglipTokenizer"}
    return _write_siglip(folder, tokenizer, ends, eos=1, tokens=tokens)


def write_siglip2(folder: Path) -> Any:
    """Gemma's tokenizer keeps capitals and falls back to bytes."""
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])}
    for piece in [*(f"<0x{i:02X}>" for i in range(256)), *"▁,.abcdefghilmnoprstuwABPT", "ca", "cat"]:
        vocabulary[piece] = len(vocabulary)
    bpe = models.BPE(vocabulary, [("c", "a"), ("ca", "t")], fuse_unk=True, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    ends = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "tokenizer_class": "GemmaTokenizer",
    }
    return _write_siglip(folder, tokenizer, ends, eos=1, tokens=64)


def _write_siglip(folder: Path, tokenizer: Tokenizer, ends: dict[str, Any], *, eos: int, tokens: int) -> Any:
    name = ends["eos_token"]
    tokenizer.add_special_tokens([name, ends["pad_token"]])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {name}", special_tokens=[(name, eos)])
    size = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": tokens}
    ids = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": tokenizer.token_to_id(ends["pad_token"])}
    text = {**TEXT, **size, **ids, "projection_size": 48}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).eval()
    save(model, folder, {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {**ends, "model_input_names": ["input_ids"], "model_max_length": tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def open_clip(folder: Path, *, eos: int | None = None, act: str = "quick_gelu") -> Case:
    model = write_clip(folder, eos=eos, act=act)
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    return Case(open_checkpoint(ModelConfig(name=str(folder))), model, processor, ENGLISH, {"padding": True})


def open_sentence_transformers(folder: Path) -> Case:
    """As clip-ViT-B-32 of sentence-transformers: the CLIP is in a folder of its own."""
    inner = folder / "0_CLIPModel"
    inner.mkdir()
    case = open_clip(inner)
    kinds = {"0_CLIPModel": "sentence_transformers.models.CLIPModel", "1_N": "sentence_transformers.models.Normalize"}
    (folder / "1_N").mkdir()
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    return replace(case, checkpoint=open_checkpoint(ModelConfig(name=str(folder))))


def open_metaclip(folder: Path) -> Case:
    model = write_metaclip(folder)
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    texts = ["a red circle", "un chat", "A photo of two blue stars", "猫", "a cat " * 20]
    padding = {"padding": True, "truncation": True}
    return Case(open_checkpoint(ModelConfig(name=str(folder))), model, processor, texts, padding)


def open_chinese_clip(folder: Path) -> Case:
    model = write_chinese_clip(folder)
    images = ChineseCLIPImageProcessorPil.from_pretrained(folder)
    processor = ChineseCLIPProcessor(images, BertTokenizer.from_pretrained(folder))
    return Case(open_checkpoint(ModelConfig(name=str(folder))), model, processor, CHINESE, {"padding": True})


def open_siglip(folder: Path, *, tokens: int = 64) -> Case:
    model = write_siglip(folder, tokens=tokens)
    images = SiglipImageProcessorPil.from_pretrained(folder)
    processor = SiglipProcessor(images, PreTrainedTokenizerFast.from_pretrained(folder))
    padding = {"padding": "max_length", "truncation": True}
    return Case(open_checkpoint(ModelConfig(name=str(folder))), model, processor, ENGLISH, padding)


def open_siglip2(folder: Path) -> Case:
    model = write_siglip2(folder)
    images = SiglipImageProcessorPil.from_pretrained(folder)
    # transformers lowers only in the tokenizer of its NaFlex models, which is the reference here.
    processor = SiglipProcessor(images, Siglip2Tokenizer.from_pretrained(folder))
    padding = {"padding": "max_length", "max_length": 64, "truncation": True}
    return Case(open_checkpoint(ModelConfig(name=str(folder))), model, processor, ENGLISH, padding)


Open = Callable[[Path], Case]
CASES: dict[str, Open] = {
    "clip": open_clip,
    # OpenAI's first configs say that EOS is 2, and mean the highest id.
    "clip-legacy-eos": lambda folder: open_clip(folder, eos=2),
    # As laion's, whose activation is the exact GELU.
    "clip-gelu": lambda folder: open_clip(folder, act="gelu"),
    "sentence-transformers": open_sentence_transformers,
    "metaclip_2": open_metaclip,
    "chinese_clip": open_chinese_clip,
    "siglip": open_siglip,
    # As google/siglip-so400m-patch14-224.
    "siglip-16-tokens": lambda folder: open_siglip(folder, tokens=16),
    "siglip2": open_siglip2,
}
