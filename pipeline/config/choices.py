"""Backends and clusters that the config can name, with what they need: one row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BackendInfo:
    """Facts of the backend in the module of its name in :mod:`pipeline.backends`.

    Attributes:
        precisions: those that it computes in; ``auto`` takes the only one where there is one.
        extra: extra of this package that it needs; empty for none.
        packages: distributions of its runtime besides torch; their versions are in reports and in benchmarks.
        torch_compile: it is compiled by torch, whatever ``backend.compile`` is.
        builds: it builds an engine for each batch size.
    """

    precisions: tuple[str, ...]
    extra: str = ""
    packages: tuple[str, ...] = ()
    torch_compile: bool = False
    builds: bool = False


ONNX = ("onnxruntime", "onnxruntime-gpu")
TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
BACKENDS = {
    "torch": BackendInfo(("fp32", "bf16", "fp16")),
    "torchscript": BackendInfo(("fp32", "bf16", "fp16")),
    "torch_int8": BackendInfo(("int8",), extra="int8", packages=("torchao",), torch_compile=True),
    "torch_fp8": BackendInfo(("fp8",), extra="int8", packages=("torchao",), torch_compile=True),
    "onnx": BackendInfo(("fp32", "fp16"), extra="onnx", packages=ONNX),
    "onnx_int8": BackendInfo(("int8",), extra="onnx", packages=ONNX),
    "tensorrt": BackendInfo(("fp16",), extra="onnx", packages=TENSORRT, builds=True),
}
# Clusters and the extras of this package that they need.
CLUSTERS: dict[str, tuple[str, ...]] = {
    "inline": (),
    "local": ("dask",),
    "cuda": ("dask",),
    "address": ("dask",),
    "slurm": ("dask", "slurm"),
    "kubernetes": ("dask", "kubernetes"),
}
