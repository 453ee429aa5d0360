"""Dual encoders of transformers: image and text towers of one ``model_type``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ModelError
from pipeline.models.files import CheckpointFiles, check_side, guarded
from pipeline.models.fingerprint import digests as architecture_digests
from pipeline.models.fingerprint import files_digest
from pipeline.models.hub import TOKENIZER_FILES
from pipeline.models.numbers import scale_and_bias
from pipeline.models.record import Checkpoint
from pipeline.models.tokens import Tokenizer
from pipeline.models.towers import ImageTower, Sizes, TextTower, without


@dataclass(frozen=True, slots=True)
class Family:
    """Properties of all checkpoints of one ``model_type``, as they were trained.

    ``about`` names models of it for the page, and ``example`` one of the hub.
    A tokenizer can be read from any of the files ``vocabularies``. The embedding of ``projected`` families has
    ``projection_dim`` values, of others the width of the image tower. ``masked`` families use the attention mask,
    ``padded`` ones pad every text to the full length, ``lowered`` ones take texts in lower case, and ``ended`` ones
    take a text's features at its token EOS. ``tokens`` is the length in tokens that texts are cut to, where the text
    tower could take more; ``fusion`` is its graph's, see :class:`~pipeline.models.towers.Sizes`.
    """

    about: str
    example: str
    scoring: str
    vocabularies: tuple[str, ...]
    projected: bool = True
    masked: bool = True
    padded: bool = False
    lowered: bool = False
    ended: bool = False
    tokens: int | None = None
    fusion: str = "clip"


FAMILIES = {
    # Pooled at EOS, under a causal mask: padding changes nothing.
    "clip": Family(
        about="CLIP of OpenAI, LAION, DataComp and MetaCLIP 1, and models tuned from it",
        example="openai/clip-vit-base-patch32",
        scoring="softmax",
        vocabularies=("tokenizer.json", "vocab.json"),
        ended=True,
    ),
    # The same, in many languages: its tokenizer is XLM-V's, or mT5's, and its first EOS is really that of its config.
    "metaclip_2": Family(
        about="MetaCLIP 2, for texts in 300 languages",
        example="facebook/metaclip-2-worldwide-huge-quickgelu",
        scoring="softmax",
        vocabularies=("tokenizer.json", "sentencepiece.bpe.model", "spiece.model"),
        ended=True,
    ),
    # Trained on texts padded to the full length, and pooled at the last token, without a mask. In lower case:
    # SigLIP's own tokenizer lowers texts, but SigLIP 2's files name Gemma's, which keeps capitals.
    "siglip": Family(
        about="SigLIP, and SigLIP 2 at a fixed resolution",
        example="google/siglip2-base-patch16-224",
        scoring="sigmoid",
        vocabularies=("tokenizer.json", "spiece.model", "tokenizer.model"),
        projected=False,
        masked=False,
        padded=True,
        lowered=True,
    ),
    # BERT, pooled at CLS: padding is masked. It has 512 positions, and was trained on 52 (cn_clip.clip.tokenize).
    "chinese_clip": Family(
        about="Chinese-CLIP with ViT towers",
        example="OFA-Sys/chinese-clip-vit-base-patch16",
        scoring="softmax",
        vocabularies=("tokenizer.json", "vocab.txt"),
        tokens=52,
        fusion="bert",
    ),
}
# The children of transformers' dual encoders that only one half uses.
_TEXT_MODULES = ("text_model", "text_projection")
_VISION_MODULES = ("vision_model", "visual_projection")


class DualImageTower(ImageTower):
    """The image half of a dual encoder of transformers."""

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See :class:`ImageTower`."""
        features: torch.Tensor = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        return features


class DualTextTower(TextTower):
    """The text half of a dual encoder of transformers; with ``masked``, it uses the attention mask, if there is one.

    Without a mask, attention takes faster kernels: ``causal`` towers of CLIP need none.
    """

    def __init__(self, model: Any, sizes: Sizes, *, masked: bool, causal: bool) -> None:
        super().__init__(model, sizes)
        self.masked, self.causal = masked, causal

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`TextTower`."""
        mask = {"attention_mask": attention_mask} if self.masked and attention_mask is not None else {}
        features: torch.Tensor = self.model.get_text_features(input_ids=input_ids, **mask).pooler_output
        return features


def assemble(config: ModelConfig, model: Any, read: CheckpointFiles) -> Checkpoint:
    """A dual encoder and what was read of its folder as a checkpoint, after checks that they belong together.

    Raises:
        ModelError: they do not, or the tokenizer cannot be read.
    """
    settings, spec = model.config, read.spec
    tokenizer = _tokenizer(read.folder, settings.model_type)
    side = settings.vision_config.image_size
    check_side(config.name, spec, side)
    family = settings.model_type
    # transformers takes a CLIP's features at the highest id where the config says 2, as OpenAI's first configs do, and
    # at the first token, the same for every text, where a text has no EOS of the config's.
    eos = settings.text_config.eos_token_id
    ended = FAMILIES[family].ended and not (family == "clip" and eos == 2)
    if ended and eos not in tokenizer("a")["input_ids"]:
        raise ModelError(
            f"{config.name}: the model takes a text's features at token {eos} (text_config.eos_token_id), and its "
            "tokenizer does not write that token; config.json and tokenizer belong to different checkpoints"
        )
    bos = settings.text_config.bos_token_id
    if ended and bos in tokenizer.added_tokens_decoder:
        begun = tokenizer("a")["input_ids"][0]
        if begun != bos:
            raise ModelError(
                f"{config.name}: the model was trained on texts that begin with token {bos} "
                f"(text_config.bos_token_id), and its tokenizer begins them with {begun}; config.json and "
                "tokenizer_config.json belong to different checkpoints"
            )
    _check_tokens(config, model, tokenizer)
    today, *earlier = architecture_digests(settings.to_dict(), read.values)
    scale, bias = scale_and_bias(config.name, model)
    row = FAMILIES[family]
    positions = int(settings.text_config.max_position_embeddings)
    tokens = Tokenizer(
        tokenizer, min(positions, row.tokens or positions), masked=row.masked, padded=row.padded, lowered=row.lowered
    )
    patches = (side // int(settings.vision_config.patch_size)) ** 2
    image, text = without(model, *_TEXT_MODULES), without(model, *_VISION_MODULES)
    return Checkpoint(
        name=config.name,
        family=family,
        image=DualImageTower(image, _sizes(settings.vision_config, patches + 1, "clip")),
        text=DualTextTower(
            text, _sizes(settings.text_config, tokens.max_tokens, row.fusion), masked=row.masked, causal=row.ended
        ),
        tokenizer=tokens,
        spec=spec,
        dim=int(settings.projection_dim if row.projected else settings.vision_config.hidden_size),
        scoring=row.scoring,
        scale=scale,
        revision=config.revision,
        bias=bias,
        fingerprint={
            "family": family,
            "weights": read.weights,
            "architecture": today,
            "tokenizer": files_digest(path for path in map(read.folder.joinpath, TOKENIZER_FILES) if path.is_file()),
            "preprocess": dataclasses.asdict(spec),
        },
        earlier=tuple(earlier),
    )


def _sizes(tower: Any, tokens: int, fusion: str) -> Sizes:
    return Sizes(
        layers=int(tower.num_hidden_layers),
        heads=int(tower.num_attention_heads),
        width=int(tower.hidden_size),
        widest=int(tower.intermediate_size),
        tokens=tokens,
        fusion=fusion,
    )


def _check_tokens(config: ModelConfig, model: Any, tokenizer: Any) -> None:
    """Hold the tokenizer's ids against the rows of the embedding of tokens, which an unknown id would end."""
    rows = int(model.text_model.get_input_embeddings().weight.shape[0])
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise ModelError(
            f"{config.name}: {len(beyond)} tokens of the tokenizer have no row in the text embedding ({rows} rows), "
            f"for example {token!r} with the id {number}: tokens were added, and the embedding was not resized "
            "(resize_token_embeddings), or tokenizer and weights belong to different checkpoints"
        )


def take_token_ids(settings: Any, folder: Path) -> None:
    """Set the ids of special tokens in a config of random weights to those of the tokenizer in ``folder``."""
    tokenizer = _tokenizer(folder, settings.model_type)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(settings.text_config, name, getattr(tokenizer, name))


def _tokenizer(folder: Path, family: str) -> Any:
    # Without these files transformers creates an empty vocabulary, and all prompts are equal.
    wanted = FAMILIES[family].vocabularies
    if not any((folder / name).is_file() for name in wanted):
        raise ModelError(f"{folder}: no tokenizer; copy one of {', '.join(wanted)} from the original checkpoint")
    # transformers needs sentencepiece for SigLIP's own files; tokenizer.json has the same content without it.
    complete = family == "siglip" and (folder / "tokenizer.json").is_file()
    reader = PreTrainedTokenizerFast if complete else AutoTokenizer
    with guarded(folder, "the tokenizer cannot be loaded"):
        tokenizer = reader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # Wrong settings are noticed at the first texts only.
        tokenizer(["a", "a photo"], padding=True, truncation=True, max_length=16, return_tensors="pt")
        tokenizer("a")
    return tokenizer
