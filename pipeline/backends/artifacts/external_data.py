"""Confinement of an ONNX graph to its folder: a graph can refer to any file as its external data."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.backends.artifacts.metadata import is_inside
from pipeline.core.errors import ArtifactError


def check_external(path: Path) -> None:
    """Check that every file that the graph at ``path`` refers to is a plain file in its folder; none of them is read.

    Call this before ONNX or ONNX Runtime loads the graph, since both open the files that it refers to.

    Raises:
        ArtifactError: a name leads out of the folder or to a link, or the file is not a graph.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read as an ONNX graph: {error}") from error
    for what, name in _named(model):
        if not is_inside(name) or not _is_plain(path.parent, name):
            raise ArtifactError(
                f"{path}: {what} points to {name!r}, which is not a plain file in the graph's folder; "
                "it is not opened. Export the artefact again from a checkpoint that you trust"
            )


def _named(message: Any) -> Iterator[tuple[str, str]]:
    """Yield every file reference in a graph, its subgraphs and functions, with the element that contains it."""
    import onnx

    if isinstance(message, onnx.TensorProto):
        external = message.data_location == onnx.TensorProto.EXTERNAL
        for entry in message.external_data:
            if entry.key == "location":
                yield f"the tensor {message.name!r}", entry.value
                external = False
        if external:
            yield f"the tensor {message.name!r}", ""
        return
    if isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
        # A graph compiled for one device: machine code, in the graph or in a file.
        yield f"the node {message.name!r} (EPContext)", ""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if hasattr(value, "ListFields") else value:
                yield from _named(one)


def _is_plain(folder: Path, name: str) -> bool:
    """Return True for a plain file whose path has no links."""
    here = folder
    for part in name.split("/"):
        here /= part
        try:
            mode = os.lstat(here).st_mode
        except OSError:
            return False
        if stat.S_ISLNK(mode):
            return False
    return stat.S_ISREG(mode)
