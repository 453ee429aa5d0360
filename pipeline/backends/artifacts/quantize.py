"""Conversion of an fp32 ONNX graph to fp16 or int8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends.artifacts.onnx_export import is_large_graph, quiet

# Images for each run of the calibration; the ranges of all runs are merged.
CALIBRATION_BATCH = 8
# Operators of the L2 normalisation at the end of a tower: a sum of squares overflows in fp16.
TAIL = ("Div", "Sqrt", "ReduceSum", "Mul")


def to_fp16(source: Path, target: Path, *, fp32_norms: bool) -> None:
    """Convert weights and arithmetic to fp16; inputs and outputs stay in fp32, with ``fp32_norms`` also LayerNorms.

    The L2 normalisation at the end stays in fp32.
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
            # onnx cannot infer shapes above the size limit of protobuf; those of the exporter are in the graph.
            disable_shape_infer=is_large_graph(graph),
            op_block_list=blocked,
            node_block_list=_tail(graph),
        )
        model = OnnxModel(converted)
        _drop_useless_casts(model.model.graph)
        model.topological_sort()
        model.save_model_to_file(str(target), use_external_data_format=is_large_graph(model.model))


def to_dynamic_int8(source: Path, target: Path) -> None:
    """Quantize weights to int8 by channel, and activations to uint8 with a scale for each tensor at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    # The exporter's shapes would be wrong for weights that are transposed by the quantizer.
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
    """Quantize weights to int8 by channel, and activations to uint8 with scales calibrated on ``pixel_values``.

    Args:
        source: a graph without fused attention, since only its separate products are quantized.
        target: the file to write.
        pixel_values: normalised pixels float32 ``[N, 3, H, W]`` of representative images.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    with quiet():
        # The results of products are quantized only if their type is known to be float. Otherwise
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
    """Batches for the calibration, with the interface of ONNX Runtime's ``CalibrationDataReader``."""

    def __init__(self, pixel_values: np.ndarray) -> None:
        starts = range(0, len(pixel_values), CALIBRATION_BATCH)
        self._batches: Iterator[np.ndarray] = (pixel_values[i : i + CALIBRATION_BATCH] for i in starts)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixel_values": batch}


def _scores(model: Any) -> list[str]:
    """Return the names of products that are direct inputs of a Softmax, as in SigLIP's pooling head.

    If they are quantized, ONNX Runtime 1.31 replaces the Softmax by a QLinearSoftmax with wrong results
    (measured: cosines to fp32 of 0.5, against 0.9999 with its optimizations off).
    """
    taken = {node.input[0] for node in model.graph.node if node.op_type == "Softmax"}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.output[0] in taken]


def _tail(model: Any) -> list[str]:
    """Return the names of the last nodes, from the output back to the projection."""
    producers = {output: node for node in model.graph.node for output in node.output}
    names, waiting = [], [model.graph.output[0].name]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.op_type in TAIL and node.name not in names:
            names.append(node.name)
            waiting += node.input
    return names


def _drop_useless_casts(graph: Any) -> None:
    """Remove duplicate casts of a tensor, and casts of weights that are fp32 already.

    The converter adds one cast for each fp32 node that reads a tensor, all with the same name.
    """
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    seen: set[str] = set()
    originals: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Cast"]:
        if node.input[0] in weights and node.attribute[0].i == TensorProto.FLOAT:
            originals[node.output[0]] = node.input[0]
            graph.node.remove(node)
        elif node.name in seen:
            graph.node.remove(node)
        seen.add(node.name)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = originals.get(name, name)
