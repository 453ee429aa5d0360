"""An fp32 ONNX graph to one with fp16 or int8 weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends.artifacts.onnx_export import is_large_graph, quiet

# Images for each run of the calibration; its figures of many are merged.
CALIBRATION_BATCH = 8
# The operators at the end of a tower that bring a vector to length 1: a sum of squares overflows fp16.
TAIL = ("Div", "Sqrt", "ReduceSum", "Mul")


def to_fp16(source: Path, target: Path, *, fp32_norms: bool) -> None:
    """Weights and arithmetic in fp16, inputs and outputs in fp32; with ``fp32_norms`` the LayerNorms too.

    The normalisation to length 1 at the end stays in fp32.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    graph = onnx.load(str(source))
    blocked = [*DEFAULT_OP_BLOCK_LIST, *(["LayerNormalization"] if fp32_norms else [])]
    with quiet():
        converted = convert_float_to_float16(
            graph,
            keep_io_types=True,
            # onnx cannot infer shapes over the limit of a protobuf; the exporter's own are there.
            disable_shape_infer=is_large_graph(graph),
            op_block_list=blocked,
            node_block_list=_tail(graph),
        )
        model = OnnxModel(converted)
        _drop_useless_casts(model.model.graph)
        model.topological_sort()
        model.save_model_to_file(str(target), use_external_data_format=is_large_graph(model.model))


def to_dynamic_int8(source: Path, target: Path) -> None:
    """Weights in int8 by channel; activations in uint8, scaled for every tensor as it comes."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    # The exporter's notes on shapes would be wrong for weights that are turned round on the way.
    del model.graph.value_info[:]
    with quiet():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Attention"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large_graph(model),
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )


def to_static_int8(source: Path, target: Path, pixel_values: np.ndarray) -> None:
    """Weights in int8 by channel; activations in uint8 by scales that follow from ``pixel_values``.

    Args:
        source: a graph without fused attention, since its products are quantized one by one.
        target: the file to write.
        pixel_values: normalised pixels float32 ``[N, 3, H, W]`` of images like those to come.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    with quiet():
        # Only products whose result is known to be float get their results quantized too, and without that
        # ONNX Runtime 1.31 computes them in float (measured on a ViT-B/32: 20 images/s, against 44).
        model = SymbolicShapeInference.infer_shapes(onnx.load(str(source)), auto_merge=True)
        quantize_static(
            model,
            target,
            _Reader(pixel_values),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=_scores(model),
            use_external_data_format=is_large_graph(model),
            extra_options={"MatMulConstBOnly": True},
        )


class _Reader:
    """Hands the calibration one batch after the other; the interface is ONNX Runtime's ``CalibrationDataReader``."""

    def __init__(self, pixel_values: np.ndarray) -> None:
        starts = range(0, len(pixel_values), CALIBRATION_BATCH)
        self._batches: Iterator[np.ndarray] = (pixel_values[i : i + CALIBRATION_BATCH] for i in starts)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixel_values": batch}


def _scores(model: Any) -> list[str]:
    """Names of the products that a Softmax takes as they are, as in SigLIP's pooling head.

    Were they quantized, ONNX Runtime 1.31 would make the Softmax a QLinearSoftmax, whose results are wrong
    (measured: cosines to fp32 of 0.5, against 0.9999 with its optimizations off).
    """
    taken = {node.input[0] for node in model.graph.node if node.op_type == "Softmax"}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.output[0] in taken]


def _tail(model: Any) -> list[str]:
    """Names of the last nodes, from the output back to the projection."""
    producers = {output: node for node in model.graph.node for output in node.output}
    names, waiting = [], [model.graph.output[0].name]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.op_type in TAIL and node.name not in names:
            names.append(node.name)
            waiting += node.input
    return names


def _drop_useless_casts(graph: Any) -> None:
    """A tensor that several fp32 nodes take gets one cast for each, all of one name; one is enough.

    Weights of theirs, which stayed fp32, get one as well; none is enough.
    """
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    seen: set[str] = set()
    own: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Cast"]:
        if node.input[0] in weights and node.attribute[0].i == TensorProto.FLOAT:
            own[node.output[0]] = node.input[0]
            graph.node.remove(node)
        elif node.name in seen:
            graph.node.remove(node)
        seen.add(node.name)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = own.get(name, name)
