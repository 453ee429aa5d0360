"""The tokenizers of open_clip: its own of CLIP, or that of transformers in the checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import ModelError, short
from pipeline.models.files import OPEN_CLIP_CONFIG, guarded
from pipeline.models.fingerprint import files_digest
from pipeline.models.hub import TOKENIZER_FILES
from pipeline.models.lean import import_open_clip
from pipeline.models.tokens import Tokenizer

_CLEANINGS = ("canonicalize", "lower", "whitespace")


class OpenClipTokenizer(Tokenizer):
    """A tokenizer of open_clip: every text is cleaned up, cut, and filled up to the full length, without a mask."""

    __slots__ = ()

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """See :meth:`Tokenizer.__call__`."""
        ids: torch.Tensor = self.own(list(texts), context_length=self.max_tokens)
        return {"input_ids": ids}

    @property
    def pad_id(self) -> int:
        """See :attr:`Tokenizer.pad_id`."""
        return int(self._inner.pad_token_id or 0) if self._inner is not None else 0

    def count(self, text: str) -> int:
        """See :meth:`Tokenizer.count`."""
        if self._inner is None:
            return len(self.own.encode(text)) + 2
        return len(self._inner(self.own.clean_fn(text))["input_ids"])

    def backend(self) -> Any:
        """None: a text is cleaned up by Python code first."""
        return None

    @property
    def highest_id(self) -> int:
        """The highest id that a text may have."""
        vocabulary: dict[str, int] = self.own.encoder if self._inner is None else self._inner.get_vocab()
        return max(vocabulary.values())

    @property
    def _inner(self) -> Any:
        """The tokenizer of transformers in it, if it has one."""
        return getattr(self.own, "tokenizer", None)


def open_tokenizer(folder: Path, text: Mapping[str, Any]) -> tuple[OpenClipTokenizer, str]:
    """The tokenizer of a ``text_cfg``, and a digest of what decides its ids.

    Raises:
        ModelError: a file of it is missing in ``folder``, or cannot be read.
    """
    library: Any = import_open_clip()
    options, length = _options(folder, text), int(text.get("context_length", 77))
    if not text.get("hf_tokenizer_name"):
        own = library.SimpleTokenizer(context_length=length, **options)
        # Its vocabulary is a part of open_clip, and OpenAI's.
        return _wrapped(own, length), _digest([], "clip", options)
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    name = str(text["hf_tokenizer_name"])
    if not any(path.name in ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model") for path in found):
        raise ModelError(
            f"{folder}: no tokenizer, and text_cfg of {OPEN_CLIP_CONFIG} names {name}; copy tokenizer.json and "
            f"tokenizer_config.json of {name} into this folder"
        )
    with guarded(folder, "the tokenizer cannot be loaded"):
        own = library.tokenizer.HFTokenizer(
            str(folder),
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
        # Wrong settings are noticed at the first texts only.
        own(["a", "a photo"], context_length=length)
    return _wrapped(own, length), _digest(found, text.get("tokenizer_mode") or "", options)


def _wrapped(own: Any, length: int) -> OpenClipTokenizer:
    return OpenClipTokenizer(own, length, masked=False, padded=True)


def _options(folder: Path, text: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the tokenizer: those that read no files and draw no random numbers."""
    found = dict(text.get("tokenizer_kwargs") or {})
    other = bool(text.get("hf_tokenizer_name"))
    allowed = ("clean", "strip_sep_token", "language") if other else ("clean", "additional_special_tokens")
    for key, value in found.items():
        right = {
            "clean": value in _CLEANINGS,
            "strip_sep_token": isinstance(value, bool),
            "language": isinstance(value, str),
            "additional_special_tokens": isinstance(value, list) and all(isinstance(one, str) for one in value),
        }
        if key not in allowed or not right[key]:
            raise ModelError(
                f"{folder / OPEN_CLIP_CONFIG}: text_cfg.tokenizer_kwargs.{key}={short(repr(value))} is not supported; "
                f"supported are {', '.join(allowed)} (clean is {', '.join(_CLEANINGS)}): others read files, run code, "
                "or choose tokens at random"
            )
    return found


def _digest(files: Sequence[Path], *facts: Any) -> str:
    return files_digest(files, json.dumps(facts, sort_keys=True).encode())
