"""A checkpoint: its towers, tokenizer, preprocessing, scoring, and fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ModelError
from pipeline.core.log_format import silence
from pipeline.core.records import PreprocessSpec
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.hub import DEMO_FOLDER, find_folder
from pipeline.models.preprocessor import read_spec, to_spec
from pipeline.models.trust import check_config, check_weights
from pipeline.storage.base import sha256


@dataclass(frozen=True, slots=True)
class Family:
    """Properties of all checkpoints of one ``model_type``, as they were trained.

    A tokenizer can be read from any of the files ``vocabularies``. The embedding of ``projected`` families has
    ``projection_dim`` values, of others the width of the image tower. ``masked`` families use the attention mask,
    ``padded`` ones pad every text to the full length, and ``lowered`` ones take texts in lower case. ``tokens`` is the
    length in tokens that texts are cut to, where the text tower could take more.
    """

    scoring: str
    vocabularies: tuple[str, ...]
    projected: bool = True
    masked: bool = True
    padded: bool = False
    lowered: bool = False
    tokens: int | None = None


FAMILIES = {
    # Pooled at EOS, under a causal mask: padding changes nothing.
    "clip": Family(scoring="softmax", vocabularies=("tokenizer.json", "vocab.json")),
    # Trained on texts padded to the full length, and pooled at the last token, without a mask. In lower case:
    # SigLIP's own tokenizer lowers texts, but SigLIP 2's files name Gemma's, which keeps capitals.
    "siglip": Family(
        scoring="sigmoid",
        vocabularies=("tokenizer.json", "spiece.model", "tokenizer.model"),
        projected=False,
        masked=False,
        padded=True,
        lowered=True,
    ),
    # BERT, pooled at CLS: padding is masked. It has 512 positions, and was trained on 52 (cn_clip.clip.tokenize).
    "chinese_clip": Family(scoring="softmax", vocabularies=("tokenizer.json", "vocab.txt"), tokens=52),
}
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)

# The imports of transformers for loading a model log messages as well.
silence()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model in fp32 on the CPU; ``dim`` is the length of an embedding.

    ``scale`` is the factor of the cosine and ``bias`` the summand, as the model was trained.
    """

    name: str
    family: str
    model: Any
    tokenizer: Any
    spec: PreprocessSpec
    dim: int
    scoring: str
    scale: float
    bias: float
    fingerprint: dict[str, Any]
    revision: str | None = None

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids (and the attention mask, for families that use one), int64 ``[N, T]``."""
        family = FAMILIES[self.family]
        tokens = self.tokenizer(
            [text.lower() for text in texts] if family.lowered else list(texts),
            padding="max_length" if family.padded else True,
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        wanted = ("input_ids", "attention_mask") if family.masked else ("input_ids",)
        return {name: tokens[name] for name in wanted}

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text, special ones included; longer texts are cut."""
        positions = int(self.model.config.text_config.max_position_embeddings)
        return min(positions, FAMILIES[self.family].tokens or positions)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected image features ``[N, D]``, not normalised, of normalised pixels ``[N, 3, H, W]``."""
        features: torch.Tensor = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        return features

    def text_features(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Projected text features ``[N, D]``, not normalised."""
        features: torch.Tensor = self.model.get_text_features(**tokens).pooler_output
        return features


def open_checkpoint(config: ModelConfig) -> Checkpoint:
    """Load a checkpoint from the package, a local folder or the Hugging Face hub.

    Raises:
        ModelError: not found, not reachable, or of a family that is not supported.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if config.weights == "random":
        return _open_random(config)
    folder = find_folder(config)
    settings = _read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{config.name}: no *.safetensors in {folder}; other formats can run code when they are loaded. Choose a "
            "revision that has them (model.revision=...), or convert the checkpoint with save_pretrained()"
        )
    check_weights(folder, weights)
    model = _load(folder)
    tokenizer, spec = _tokenizer(folder, settings.model_type), read_spec(folder, settings.model_type)
    digests = {"weights": {path.name: sha256(path) for path in weights}, "tokenizer": _digest_files(folder)}
    return _assemble(config, model, tokenizer, spec, digests)


def _load(folder: Path) -> Any:
    try:
        model, facts = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: the weights cannot be loaded ({error}); download the checkpoint again") from error
    # transformers fills missing tensors with random numbers, with a warning at most.
    missing = sorted(facts["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: the weights lack {len(missing)} tensors of the model, for example {', '.join(missing[:3])}; "
            "the download or the conversion is incomplete"
        )
    return model


def _open_random(config: ModelConfig) -> Checkpoint:
    if config.name in ARCHITECTURES:
        values, preprocessor = ARCHITECTURES[config.name]
        settings = AutoConfig.for_model(**values)
        spec = to_spec(preprocessor, settings.model_type, config.name)
        # The demo's tokenizer saves a download: the features of random weights have no meaning.
        folder = DEMO_FOLDER
    else:
        folder = find_folder(config)
        settings = _read_config(folder)
        spec = read_spec(folder, settings.model_type)
    tokenizer = _tokenizer(folder, settings.model_type)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(settings.text_config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AutoModel.from_config(settings, dtype=torch.float32)
    digests = {"weights": {"random": str(config.seed)}, "tokenizer": _digest_files(folder)}
    return _assemble(config, model, tokenizer, spec, digests)


def _assemble(
    config: ModelConfig, model: Any, tokenizer: Any, spec: PreprocessSpec, digests: dict[str, Any]
) -> Checkpoint:
    """Check that the parts belong together; ``digests`` are those of the weights and of the tokenizer."""
    model.eval().requires_grad_(False)
    settings = model.config
    side = settings.vision_config.image_size
    if spec.size != (side, side):
        raise ModelError(
            f"{config.name}: the preprocessor makes pictures of {spec.size[0]} x {spec.size[1]} pixels, "
            f"the model takes {side} x {side}; config.json and preprocessor_config.json belong to different checkpoints"
        )
    family = settings.model_type
    # CLIP pools the text at EOS. transformers takes the highest id where the config says 2, as OpenAI's first
    # configs do, and the first token, the same for every text, where a text has no EOS of the config's.
    eos = settings.text_config.eos_token_id
    if family == "clip" and eos != 2 and eos not in tokenizer("a")["input_ids"]:
        raise ModelError(
            f"{config.name}: the model takes a text's features at token {eos} (text_config.eos_token_id), and its "
            "tokenizer does not write that token; config.json and tokenizer belong to different checkpoints"
        )
    # The folder and the library's version are no part of the architecture.
    architecture = {
        key: value
        for key, value in settings.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "dtype", "architectures")
    }
    bias = getattr(model, "logit_bias", None)
    return Checkpoint(
        name=config.name,
        family=family,
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        dim=int(settings.projection_dim if FAMILIES[family].projected else settings.vision_config.hidden_size),
        scoring=FAMILIES[family].scoring,
        scale=float(model.logit_scale.exp()),
        revision=config.revision,
        bias=float(bias) if bias is not None else 0.0,
        fingerprint={
            "family": family,
            "weights": digests["weights"],
            "architecture": hashlib.sha256(json.dumps(architecture, sort_keys=True, default=str).encode()).hexdigest(),
            "tokenizer": digests["tokenizer"],
            "preprocess": dataclasses.asdict(spec),
        },
    )


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint")
    try:
        values = json.loads(path.read_text())
        family = values.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path}: not a JSON object: {error}") from error
    if family == "siglip2":
        raise ModelError(
            f"{folder}: model_type 'siglip2' is SigLIP 2's NaFlex variant, which gives every picture its own number of "
            "patches, and batches here have one shape; take SigLIP 2 at a fixed resolution, such as "
            "google/siglip2-base-patch16-224 or google/siglip2-so400m-patch16-256"
        )
    if family not in FAMILIES:
        raise ModelError(f"{folder}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    check_config(path, values)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _tokenizer(folder: Path, family: str) -> Any:
    # Without these files transformers creates an empty vocabulary, and all prompts are equal.
    wanted = FAMILIES[family].vocabularies
    if not any((folder / name).is_file() for name in wanted):
        raise ModelError(f"{folder}: no tokenizer; copy one of {', '.join(wanted)} from the original checkpoint")
    # transformers needs sentencepiece for SigLIP's own files; tokenizer.json has the same content without it.
    complete = family == "siglip" and (folder / "tokenizer.json").is_file()
    reader = PreTrainedTokenizerFast if complete else AutoTokenizer
    try:
        return reader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def _digest_files(folder: Path) -> str:
    """A digest of all files that a tokenizer may consist of."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
