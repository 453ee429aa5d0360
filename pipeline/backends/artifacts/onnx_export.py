"""Export of a tower to ONNX, fusion by ONNX Runtime's optimizer, and checks of the graph."""

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

GRAPH = "model.onnx"
# Protobuf is limited to 2 GiB; larger weights are stored in a file beside the graph.
LARGE = 1_800_000_000
OPSET = 20
INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}
ACTIVATIONS = ("QuickGelu", "BiasGelu", "FastGelu", "Gelu")


def export_tower(checkpoint: Checkpoint, tower: str, path: Path) -> None:
    """Write the fp32 graph of the ``image`` or ``text`` tower to ``path``, with standard ONNX operators only.

    The batch axis is dynamic. The token axis of texts is dynamic too, unless the family pads to a fixed length.
    """
    import onnxscript.optimizer

    # A copy: the way of attention is a setting of the tower, which the checkpoint keeps.
    module = copy.deepcopy(checkpoint.tower(tower)).eval()
    module.separate_attention()
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
        # The exporter itself does not fold large tensors.
        onnxscript.optimizer.optimize(program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
        program.save(path, external_data=is_large(module))


def fuse(checkpoint: Checkpoint, tower: str, path: Path, *, attention: bool = True) -> None:
    """Rewrite the graph at ``path`` with ONNX Runtime's transformer optimizer, and check the fusions.

    Without ``attention`` the matrix products of attention stay separate, for static quantization. A tower whose kind of
    graph the optimizer does not know stays as it is.

    Raises:
        ArtifactError: a layer was not fused.
    """
    import onnx
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    sizes = checkpoint.tower(tower).sizes
    if sizes.fusion is None:
        return
    model = onnx.load(str(path))
    # The fusions for CLIP do not cover BERT, which normalises after each block, not before it.
    kind, bert = sizes.fusion, sizes.fusion == "bert"
    name = "" if bert else _name_mask(model)
    if bert and attention:
        _rewrite_mask(model)
    _rewrite_gelu(model)
    options = FusionOptions(kind)
    options.enable_attention = attention
    # BERT's mask is an input of Attention; its embeddings are not fused, since their operator needs int32.
    options.use_raw_attention_mask()
    options.enable_embed_layer_norm = False
    with quiet():
        # Level 0: only the fusions. ONNX Runtime optimizes for the device when it loads the graph.
        optimized = optimize_model(
            model,
            kind,
            num_heads=sizes.heads,
            hidden_size=sizes.width,
            optimization_options=options,
            opt_level=0,
        )
        _rename(optimized.model, name)
        for stale in path.parent.glob(f"{path.name}.data"):
            stale.unlink()
        optimized.save_model_to_file(str(path), use_external_data_format=is_large_graph(optimized.model))
    check_fusions(operators(path), layers=sizes.layers, attention=attention, what=f"{tower} tower")


def check_fusions(counts: Mapping[str, int], *, layers: int, attention: bool, what: str) -> None:
    """Check that the attention, skip connections and activation of every layer are fused.

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
    """Check that a graph refers only to its folder, is valid, and has the expected inputs, outputs and dynamic axes.

    Raises:
        ArtifactError: with the first problem.
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
    """Return the shapes of a graph's inputs or outputs by name; a dynamic axis is its name."""
    return {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def operators(path: Path) -> dict[str, int]:
    """Return the number of nodes of each operator, most frequent first."""
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common())


def is_large(module: torch.nn.Module) -> bool:
    """Return True if the weights exceed one protobuf file."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) > LARGE


def is_large_graph(model: Any) -> bool:
    """Return True if the weights of an ONNX model exceed one protobuf file."""
    size: int = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    return size > LARGE


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of exporters and optimizers, whose results are checked afterwards."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _example(checkpoint: Checkpoint, tower: str) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
    """Return example inputs by name, and their dynamic axes; a batch of one would become a constant."""
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
    """Split packed weights, as of SigLIP's pooling head; onnxscript folds only nodes with one output."""
    import onnx_ir

    for node in list(graph):
        if node.op_type != "Split" or any(value.const_value is None for value in node.inputs):
            continue
        whole, *sizes = (value.const_value.numpy() for value in node.inputs)
        # Without sizes, the parts are equal.
        cuts = np.cumsum(sizes[0])[:-1] if sizes else len(node.outputs)
        parts = np.split(whole, cuts, axis=node.attributes["axis"].as_int())
        for output, part in zip(node.outputs, parts, strict=True):
            name = f"{output.name}_folded"
            value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(part, name=name))
            value.type, value.shape = output.type, output.shape
            output.replace_all_uses_with(value)
            graph.register_initializer(value)
        graph.remove(node, safe=True)


def _rewrite_gelu(model: Any) -> None:
    """Rename GELU's tanh approximation to FastGelu: the optimizer reads every Gelu as the exact one."""
    for node in model.graph.node:
        if node.op_type == "Gelu" and any(attribute.s == b"tanh" for attribute in node.attribute):
            node.op_type, node.domain = "FastGelu", "com.microsoft"
            del node.attribute[:]


def _rewrite_mask(model: Any) -> None:
    """Compute BERT's mask from the input ``attention_mask`` with the nodes that the optimizer detects.

    The old and the new nodes mask exactly the padding.
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
    """Return the name of the tensor that is added to the attention scores, or an empty string."""
    producers = {output: node for node in model.graph.node for output in node.output}
    adds = [producers.get(node.input[0]) for node in model.graph.node if node.op_type == "Softmax"]
    masks = {name for add in adds if add is not None and add.op_type == "Add" for name in add.input[1:]}
    return masks.pop() if len(masks) == 1 else ""


def _name_mask(model: Any) -> str:
    """Rename the tensor that is added to the attention scores to ``attention_mask``; returns its previous name.

    The optimizer detects the mask by this name and passes it to its Attention operator. Image towers have no mask:
    the graph does not change, and the name is empty.
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
