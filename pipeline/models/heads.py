"""Heads: small models on embeddings, such as an aesthetic score, read from JSON and safetensors.

``aesthetic.json`` says how the tensors of ``aesthetic.safetensors`` beside it are used::

    {"name": "aesthetic", "layers": [{"weight": "0.weight", "bias": "0.bias", "activation": "relu"},
                                     {"weight": "2.weight", "bias": "2.bias"}],
     "output": "none", "model": {"name": "openai/clip-vit-large-patch14", "weights": {"model.safetensors": "<sha256>"}}}

A layer is ``activation(weight @ x + bias)`` with the weight ``[out, in]``, as torch's ``Linear`` stores it. The output
is taken as it is (``none``), as ``sigmoid``, or as ``softmax`` over ``classes``. A head of one output writes the column
``head_<name>``, one with ``classes`` a column ``head_<name>_<class>`` for each. ``model`` is optional.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ModelError, NumericalError, short
from pipeline.models.files import first_line, read_json
from pipeline.storage.urls import from_here, is_local, local_file

OUTPUTS = ("none", "sigmoid", "softmax")
ACTIVATIONS = ("none", "relu", "gelu", "tanh", "sigmoid")
# Part of the name of a column, which every reader of Parquet takes without quotes.
NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
# A head of more columns than these is a set of labels.
MOST_CLASSES = 256
# Bytes of the JSON of a head at most.
MOST_BYTES = 2**20
# Rows that are computed together; what a row becomes may not follow from how many there are.
ROWS = 4096
_KEYS = {"name", "layers", "output", "classes", "model"}
_LAYER_KEYS = {"weight", "bias", "activation"}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layer:
    """``activation(weight @ x + bias)``; weight float64 ``[out, in]``, bias float64 ``[out]``."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    activation: str


@dataclass(frozen=True, slots=True)
class Head:
    """A small model on embeddings.

    Attributes:
        name: as in its JSON.
        columns: the columns that it writes, one for each output.
        layers: applied one after the other.
        output: one of :data:`OUTPUTS`.
        model: name and digests of the weights of the model whose embeddings it was trained on; None if it does not say.
        fingerprint: its columns, and digests of its description and its tensors.
    """

    name: str
    columns: tuple[str, ...]
    layers: tuple[Layer, ...]
    output: str
    model: Mapping[str, Any] | None
    fingerprint: dict[str, Any]

    def __call__(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """A value for each of ``vectors`` ``[N, D]`` and each column, float32 ``[N, C]``, computed in float64.

        Raises:
            NumericalError: one is not finite.
        """
        made = [self._some(vectors[start : start + ROWS].astype(np.float64)) for start in range(0, len(vectors), ROWS)]
        values = np.concatenate(made) if made else np.zeros((0, len(self.columns)), dtype=np.float32)
        if not np.isfinite(values).all():
            raise NumericalError(
                f"the head {self.name} gives NaN or infinity for an embedding; train or export it again"
            )
        return values

    def _some(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            for layer in self.layers:
                values = _activate(values @ layer.weight.T + layer.bias, layer.activation)
            if self.output == "softmax":
                values = np.exp(values - values.max(axis=1, keepdims=True))
                values /= values.sum(axis=1, keepdims=True)
            elif self.output == "sigmoid":
                values = _activate(values, "sigmoid")
            return values.astype(np.float32)


def columns_of(heads: Sequence[Head]) -> list[str]:
    """The names of the columns of ``heads``."""
    return [column for head in heads for column in head.columns]


def values_of(heads: Sequence[Head], vectors: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """The columns of ``heads`` for embeddings ``[N, D]`` as they are stored, float32 ``[N]`` by name.

    Raises:
        NumericalError: one is not finite.
    """
    made = [(head.columns, head(vectors)) for head in heads]
    return {name: values[:, place] for columns, values in made for place, name in enumerate(columns)}


def _activate(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    if name == "relu":
        return np.maximum(values, 0.0)
    if name == "tanh":
        return np.tanh(values)
    if name == "sigmoid":
        # Without overflow: 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2.
        return 0.5 + 0.5 * np.tanh(0.5 * values)
    if name == "gelu":
        import torch

        # With the error function, as torch's GELU without approximation.
        made: NDArray[np.float64] = torch.nn.functional.gelu(torch.from_numpy(values)).numpy()
        return made
    return values


def read_heads(paths: Sequence[str], model: Mapping[str, Any], dim: int) -> tuple[Head, ...]:
    """The heads in JSON files, for embeddings of length ``dim`` of a model.

    Args:
        paths: local files ``NAME.json``, each with ``NAME.safetensors`` beside it.
        model: the fingerprint of the model.
        dim: length of an embedding.

    Raises:
        ModelError: a file cannot be read, two heads have the same name or column, or one belongs to another model.
    """
    heads = tuple(read_head(path) for path in paths)
    taken: dict[str, str] = {}
    for path, head in zip(paths, heads, strict=True):
        if same := [
            other for other, one in zip(paths, heads, strict=True) if one.name == head.name and one is not head
        ]:
            raise ModelError(f"{path}: has the name {head.name}, as does {same[0]}; change the name of one of them")
        for column in head.columns:
            if other := taken.get(column.casefold()):
                raise ModelError(f"{path}: writes the column {column}, as does {other}; change the name of one of them")
            taken[column.casefold()] = path
        _check_model(path, head, model, dim)
    return heads


def _check_model(path: str, head: Head, model: Mapping[str, Any], dim: int) -> None:
    wanted = head.layers[0].weight.shape[1]
    if wanted != dim:
        raise ModelError(
            f"{path}: takes embeddings of {wanted} numbers, and those of this model have {dim}; a head fits the model "
            "that it was trained on, and no other"
        )
    if head.model is None:
        log.warning(
            "%s does not say which model it was trained on; that embeddings have %d numbers is all that is known",
            path,
            dim,
        )
        return
    ours = set(model["weights"].values())
    if set(head.model["weights"].values()) != ours:
        raise ModelError(
            f"{path}: was trained on embeddings of {head.model.get('name', 'another model')}, whose weights are not "
            "those of this model; its values would mean nothing. Train it on embeddings of this model, or embed with "
            "the other one"
        )


def read_head(path: str) -> Head:
    """A head from ``NAME.json`` and ``NAME.safetensors``.

    Raises:
        ModelError: one of them cannot be read, or they do not belong together.
    """
    if not is_local(path):
        raise ModelError(f"{path}: a head is read from a local file; copy it and its safetensors to this machine")
    file = local_file(path)
    weights = file.with_suffix(".safetensors")
    if file.suffix != ".json":
        raise ModelError(f"{path}: a head is given by its JSON file, such as {file.with_suffix('.json')}")
    for each in (file, weights):
        try:
            there = each.is_file()
        except OSError as error:
            raise ModelError(f"{short(str(each))}: {error.strerror}") from error
        if not there:
            raise ModelError(
                f"{each}: no such file; a head is NAME.json with NAME.safetensors beside it{from_here(path)}"
            )
    if file.stat().st_size > MOST_BYTES:
        raise ModelError(
            f"{path}: {file.stat().st_size:,} bytes are no description of a head; the tensors go beside it"
        )
    values = read_json(file)
    _refuse_unknown(path, values, _KEYS)
    name, output = values.get("name"), values.get("output", "none")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ModelError(
            f"{path}: name is {name!r:.80}; wanted 1 to 64 letters, digits and underscores, for its column"
        )
    if output not in OUTPUTS:
        raise ModelError(f"{path}: output is {output!r:.80}; wanted one of {', '.join(OUTPUTS)}")
    tensors = _read_tensors(weights)
    layers = _layers(path, values.get("layers"), tensors)
    classes = _classes(path, values.get("classes"), layers[-1].weight.shape[0], output)
    model = values.get("model")
    if model is not None and not _names_weights(model):
        raise ModelError(
            f"{path}: model is {model!r:.80}; wanted an object with the digests of its files under weights"
        )
    columns = tuple(f"head_{name}_{each}" for each in classes) or (f"head_{name}",)
    return Head(
        name=name,
        columns=columns,
        layers=layers,
        output=output,
        model=model,
        fingerprint={
            "columns": list(columns),
            # Not as the file is spelled: where it was trained does not change a number.
            "layers": hashlib.sha256(json.dumps([values["layers"], output], sort_keys=True).encode()).hexdigest(),
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
    )


def _refuse_unknown(path: str, values: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(values) - known):
        raise ModelError(f"{path}: unknown keys {', '.join(unknown)}; a head has {', '.join(sorted(known))}")


def _names_weights(model: Any) -> bool:
    weights = model.get("weights") if isinstance(model, dict) else None
    return isinstance(weights, dict) and bool(weights) and all(isinstance(digest, str) for digest in weights.values())


def _read_tensors(path: Path) -> dict[str, NDArray[np.float64]]:
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        unreal = sorted(name for name, tensor in tensors.items() if tensor.is_complex())
        values = {name: tensor.double().numpy() for name, tensor in tensors.items() if name not in unreal}
    # Of safetensors and of torch, for a file that is none and for types that are no numbers.
    except Exception as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({first_line(error)})") from error
    if unreal:
        raise ModelError(f"{path}: the tensor {unreal[0]} holds complex numbers, and heads are of real ones")
    return values


def _layers(path: str, given: Any, tensors: Mapping[str, NDArray[np.float64]]) -> tuple[Layer, ...]:
    if not isinstance(given, list) or not given:
        raise ModelError(f"{path}: layers is {given!r:.80}; wanted a list of at least one layer")
    layers: list[Layer] = []
    used: set[str] = set()
    for number, each in enumerate(given):
        place = f"{path}: layers[{number}]"
        if not isinstance(each, dict):
            raise ModelError(f"{place} is {each!r:.80}; wanted an object with a weight")
        _refuse_unknown(place, each, _LAYER_KEYS)
        activation = each.get("activation", "none")
        if activation not in ACTIVATIONS:
            raise ModelError(f"{place}: activation is {activation!r:.80}; wanted one of {', '.join(ACTIVATIONS)}")
        weight = _tensor(place, each.get("weight"), tensors, 2)
        bias = np.zeros(len(weight)) if each.get("bias") is None else _tensor(place, each["bias"], tensors, 1)
        if len(bias) != len(weight):
            raise ModelError(f"{place}: its weight has {len(weight)} rows and its bias {len(bias)} values")
        if layers and weight.shape[1] != len(layers[-1].bias):
            raise ModelError(
                f"{place}: takes {weight.shape[1]} values, and the layer before gives {len(layers[-1].bias)}"
            )
        layers.append(Layer(weight, bias, activation))
        used |= {str(each["weight"]), str(each.get("bias"))}
    if left := sorted(set(tensors) - used):
        raise ModelError(f"{path}: no layer uses the tensors {', '.join(left[:5])}; the head is not described whole")
    return tuple(layers)


def _tensor(place: str, name: Any, tensors: Mapping[str, NDArray[np.float64]], axes: int) -> NDArray[np.float64]:
    found = tensors.get(name) if isinstance(name, str) else None
    if found is None:
        raise ModelError(
            f"{place}: no tensor {name!r:.80} is in its safetensors; there are {', '.join(sorted(tensors)[:8])}"
        )
    if found.ndim != axes or 0 in found.shape:
        raise ModelError(f"{place}: the tensor {name} has the shape {list(found.shape)}; wanted {axes} axes")
    if not np.isfinite(found).all():
        raise ModelError(f"{place}: the tensor {name} holds NaN or infinity; train or export the head again")
    return found


def _classes(path: str, given: Any, outputs: int, output: str) -> tuple[str, ...]:
    if given is None:
        if outputs != 1 or output == "softmax":
            raise ModelError(f"{path}: gives {outputs} values with output={output}; name each of them in classes")
        return ()
    fit = isinstance(given, list) and all(isinstance(each, str) and NAME.fullmatch(each) for each in given)
    if not fit or len({each.casefold() for each in given}) != len(given):
        raise ModelError(
            f"{path}: classes is {given!r:.80}; wanted different names of 1 to 64 letters, digits and underscores, "
            "each a part of a column's name"
        )
    if len(given) != outputs:
        raise ModelError(f"{path}: names {len(given)} classes, and its last layer gives {outputs} values")
    if outputs == 1 and output == "softmax":
        raise ModelError(f"{path}: softmax over one class is always 1; take output=sigmoid")
    if outputs > MOST_CLASSES:
        raise ModelError(f"{path}: {outputs} classes would be as many columns; {MOST_CLASSES} are the most")
    return tuple(given)
