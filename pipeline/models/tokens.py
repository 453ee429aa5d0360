"""Texts to the token ids of a checkpoint, as its family was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer of a text tower: one of transformers; for another library's, the methods are overridden.

    Attributes:
        own: the library's tokenizer.
        max_tokens: the most tokens of a text, special ones included; longer texts are cut.
        masked: True if the text tower uses the attention mask.
        padded: True if every text is filled up to ``max_tokens``; else to the longest one of a call.
        lowered: True if texts are taken in lower case.
    """

    own: Any
    max_tokens: int
    masked: bool = True
    padded: bool = False
    lowered: bool = False

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """``input_ids``, and ``attention_mask`` for text towers that use it, int64 ``[N, T]``, filled on the right."""
        tokens = self.own(
            [text.lower() for text in texts] if self.lowered else list(texts),
            padding="max_length" if self.padded else True,
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        wanted = ("input_ids", "attention_mask") if self.masked else ("input_ids",)
        return {name: tokens[name] for name in wanted}

    @property
    def pad_id(self) -> int:
        """The id that fills short texts."""
        return int(self.own.pad_token_id or 0)

    def count(self, text: str) -> int:
        """The number of tokens of a text before it is cut, special ones included."""
        return len(self.own(text.lower() if self.lowered else text)["input_ids"])

    def backend(self) -> Any:
        """The tokenizer of the library ``tokenizers`` behind it; None if it is Python code."""
        return getattr(self.own, "backend_tokenizer", None)
