"""Prompts to a :class:`~pipeline.core.records.TextBank`: embedded once in fp32, and cached on disk."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pipeline.config.schema import LabelsConfig, PromptsConfig
from pipeline.core.errors import PromptsError, StorageError
from pipeline.core.records import TextBank
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import from_here

BATCH = 256
# Part of the cache key: raise it when the features of the same prompts change.
VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Distinct names, each with the prompts whose features are averaged."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]


def read_labels(config: PromptsConfig) -> LabelSet:
    """The label set of a config; empty where it names none.

    A YAML file holds a list of labels, or a mapping from a label to its prompt or prompts. A CSV or
    Parquet file has a column ``label`` and, if wanted, a column ``prompt``; several rows of one label are
    averaged. A label without prompts of its own takes every template.

    Raises:
        PromptsError: the file cannot be read, or a label is empty or not text.
    """
    if config.path is None:
        pairs: Iterable[tuple[Any, Any]] = [(name, None) for name in config.labels]
        place = "prompts.labels"
    else:
        place = f"prompts.path={config.path}"
        pairs = _read_pairs(Path(config.path).expanduser(), place)
    collected: dict[str, list[str]] = {}
    for number, (name, prompt) in enumerate(pairs, start=1):
        if not isinstance(name, str) or not name.strip() or not is_text(name):
            raise PromptsError(
                f"{place}: label {number} is {name!r}; labels are texts (in YAML, quote yes, no and numbers)"
            )
        prompts = collected.setdefault(name, [])
        if prompt is None:
            if prompts:
                raise PromptsError(f"{place}: the label {name!r} stands there twice; take one out")
            prompts += [template.replace("{}", name) for template in config.templates]
        elif isinstance(prompt, str) and prompt.strip() and is_text(prompt):
            prompts.append(prompt)
        else:
            raise PromptsError(f"{place}: the prompt of {name!r} is {prompt!r}; prompts are texts")
    if config.path is not None and not collected:
        raise PromptsError(f"{place}: the file holds no labels")
    return LabelSet(names=tuple(collected), prompts=tuple(map(tuple, collected.values())))


def build_bank(
    checkpoint: Checkpoint, labels: LabelSet, config: PromptsConfig, scoring: LabelsConfig, *, keep: bool = True
) -> TextBank:
    """Embed the label set, or read the features from the cache; without ``keep``, new ones are not cached.

    The features of a label's prompts are normalised, averaged and normalised again (the ensembling of
    Radford et al. 2021, section 3.1.4).
    """
    fingerprint = bank_fingerprint(checkpoint, labels)
    store = open_storage(config.cache or str(default_cache()))
    name = f"{fingerprint}.safetensors"
    features = _from_cache(store, name, (len(labels.names), checkpoint.dim))
    cached = features is not None
    if features is None:
        features = embed_prompts(checkpoint, labels.prompts)
        if keep:
            _to_cache(store, name, features)
    return TextBank(
        names=labels.names,
        features=features,
        scoring=checkpoint.scoring if scoring.scoring == "auto" else scoring.scoring,
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
    """One L2-normalised float32 row for each sequence of prompts, ``[L, D]``."""
    texts = [text for group in prompts for text in group]
    _warn_of_long(checkpoint, texts)
    rows = []
    for start in range(0, len(texts), BATCH):
        features = checkpoint.text_features(checkpoint.tokenize(texts[start : start + BATCH])).float()
        rows.append(torch.nn.functional.normalize(features, dim=1))
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor([len(group) for group in prompts]))
    every = torch.cat(rows)
    sums = torch.zeros(len(prompts), every.shape[1]).index_add_(0, owner, every)
    return torch.nn.functional.normalize(sums, dim=1).numpy()


def is_text(text: str) -> bool:
    """True if the text can be encoded as UTF-8, unlike a string with half a character of a terminal or a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def default_cache() -> Path:
    """The default folder of text banks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "clip-pipeline" / "text"


def _warn_of_long(checkpoint: Checkpoint, texts: Sequence[str]) -> None:
    limit = checkpoint.max_tokens
    # A token is at least one byte: most texts are known to be short without another tokenization.
    long = [t for t in texts if len(t.encode()) + 2 > limit and len(checkpoint.tokenizer(t)["input_ids"]) > limit]
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
    return features if features.shape == shape and np.isfinite(features).all() else None


def _to_cache(store: Storage, name: str, features: np.ndarray) -> None:
    try:
        store.write(name, save_safetensors({"features": np.ascontiguousarray(features)}))
    except StorageError as error:
        log.warning("the text features are not cached: %s", error)


def _read_pairs(path: Path, place: str) -> Iterable[tuple[Any, Any]]:
    if not path.is_file():
        raise PromptsError(f"{place}: no such file{from_here(str(path))}")
    kind = path.suffix.lower()
    try:
        if kind in (".yaml", ".yml"):
            return _yaml_pairs(path, place)
        if kind == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
            return _table_pairs(rows, list(rows[0]) if rows else [], place)
        if kind in (".parquet", ".pq"):
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            return _table_pairs(table.to_pylist(), table.column_names, place)
    except (OSError, ValueError, csv.Error) as error:
        raise PromptsError(f"{place}: {error}") from error
    raise PromptsError(f"{place}: wanted a file that ends in .yaml, .yml, .csv, .parquet or .pq")


def _yaml_pairs(path: Path, place: str) -> Iterable[tuple[Any, Any]]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PromptsError(f"{place}: not YAML: {error}") from error
    if isinstance(content, list):
        return [(name, None) for name in content]
    if isinstance(content, dict):
        return [
            (name, prompt)
            for name, value in content.items()
            for prompt in (value if isinstance(value, list) and value else [value])
        ]
    raise PromptsError(f"{place}: wanted a list of labels, or a mapping from labels to prompts")


def _table_pairs(rows: list[dict[str, Any]], columns: Sequence[str], place: str) -> Iterable[tuple[Any, Any]]:
    if rows and "label" not in columns:
        raise PromptsError(f"{place}: no column 'label'; its columns are {', '.join(columns)}")
    return [(row["label"], row.get("prompt") or None) for row in rows]
