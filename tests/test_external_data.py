"""A graph names no file outside its folder, or is not opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnx", reason="needs the extra onnx")

import onnx
from onnx import TensorProto, helper

from pipeline.backends.artifacts.external_data import check_external
from pipeline.backends.artifacts.onnx_export import check_graph
from pipeline.backends.onnx_session import Provider, open_session
from pipeline.core.errors import ArtifactError

VALUES = np.arange(4, dtype=np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artefact's folder with weights in it, and a secret beside it."""
    folder = tmp_path / "artefact"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "weights.bin", folder / "deep" / "weights.bin", tmp_path / "secret.bin"):
        path.write_bytes(VALUES.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "way-out").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    return folder


def outside(location: str | None) -> TensorProto:
    tensor = TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    if location is not None:
        tensor.external_data.add(key="location", value=location)
    return tensor


def write(folder: Path, tensor: TensorProto, *, place: str = "initializer") -> Path:
    """A graph that adds the tensor to its input; ``place`` is where the tensor stands."""
    value = helper.make_tensor_value_info
    nodes, initializers, functions = [helper.make_node("Add", ["x", "weights"], ["y"])], [], []
    if place == "initializer":
        initializers = [tensor]
    elif place == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["weights"], value=tensor))
    elif place == "branch":
        inner = helper.make_graph([], "branch", [], [value("weights", 1, [4])], [tensor])
        nodes.insert(0, helper.make_node("If", ["c"], ["weights"], then_branch=inner, else_branch=inner))
        initializers = [helper.make_tensor("c", TensorProto.BOOL, [], [True])]
    else:
        constant = helper.make_node("Constant", [], ["out"], value=tensor)
        functions = [helper.make_function("own", "F", [], ["out"], [constant], [helper.make_opsetid("", 20)])]
        nodes.insert(0, helper.make_node("F", [], ["weights"], domain="own"))
    graph = helper.make_graph(nodes, "graph", [value("x", 1, [4])], [value("y", 1, [4])], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def opened(path: Path) -> Any:
    device = torch.device("cpu")
    return open_session(path, Provider("cpu"), device=device, batch_size=1, stream=None)


@pytest.mark.parametrize("location", ["weights.bin", "deep/weights.bin"])
def test_weights_in_the_folder_are_read(folder: Path, location: str) -> None:
    session = opened(write(folder, outside(location)))
    assert np.array_equal(session.run(["y"], {"x": VALUES})[0], VALUES * 2)


@pytest.mark.parametrize(
    "location",
    [
        *("../secret.bin", "deep/../../secret.bin", "deep/../weights.bin", "./weights.bin", "{outside}/secret.bin"),
        *("link.bin", "way-out/secret.bin", "pipe", "deep", ".", "", "nothing.bin", "/dev/zero", None),
    ],
)
def test_any_other_place_is_refused_before_anything_opens_the_graph(folder: Path, location: str | None) -> None:
    path = write(folder, outside(location and location.format(outside=folder.parent)))
    for open_it in (check_external, opened, lambda path: check_graph(path, "image")):
        with pytest.raises(ArtifactError, match=r"the tensor 'weights' points to .* it is not opened"):
            open_it(path)


@pytest.mark.parametrize("place", ["constant", "branch", "function"])
def test_a_tensor_may_hide_anywhere_in_the_graph(folder: Path, place: str) -> None:
    with pytest.raises(ArtifactError, match=r"the tensor 'weights' points to '../secret.bin'"):
        check_external(write(folder, outside("../secret.bin"), place=place))


def test_machine_code_in_a_graph_is_refused(folder: Path) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], name="code", domain="com.microsoft", ep_cache_context="/tmp/x")
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([node], "graph", [], [])).SerializeToString())
    with pytest.raises(ArtifactError, match="EPContext"):
        opened(path)


def test_what_is_no_graph_is_said(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match="cannot be read as an ONNX graph"):
        check_external(folder / "model.onnx")
    with pytest.raises(ArtifactError, match="cannot be read as an ONNX graph"):
        check_external(folder / "none.onnx")


def test_a_graph_that_holds_its_weights_passes(folder: Path) -> None:
    check_external(write(folder, onnx.numpy_helper.from_array(VALUES, "weights")))
