"""A checkpoint as all families give it: towers, tokenizer, preprocessing, scoring, and fingerprint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.core.errors import ModelError
from pipeline.core.records import PreprocessSpec
from pipeline.models.tokens import Tokenizer
from pipeline.models.towers import ImageTower, TextTower


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model in fp32 on the CPU; nothing outside of a family's module knows its library.

    Attributes:
        name: as the config has it.
        family: the name of its row.
        image: the image tower.
        text: the text tower; None for a model of images alone, as are ``tokenizer`` and ``scoring`` then.
        tokenizer: texts to token ids.
        spec: the preprocessing of pictures.
        dim: the length of an embedding.
        scoring: ``softmax`` or ``sigmoid`` over the labels.
        scale: the factor of the cosine, as the model was trained.
        bias: the summand of the scores, likewise.
        fingerprint: all that decides its numbers.
        revision: of the hub, as the config has it.
        earlier: digests of the same architecture by other releases of its library, see :func:`as_recorded`.
    """

    name: str
    family: str
    image: ImageTower
    text: TextTower | None
    tokenizer: Tokenizer | None
    spec: PreprocessSpec
    dim: int
    scoring: str | None
    scale: float
    bias: float
    fingerprint: dict[str, Any]
    revision: str | None = None
    earlier: tuple[str, ...] = ()

    def tower(self, name: str) -> ImageTower | TextTower:
        """The tower ``image`` or ``text``; raises ModelError where there is no text tower."""
        return self.image if name == "image" else self.texts()[0]

    def texts(self) -> tuple[TextTower, Tokenizer]:
        """The text tower and its tokenizer.

        Raises:
            ModelError: the model has none.
        """
        if self.text is None or self.tokenizer is None:
            raise ModelError(
                f"{self.name}: a {self.family} model has no text tower, so it embeds pictures alone: no labels, no "
                "texts. Leave labels and texts out (prompts.labels=[] prompts.path=null manifest.text=null), search "
                "with --image, or take a model of images and texts, such as model=clip_vit_b32"
            )
        return self.text, self.tokenizer

    def cropped(self, corner: str) -> PreprocessSpec:
        """The preprocessing with this rounding of odd margins; a family that has only its own (open_clip) keeps it."""
        return dataclasses.replace(self.spec, corner=self.spec.corner if self.spec.corner != "floor" else corner)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text, special ones included; longer texts are cut."""
        return self.texts()[1].max_tokens

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids (and the attention mask, for families that use one), int64 ``[N, T]``."""
        return self.texts()[1](texts)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image features ``[N, D]``, not normalised, of normalised pixels ``[N, 3, H, W]``."""
        return self.image.features(pixel_values)

    def text_features(self, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Text features ``[N, D]``, not normalised."""
        return self.texts()[0].features(**tokens)


def as_recorded(checkpoint: Checkpoint, recorded: Mapping[str, Any] | None) -> Checkpoint:
    """The same checkpoint with the fingerprint that a dataset recorded of it, where that says the same in other words.

    Other words are a digest of the architecture as another release of transformers wrote it, and files of weights that
    are not loaded. Any other difference stays.
    """
    ours = checkpoint.fingerprint
    if recorded is None or not isinstance(recorded.get("weights"), Mapping):
        return checkpoint
    same = dict(ours)
    if recorded.get("architecture") in checkpoint.earlier:
        same["architecture"] = recorded["architecture"]
    if ours["weights"].items() <= recorded["weights"].items():
        same["weights"] = dict(recorded["weights"])
    whole = json.loads(json.dumps(same)) == json.loads(json.dumps(dict(recorded)))
    return dataclasses.replace(checkpoint, fingerprint=same) if whole else checkpoint
