"""``save_head``: a model that was trained on embeddings, as the files of :mod:`pipeline.models.heads`."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ModelError
from pipeline.storage.urls import is_local, local_file

# Activations by their names in scikit-learn, and their names in a head.
_ACTIVATIONS = {"identity": "none", "logistic": "sigmoid", "relu": "relu", "tanh": "tanh", "softmax": "softmax"}
# Of torch's modules; those without a name change nothing when a model is used.
_MODULES = {"ReLU": "relu", "GELU": "gelu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Dropout": None, "Identity": None}
# Vectors that a saved head is compared on with the estimator, and the largest difference of a value.
CHECKED, NEAR = 64, 1e-4
_Layers = list[tuple[NDArray[np.float64], NDArray[np.float64], str]]


def save_head(path: str | os.PathLike[str], estimator: Any, *, dataset: Any = None, name: str | None = None) -> Path:
    """Save a model of embeddings as a head: ``labels.heads=[PATH]`` then writes its values as columns.

    Args:
        path: ``NAME.json``; its tensors go to ``NAME.safetensors`` beside it.
        estimator: a fitted estimator of scikit-learn (LogisticRegression, LinearRegression, Ridge, MLPClassifier,
            MLPRegressor, or a pipeline of a StandardScaler and one of them), or a ``torch.nn.Sequential`` of Linear,
            ReLU, GELU, Tanh, Sigmoid and Dropout. A classifier gives the probability of each class, one of two classes
            that of the second.
        dataset: the dataset whose embeddings it was trained on, or its folder: the head is refused for other models.
        name: of its column ``head_<name>``; the default is the name of the file.

    Returns:
        The JSON file.

    Raises:
        ModelError: the estimator is of another kind, what is saved would not give its values, or it cannot be written.
    """
    file = _file_of(path)
    layers, output, classes = _parts(estimator)
    tensors: dict[str, NDArray[Any]] = {}
    described: list[dict[str, str]] = []
    for number, (weight, bias, activation) in enumerate(layers):
        tensors |= {f"{number}.weight": np.ascontiguousarray(weight), f"{number}.bias": np.ascontiguousarray(bias)}
        described.append({"weight": f"{number}.weight", "bias": f"{number}.bias", "activation": activation})
    content: dict[str, Any] = {"name": file.stem if name is None else name, "layers": described, "output": output}
    if classes:
        content["classes"] = classes
    if dataset is not None:
        content["model"] = _model_of(dataset)
    try:
        _write(file, tensors, content, estimator)
    except OSError as error:
        raise ModelError(f"{file}: cannot be written ({error.strerror}); name a folder that can") from error
    return file


def _write(file: Path, tensors: dict[str, NDArray[Any]], content: dict[str, Any], estimator: Any) -> None:
    """Write both files of a head, once it is compared with the estimator."""
    from safetensors.numpy import save_file

    from pipeline.models.heads import read_head

    file.parent.mkdir(parents=True, exist_ok=True)
    # A head that is refused replaces no earlier one, and leaves no files.
    with TemporaryDirectory(dir=file.parent, prefix=".head-") as folder:
        draft = Path(folder) / file.name
        save_file(tensors, draft.with_suffix(".safetensors"))
        draft.write_text(json.dumps(content, indent=2) + "\n")
        try:
            head = read_head(str(draft))
        except ModelError as error:
            raise ModelError(str(error).replace(str(draft), str(file))) from None
        _check(estimator, head)
        for suffix in (".safetensors", ".json"):
            draft.with_suffix(suffix).replace(file.with_suffix(suffix))


def _file_of(path: str | os.PathLike[str]) -> Path:
    file = local_file(os.fspath(path))
    if not is_local(os.fspath(path)) or file.suffix != ".json" or file.is_dir():
        raise ModelError(f"{path}: a head is saved as a local JSON file, such as heads/taste.json; give such a path")
    return file


def _model_of(dataset: Any) -> dict[str, Any]:
    from pipeline.dataset.dataset import open_dataset

    stored = open_dataset(str(getattr(dataset, "url", dataset)))
    return {"name": str(stored.plan.about["model"]), "weights": stored.plan.fingerprints["model"]["weights"]}


def _parts(estimator: Any) -> tuple[_Layers, str, list[str]]:
    """The layers of an estimator, how its output is taken, and the names of its classes."""
    if hasattr(estimator, "named_children"):
        layers = _layers_of_torch(estimator)
        return layers, "none", _named([], layers)
    *before, last = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
    classes = [str(each) for each in getattr(last, "classes_", ())]
    if classes and not hasattr(last, "predict_proba"):
        raise ModelError(
            f"{type(last).__name__}: gives no probabilities of its classes, which the columns of a head would hold; "
            "take a LogisticRegression"
        )
    if hasattr(last, "coefs_"):
        inner, output = _ACTIVATIONS.get(last.activation, "?"), _ACTIVATIONS.get(last.out_activation_, "?")
        pairs = zip(last.coefs_, last.intercepts_, strict=True)
        layers = [(np.asarray(weight, np.float64).T, np.asarray(bias, np.float64), inner) for weight, bias in pairs]
        layers[-1] = (*layers[-1][:2], "none")
    elif hasattr(last, "coef_"):
        # sparsify() makes the coefficients sparse.
        coefficients = last.coef_.toarray() if hasattr(last.coef_, "toarray") else last.coef_
        weight = np.atleast_2d(np.asarray(coefficients, np.float64))
        bias = np.broadcast_to(np.asarray(last.intercept_, np.float64), len(weight)).copy()
        layers = [(weight, bias, "none")]
        output = ("softmax" if len(weight) > 1 else "sigmoid") if classes else "none"
    elif hasattr(last, "fit") and not any(name.endswith("_") for name in vars(last)):
        raise ModelError(f"{type(last).__name__}: is not fitted; fit it on embeddings before you save it")
    else:
        raise ModelError(
            f"{type(last).__name__}: cannot be saved as a head, which is made of linear layers; take a "
            "LogisticRegression, a Ridge, an MLPClassifier or MLPRegressor, or a torch.nn.Sequential of Linear layers"
        )
    for step in reversed(before):
        layers[0] = _behind(step, layers[0])
    return layers, output, _named(classes, layers)


def _named(classes: list[str], layers: _Layers) -> list[str]:
    """The names of the outputs of layers: of classes if there are any, else numbers; none for a single output."""
    outputs = len(layers[-1][1])
    return (classes or [str(number) for number in range(outputs)]) if outputs > 1 else []


def _behind(step: Any, layer: tuple[NDArray[np.float64], NDArray[np.float64], str]) -> Any:
    """The layer that does what a StandardScaler and the layer behind it do."""
    if type(step).__name__ != "StandardScaler":
        raise ModelError(
            f"{type(step).__name__}: only a StandardScaler may stand before the estimator of a head; fit the "
            "estimator on the embeddings themselves"
        )
    weight, bias, activation = layer
    scale = np.ones(weight.shape[1]) if step.scale_ is None else step.scale_
    mean = np.zeros(weight.shape[1]) if step.mean_ is None or not step.with_mean else step.mean_
    return weight / scale, bias - weight @ (mean / scale), activation


def _layers_of_torch(module: Any) -> _Layers:
    layers: _Layers = []
    for child in _flat(module):
        kind = type(child).__name__
        if kind == "Linear":
            weight = child.weight.detach().double().cpu().numpy()
            bias = np.zeros(len(weight)) if child.bias is None else child.bias.detach().double().cpu().numpy()
            layers.append((weight, bias, "none"))
        elif kind not in _MODULES or not layers or (kind == "GELU" and child.approximate != "none"):
            raise ModelError(
                f"{child}: cannot be saved as a part of a head; it may have {', '.join(_MODULES)} behind Linear"
            )
        elif (activation := _MODULES[kind]) is not None:
            weight, bias, before = layers[-1]
            if before != "none":
                raise ModelError(f"{child}: a head has one activation behind each Linear")
            layers[-1] = (weight, bias, activation)
    if not layers:
        raise ModelError(f"{type(module).__name__}: has no Linear layer, so it is no head")
    return layers


def _flat(module: Any) -> Iterator[Any]:
    children = [child for _, child in module.named_children()]
    if type(module).__name__ == "Sequential":
        for child in children:
            yield from _flat(child)
    else:
        yield module


def _check(estimator: Any, head: Any) -> None:
    """Compare what was saved with the estimator, on vectors of length 1."""
    dim = head.layers[0].weight.shape[1]
    vectors = np.random.default_rng(0).normal(size=(CHECKED, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if hasattr(estimator, "named_children"):
        import torch

        # A copy, as in float64 a module in half precision gives its own values too.
        with torch.inference_mode():
            wanted = copy.deepcopy(estimator).eval().cpu().double()(torch.from_numpy(vectors)).numpy()
    elif hasattr(estimator, "predict_proba"):
        wanted = np.asarray(estimator.predict_proba(vectors))
        wanted = wanted if len(head.columns) > 1 else wanted[:, -1:]
    else:
        wanted = np.asarray(estimator.predict(vectors)).reshape(CHECKED, -1)
    found = head(vectors)
    if found.shape != wanted.shape or not np.abs(found - wanted).max() <= NEAR * max(1.0, float(np.abs(wanted).max())):
        raise ModelError(
            f"{type(estimator).__name__}: what it computes cannot be saved as a head: its own values differ from "
            "those of its linear layers; take a LogisticRegression, a Ridge, or an MLP"
        )
