"""Backends: the same model on different runtimes, opened by name from a table."""

from __future__ import annotations

from importlib import import_module

from pipeline.backends.base import BackendFactory

# Name to module; a module is imported when its backend is opened, never before.
TABLE: dict[str, str] = {
    "torch": "pipeline.backends.torch",
    "torchscript": "pipeline.backends.torchscript",
    "torch_int8": "pipeline.backends.torch_int8",
    "torch_fp8": "pipeline.backends.torch_fp8",
    "onnx": "pipeline.backends.onnx",
    "onnx_int8": "pipeline.backends.onnx_int8",
    "tensorrt": "pipeline.backends.tensorrt",
}


def factory(name: str) -> BackendFactory:
    """The ``open_encoder`` function of the backend ``name``."""
    opener: BackendFactory = import_module(TABLE[name]).open_encoder
    return opener
