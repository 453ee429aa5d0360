"""Text bank: the prompts of a label set, embedded once in fp32 and cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pipeline.config.schema import LabelsConfig, PromptsConfig
from pipeline.core.errors import ModelError, StorageError
from pipeline.core.records import TextBank
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.label_files import LabelSet
from pipeline.models.numbers import alike, are_unit, say_damaged
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage

BATCH = 256
# Pairs of labels with the same features that are named.
WARNED = 5
# Part of the cache key: raise it when the features of the same prompts change.
VERSION = 1
log = logging.getLogger(__name__)


def build_bank(
    checkpoint: Checkpoint, labels: LabelSet, config: PromptsConfig, scoring: LabelsConfig, *, keep: bool = True
) -> TextBank:
    """Embed the label set, or read the features from the cache; without ``keep``, new ones are not cached.

    The features of a label's prompts are normalised, averaged and normalised again (the ensembling of
    Radford et al. 2021, section 3.1.4).

    Raises:
        ModelError: there is no text tower, or it does not give features.
    """
    checkpoint.texts()
    fingerprint = bank_fingerprint(checkpoint, labels)
    store = open_storage(config.cache or str(default_cache()))
    name = f"{fingerprint}.safetensors"
    features = _from_cache(store, name, (len(labels.names), checkpoint.dim))
    cached = features is not None
    if features is None:
        features = embed_prompts(checkpoint, labels.prompts)
        if keep:
            _to_cache(store, name, features)
    _warn_of_alike(labels.names, features)
    return TextBank(
        names=labels.names,
        features=features,
        scoring=str(checkpoint.scoring) if scoring.scoring == "auto" else scoring.scoring,
        scale=checkpoint.scale,
        bias=checkpoint.bias,
        fingerprint=fingerprint,
        cached=cached,
    )


def bank_fingerprint(checkpoint: Checkpoint, labels: LabelSet) -> str:
    """A digest of everything that decides the features."""
    parts = [VERSION, labels.names, labels.prompts, checkpoint.fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@torch.inference_mode()
def embed_prompts(checkpoint: Checkpoint, prompts: Sequence[Sequence[str]]) -> np.ndarray:
    """One L2-normalised float32 row for each sequence of prompts, ``[L, D]``.

    Raises:
        ModelError: one is NaN, infinite or zero.
    """
    texts = [text for group in prompts for text in group]
    _warn_of_long(checkpoint, texts)
    rows = []
    for start in range(0, len(texts), BATCH):
        features = checkpoint.text_features(checkpoint.tokenize(texts[start : start + BATCH])).float()
        rows.append(torch.nn.functional.normalize(features, dim=1))
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor([len(group) for group in prompts]))
    every = torch.cat(rows)
    _refuse_wrong(checkpoint, every.numpy(), texts)
    sums = torch.zeros(len(prompts), every.shape[1]).index_add_(0, owner, every)
    means: np.ndarray = torch.nn.functional.normalize(sums, dim=1).numpy()
    _refuse_wrong(checkpoint, means, [" + ".join(group) for group in prompts])
    return means


def _refuse_wrong(checkpoint: Checkpoint, features: np.ndarray, texts: Sequence[str]) -> None:
    wrong = np.flatnonzero(~are_unit(features))
    if len(wrong):
        tower = say_damaged(checkpoint.text, "text")
        raise ModelError(
            f"{checkpoint.name}: {tower} for {len(wrong)} of {len(texts)} texts, for example "
            f"{texts[wrong[0]][:80]!r}, so that no score could be right; the checkpoint is damaged, or was not "
            "trained: download or convert it again"
        )


def _warn_of_alike(names: Sequence[str], features: np.ndarray) -> None:
    pairs = alike(features)
    for one, other in pairs[:WARNED]:
        log.warning(
            "the labels %r and %r have the same text features, so every image scores the same for both: the model does "
            "not tell them apart; take one out, or give them other prompts",
            names[one],
            names[other],
        )
    if len(pairs) > WARNED:
        log.warning("%d or more further pairs of labels have the same text features", len(pairs) - WARNED)


def default_cache() -> Path:
    """The default folder of text banks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "clip-pipeline" / "text"


def _warn_of_long(checkpoint: Checkpoint, texts: Sequence[str]) -> None:
    limit, count = checkpoint.max_tokens, checkpoint.texts()[1].count
    # A token is at least one byte: most texts are known to be short without another tokenization.
    long = [t for t in texts if len(t.encode()) + 2 > limit and count(t) > limit]
    if long:
        log.warning("%d prompts are longer than %d tokens and are cut, for example %r", len(long), limit, long[0])


def _from_cache(store: Storage, name: str, shape: tuple[int, int]) -> np.ndarray | None:
    """The cached features, or None if there are none, or none of this shape."""
    try:
        data = store.read(name)
        if data is None:
            return None
        features: np.ndarray = load_safetensors(data)["features"]
    except (SafetensorError, KeyError, StorageError):
        return None
    return features if features.shape == shape and are_unit(features).all() else None


def _to_cache(store: Storage, name: str, features: np.ndarray) -> None:
    try:
        store.write(name, save_safetensors({"features": np.ascontiguousarray(features)}))
    except StorageError as error:
        log.warning("the text features are not cached: %s", error)
