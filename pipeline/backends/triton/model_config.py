"""Triton's configuration of one model, from its ONNX graph and the serving settings."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backends.triton.pbtxt import Name
from pipeline.core.errors import ArtifactError, Problem
from pipeline.storage.urls import is_local, local_path

# ONNX's TensorProto.DataType by Triton's names (onnxruntime_backend, ConvertFromOnnxDataType).
TYPES = {
    1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 4: "TYPE_UINT16", 5: "TYPE_INT16", 6: "TYPE_INT32",
    7: "TYPE_INT64", 8: "TYPE_STRING", 9: "TYPE_BOOL", 10: "TYPE_FP16", 11: "TYPE_FP64", 12: "TYPE_UINT32",
    13: "TYPE_UINT64",
}  # fmt: skip
# Smallest preferred batch size.
SMALLEST_PREFERRED = 8
# Fewest tokens that the exported text graphs accept.
FEWEST_TOKENS = 2
WARMUP = "warmup"


@dataclass(frozen=True, slots=True)
class Serving:
    """Serving settings of a model.

    ``queue_microseconds`` is the longest time that a request waits for others to share its batch. ``instances`` is the
    number of copies on each GPU or CPU. ``engine_cache`` is the server's absolute folder for TensorRT engines; without
    it, they are built at every start.
    """

    max_batch_size: int = 64
    queue_microseconds: int = 2000
    instances: int = 1
    tensorrt: bool = False
    engine_cache: str | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """Input or output of a graph; ``dims`` exclude the batch axis, -1 is a dynamic axis."""

    name: str
    type: Name
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """Inputs, outputs and versions of ONNX's IR and operator set of a graph.

    ``precision`` is fp32, fp16 or int8, ``tokens`` the length of the longest text.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ir: int
    opset: int
    precision: str
    tokens: int


def place_of(out: str) -> Path:
    """Return the absolute path of ``--out``."""
    return Path(os.path.abspath(os.path.expanduser(local_path(out))))


def problem_of(out: str) -> Problem | None:
    """Return the problem with ``--out``, if any: it must be a local path that does not exist yet."""
    if not is_local(out):
        return Problem("--out", out, "must be a local folder", "write it here, then copy it to the store")
    if os.path.lexists(place_of(out)):
        return Problem("--out", out, "is there already", "name another folder, or remove it")
    return None


def read_graph(path: Path, precision: str, tokens: int) -> Graph:
    """Read a graph's inputs and outputs; its weights are not loaded.

    Raises:
        ArtifactError: a tensor has a type that Triton does not support, or a first axis that is not the batch.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    inputs = tuple(_tensor(value, path) for value in model.graph.input)
    outputs = tuple(_tensor(value, path) for value in model.graph.output)
    return Graph(inputs, outputs, ir=model.ir_version, opset=opset, precision=precision, tokens=tokens)


def _tensor(value: Any, path: Path) -> Tensor:
    kind = value.type.tensor_type
    batch, *axes = kind.shape.dim
    if kind.elem_type not in TYPES or batch.HasField("dim_value"):
        raise ArtifactError(
            f"{path}: {value.name} has ONNX's type {kind.elem_type} and {batch.dim_value or 'any number of'} rows; "
            "Triton batches its own types, in any number of rows; export the model again"
        )
    dims = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in axes)
    return Tensor(value.name, Name(TYPES[kind.elem_type]), dims)


def model_config(name: str, graph: Graph, serving: Serving, about: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of Triton's ``ModelConfig`` (triton-inference-server/common, ``model_config.proto``).

    Args:
        name: the model's folder.
        graph: its inputs and outputs.
        serving: the serving settings.
        about: parameters that the server returns with the model's configuration.
    """
    return {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": serving.max_batch_size,
        "input": [_described(tensor) for tensor in graph.inputs],
        "output": [_described(tensor) for tensor in graph.outputs],
        "instance_group": [{"kind": _kind(graph, serving), "count": serving.instances}],
        "dynamic_batching": {
            "preferred_batch_size": preferred(serving.max_batch_size),
            "max_queue_delay_microseconds": serving.queue_microseconds,
        },
        "optimization": _optimization(graph, serving),
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in about.items() if value],
        "model_warmup": [_warmup(graph, size) for size in sorted({1, serving.max_batch_size})],
    }


def preferred(most: int) -> list[int]:
    """Return the batch sizes that start at once: 8 and its doubles below the largest, and the largest."""
    doubles = (SMALLEST_PREFERRED * 2**step for step in itertools.count())
    return [*itertools.takewhile(lambda size: size < most, doubles), most]


def filled(tensor: Tensor, tokens: int) -> tuple[int, ...]:
    """Return the shape of one row with every dynamic axis at the length of the longest text."""
    return tuple(tokens if axis < 0 else axis for axis in tensor.dims)


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": tensor.type, "dims": list(tensor.dims)}


def _kind(graph: Graph, serving: Serving) -> Name:
    # TensorRT and fp16 need a GPU; the integer products of a dynamically quantized graph run on the CPU only.
    if serving.tensorrt or graph.precision == "fp16":
        return Name("KIND_GPU")
    return Name("KIND_CPU" if graph.precision == "int8" else "KIND_AUTO")


def _optimization(graph: Graph, serving: Serving) -> dict[str, Any] | None:
    if serving.tensorrt:
        name, options = "tensorrt", _engine(graph, serving)
    elif graph.precision == "fp32":
        # By default ONNX Runtime computes fp32 on CUDA in TF32, which is not fp32. Ignored without a GPU.
        name, options = "cuda", {"use_tf32": "0"}
    else:
        return None
    parameters = [{"key": key, "value": value} for key, value in options.items()]
    return {"execution_accelerators": {"gpu_execution_accelerator": [{"name": name, "parameters": parameters}]}}


def _engine(graph: Graph, serving: Serving) -> dict[str, str]:
    """Return the options of one engine for all shapes: building one per shape would delay requests."""
    least = _shapes(graph, 1, FEWEST_TOKENS)
    most = _shapes(graph, serving.max_batch_size, graph.tokens)
    options = {
        "precision_mode": graph.precision.upper(),
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": most,
        "trt_profile_max_shapes": most,
    }
    if graph.precision == "fp16":
        options["trt_layer_norm_fp32_fallback"] = "1"
    if serving.engine_cache is not None:
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": serving.engine_cache}
    return options


def _shapes(graph: Graph, batch: int, tokens: int) -> str:
    return ",".join(
        f"{tensor.name}:{'x'.join(str(axis) for axis in (batch, *filled(tensor, tokens)))}" for tensor in graph.inputs
    )


def _warmup(graph: Graph, size: int) -> dict[str, Any]:
    """Return the warm-up request of an instance: black images, or a text from a file."""
    inputs = []
    for tensor in graph.inputs:
        shape = filled(tensor, graph.tokens)
        data = {"input_data_file": tensor.name} if len(shape) == 1 else {"zero_data": True}
        inputs.append({"key": tensor.name, "value": {"data_type": tensor.type, "dims": list(shape), **data}})
    return {"name": f"batch of {size}", "batch_size": size, "inputs": inputs}


def slug(name: str) -> str:
    """Return the last part of a model's hub name or path with only characters that are valid in a URL."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-") or "model"
