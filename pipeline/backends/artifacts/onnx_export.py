"""A tower to an ONNX graph: exported, fused by ONNX Runtime's optimizer, checked."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backends.artifacts.external_data import check_external
from pipeline.core.errors import ArtifactError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower, TextTower

GRAPH = "model.onnx"
# Protobuf ends at 2 GiB; larger weights lie in a file beside the graph.
LARGE = 1_800_000_000
OPSET = 20
INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}
ACTIVATIONS = ("QuickGelu", "BiasGelu", "FastGelu", "Gelu")


def export_tower(checkpoint: Checkpoint, tower: str, path: Path) -> None:
    """Write the fp32 graph of the ``image`` or the ``text`` tower to ``path``, in ONNX's standard operators alone.

    The batch axis is dynamic, for texts the token axis too, unless the family pads to one length.
    """
    import onnxscript.optimizer

    # A copy, since the attention is set on the configuration, which the tower shares with the checkpoint.
    module = copy.deepcopy(ImageTower(checkpoint) if tower == "image" else TextTower(checkpoint)).eval()
    # The optimizer knows attention by its matrix products, not as one operator.
    module.model.set_attn_implementation("eager")
    arguments, dynamic = _example(checkpoint, tower)
    with quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            tuple(arguments.values()),
            input_names=list(arguments),
            output_names=[OUTPUTS[tower]],
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        _fold_splits(program.model.graph)
        # The exporter's own folding leaves large tensors alone.
        onnxscript.optimizer.optimize(program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
        program.save(path, external_data=is_large(module))


def fuse(checkpoint: Checkpoint, tower: str, path: Path, *, attention: bool = True) -> None:
    """Rewrite the graph at ``path`` with ONNX Runtime's transformer optimizer, and count what was fused.

    Without ``attention`` its matrix products stay what they are, for quantization with fixed scales.

    Raises:
        ArtifactError: a layer kept its parts.
    """
    import onnx
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    config = getattr(checkpoint.model.config, "vision_config" if tower == "image" else "text_config")
    model = onnx.load(str(path))
    # Not what the fusions know: texts of BERT, which normalises after each block, not before it.
    bert = tower == "text" and checkpoint.family == "chinese_clip"
    name = "" if bert else _name_mask(model)
    if bert and attention:
        _spell_out_mask(model)
    _spell_out_gelu(model)
    kind = "bert" if bert else "clip"
    options = FusionOptions(kind)
    options.enable_attention = attention
    # BERT's mask goes into Attention as it is, and its embeddings stay in parts: their operator wants int32.
    options.use_raw_attention_mask()
    options.enable_embed_layer_norm = False
    with quiet():
        # Level 0: only the fusions. ONNX Runtime does the rest when it loads the graph, for its own device.
        optimized = optimize_model(
            model,
            kind,
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            optimization_options=options,
            opt_level=0,
        )
        _rename(optimized.model, name)
        for stale in path.parent.glob(f"{path.name}.data"):
            stale.unlink()
        optimized.save_model_to_file(str(path), use_external_data_format=is_large_graph(optimized.model))
    check_fusions(operators(path), layers=config.num_hidden_layers, attention=attention, what=f"{tower} tower")


def check_fusions(counts: Mapping[str, int], *, layers: int, attention: bool, what: str) -> None:
    """Pass if every layer's attention, skip connections and activation became one operator each.

    Raises:
        ArtifactError: with the counts.
    """
    wanted = {"SkipLayerNormalization": 2 * layers - 1, **({"Attention": layers} if attention else {})}
    missing = [
        f"{counts.get(name, 0)} of {number} {name}" for name, number in wanted.items() if counts.get(name, 0) < number
    ]
    active = sum(counts.get(name, 0) for name in ACTIVATIONS)
    if active < layers:
        missing.append(f"{active} of {layers} {'/'.join(ACTIVATIONS)}")
    if missing:
        raise ArtifactError(
            f"{what}: ONNX Runtime's optimizer fused only {', '.join(missing)}, so that the graph would be slow; these "
            "versions of torch, transformers and onnxruntime do not fit: take those of constraints.txt"
        )


def check_graph(path: Path, tower: str) -> None:
    """Pass if the graph keeps to its folder, is valid, and its inputs and outputs have the declared names and axes.

    Raises:
        ArtifactError: with what is wrong.
    """
    import onnx

    check_external(path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"{path}: not a valid ONNX model: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    inputs, outputs = axes(graph.input), axes(graph.output)
    wanted = INPUTS[tower]
    if tuple(inputs) != wanted or tuple(outputs) != (OUTPUTS[tower],):
        raise ArtifactError(f"{path}: {', '.join(inputs)} -> {', '.join(outputs)}, not {wanted} -> {OUTPUTS[tower]}")
    for name, shape in {**inputs, **outputs}.items():
        if not isinstance(shape[0], str):
            raise ArtifactError(f"{path}: the first axis of {name} is {shape[0]}, not dynamic")


def axes(values: Any) -> dict[str, tuple[int | str, ...]]:
    """Names of a graph's inputs or outputs with their shapes; a dynamic axis is its name."""
    return {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def operators(path: Path) -> dict[str, int]:
    """How many nodes of each operator a graph has, most frequent first."""
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common())


def is_large(module: torch.nn.Module) -> bool:
    """Whether the weights do not fit into one protobuf file."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) > LARGE


def is_large_graph(model: Any) -> bool:
    """Whether the weights of an ONNX model do not fit into one protobuf file."""
    size: int = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    return size > LARGE


@contextmanager
def quiet() -> Iterator[None]:
    """Silence for exporters and optimizers: they warn about themselves, and their results are checked."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _example(checkpoint: Checkpoint, tower: str) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
    """Inputs to trace with, by name, and their dynamic axes; two rows, since one would be taken for a constant."""
    batch = torch.export.Dim("batch")
    if tower == "image":
        height, width = checkpoint.spec.size
        return {"pixel_values": torch.zeros(2, 3, height, width)}, ({0: batch},)
    tokens = checkpoint.tokenize(["a photo of a cat", "a red circle on a blue square"])
    ids = tokens["input_ids"]
    padded = checkpoint.tokenize(["a"])["input_ids"].shape[1] == ids.shape[1]
    dims = {0: batch} if padded else {0: batch, 1: torch.export.Dim("tokens", min=2, max=checkpoint.max_tokens)}
    return {"input_ids": ids, "attention_mask": tokens.get("attention_mask", torch.ones_like(ids))}, (dims, dict(dims))


def _fold_splits(graph: Any) -> None:
    """Cut the packed weights of SigLIP's pooling head; onnxscript folds only nodes of one output."""
    import onnx_ir

    for node in list(graph):
        if node.op_type != "Split" or any(value.const_value is None for value in node.inputs):
            continue
        whole, sizes = (value.const_value.numpy() for value in node.inputs)
        parts = np.split(whole, np.cumsum(sizes)[:-1], axis=node.attributes["axis"].as_int())
        for output, part in zip(node.outputs, parts, strict=True):
            name = f"{output.name}_folded"
            value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(part, name=name))
            value.type, value.shape = output.type, output.shape
            output.replace_all_uses_with(value)
            graph.register_initializer(value)
        graph.remove(node, safe=True)


def _spell_out_gelu(model: Any) -> None:
    """Name GELU's tanh approximation FastGelu: the optimizer takes every Gelu for the exact one."""
    for node in model.graph.node:
        if node.op_type == "Gelu" and any(attribute.s == b"tanh" for attribute in node.attribute):
            node.op_type, node.domain = "FastGelu", "com.microsoft"
            del node.attribute[:]


def _spell_out_mask(model: Any) -> None:
    """Make the mask of BERT's scores from the input ``attention_mask`` in the way that the optimizer knows.

    Both hide the padding and nothing else.
    """
    from onnx import TensorProto, helper, numpy_helper

    mask = _mask(model)
    constants = {
        "padding_first": np.array([1]),
        "padding_second": np.array([2]),
        "padding_shape": np.array([1, 1, 1, 1]),
        "padding_one": np.array(1),
        "padding_lowest": np.array(np.finfo(np.float32).min),
        "padding_zero": np.array(0, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        helper.make_node("Unsqueeze", ["attention_mask", "padding_first"], ["padding_1"]),
        helper.make_node("Unsqueeze", ["padding_1", "padding_second"], ["padding_2"]),
        helper.make_node("Expand", ["padding_2", "padding_shape"], ["padding_3"]),
        helper.make_node("Sub", ["padding_one", "padding_3"], ["padding_4"]),
        helper.make_node("Cast", ["padding_4"], ["padding_5"], to=TensorProto.BOOL),
        helper.make_node("Where", ["padding_5", "padding_lowest", "padding_zero"], [mask]),
    ]
    old = next(node for node in model.graph.node if mask in node.output)
    old.output[0] = "padding_before"
    for i, node in enumerate(nodes):
        node.name = f"padding_{i}"
        model.graph.node.insert(i, node)


def _mask(model: Any) -> str:
    """The tensor that is added to the attention's scores; empty where there is none."""
    producers = {output: node for node in model.graph.node for output in node.output}
    adds = [producers.get(node.input[0]) for node in model.graph.node if node.op_type == "Softmax"]
    masks = {name for add in adds if add is not None and add.op_type == "Add" for name in add.input[1:]}
    return masks.pop() if len(masks) == 1 else ""


def _name_mask(model: Any) -> str:
    """Call the tensor that is added to the attention's scores ``attention_mask``; returns its own name.

    By that name the optimizer knows it, and takes it over into its Attention operator as it is. Where there
    is none (image towers), nothing changes and the name is empty.
    """
    mask = _mask(model)
    if mask:
        _swap(model, {"attention_mask": "attention_mask_input", mask: "attention_mask"})
    return mask


def _rename(model: Any, mask: str) -> None:
    if mask:
        _swap(model, {"attention_mask": mask, "attention_mask_input": "attention_mask"})


def _swap(model: Any, names: Mapping[str, str]) -> None:
    for node in model.graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = names.get(name, name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.name = names.get(value.name, value.name)
