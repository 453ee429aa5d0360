"""The fingerprint of an architecture: the facts of its config that decide numbers, whichever release reads them.

transformers writes every attribute of a config into ``to_dict()``. A release that adds an attribute, with the value
that its models had all along, would make another model of every checkpoint. So the keys are those of this file, with
the values that a release without them means; a key that is not here counts only where the checkpoint itself has it.
The digest of today's keys is what it was before this file, so that datasets keep their fingerprints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# The folder and the library's version are no part of the architecture.
_LEFT_OUT = ("_name_or_path", "transformers_version", "dtype", "architectures")
_TOWERS = ("text_config", "vision_config")
_ANY: dict[str, Any] = {
    "chunk_size_feed_forward": 0,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
}
# Keys that every release writes, of the families that have them.
_SIZES = (
    *("attention_dropout", "attention_probs_dropout_prob", "bos_token_id", "eos_token_id", "hidden_act"),
    *("hidden_dropout_prob", "hidden_size", "image_size", "initializer_factor", "initializer_range"),
    *("intermediate_size", "layer_norm_eps", "logit_scale_init_value", "max_position_embeddings", "model_type"),
    *("num_attention_heads", "num_channels", "num_hidden_layers", "pad_token_id", "patch_size", "projection_dim"),
    *("projection_size", "type_vocab_size", "vocab_size"),
    # Of image towers alone.
    *("key_bias", "layerscale_value", "mlp_bias", "mlp_ratio", "num_register_tokens", "pooler_act"),
    *("pooler_output_size", "proj_bias", "qkv_bias", "query_bias", "rope_theta", "use_gated_mlp", "use_swiglu_ffn"),
    *("value_bias",),
)
# Written in towers as well, where they say nothing.
_OF_TOWERS: dict[str, Any] = {"_name_or_path": "", "architectures": None, "dtype": "float32"}
# Keys that a release in the supported range has added to the towers of a family, and the value that they had before.
_ADDED: dict[tuple[str, str], dict[str, Any]] = {("siglip", "vision_config"): {"vision_use_head": True}}


def architecture(dump: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a config.

    Args:
        dump: ``to_dict()`` of the opened config.
        given: the checkpoint's own ``config.json``.
    """
    family = str(dump.get("model_type"))
    facts = {key: value for key, value in _facts(dump, given, {}).items() if key not in _LEFT_OUT}
    for name in _TOWERS:
        own = {**_mapping(given.get(f"{name}_dict")), **_mapping(given.get(name))}
        added = _OF_TOWERS | _ADDED.get((family, name), {})
        facts[name] = _facts(_mapping(dump.get(name)), own, added)
    return facts


def digest(facts: Mapping[str, Any]) -> str:
    """The fingerprint of an architecture."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def digests(dump: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """All fingerprints that datasets have of this architecture: today's first, then those of earlier releases."""
    facts, family = architecture(dump, given), str(dump.get("model_type"))
    raw = {key: value for key, value in dump.items() if key not in _LEFT_OUT}
    found: list[Mapping[str, Any]] = [facts]
    for written in (facts, raw):
        earlier = dict(written)
        for name in _TOWERS:
            added = _ADDED.get((family, name), {})
            tower = _mapping(earlier.get(name))
            earlier[name] = {key: value for key, value in tower.items() if added.get(key, ...) != value}
        found += [written, earlier]
    return tuple(dict.fromkeys(map(digest, found)))


def _facts(dump: Mapping[str, Any], given: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    known = {*_ANY, *_SIZES, *_TOWERS, *added, *given}
    return {**_ANY, **added, **{key: value for key, value in dump.items() if key in known}}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def files_digest(files: Iterable[Path], begin: bytes = b"") -> str:
    """SHA-256 of ``begin``, and of the name and the content of each file."""
    digest = hashlib.sha256(begin)
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
