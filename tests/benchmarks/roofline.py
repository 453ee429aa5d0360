"""A roofline of an image tower on this CPU: how near each kind of layer comes to the fastest matrix product here.

``python -m tests.benchmarks.roofline --out roofline-cpu.json [--model clip_vit_b32] [--batch 32]`` times each product
of the tower alone, in fp32 and in int8 (ONNX Runtime's dynamic quantization, with its conversions), and in bf16 where
the processor multiplies it; the fastest product is the roof. It writes JSON and a page beside it. Attention, norms and
activations are what the whole tower takes besides its products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

from pipeline.backends.candidates import computes_bf16
from pipeline.config.schema import ModelConfig
from pipeline.core.machine import machine, versions
from pipeline.core.processes import cores
from pipeline.models.checkpoint import Checkpoint, open_checkpoint

SECONDS = 2.0
ROOF = (2048, 2048, 2048)
Forward = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Product:
    """``count`` products of a batch, each ``[rows, inner] @ [inner, outer]``."""

    name: str
    count: int
    rows: int
    inner: int
    outer: int

    @property
    def gflop(self) -> float:
        """Of one product, a multiplication and an addition counted as two."""
        return 2e-9 * self.rows * self.inner * self.outer


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="openai/clip-vit-base-patch32")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(cores())
    checkpoint = open_checkpoint(ModelConfig(name=options.model, weights="random"))
    kinds: dict[str, Callable[[Product], Forward]] = {"fp32": _torch(torch.float32), "int8": _onnx_int8}
    if computes_bf16():
        kinds["bf16"] = _torch(torch.bfloat16)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for kind, make in kinds.items():
            rows = {
                each.name: {**asdict(each), **_measure(make, each)} for each in _products(checkpoint, options.batch)
            }
            roof = max(row["gflops"] for row in [_measure(make, Product("roof", 1, *ROOF)), *rows.values()])
            for row in rows.values():
                row["share_of_roof"] = round(row["gflops"] / roof, 2)
            whole = _milliseconds(_whole(checkpoint, options.batch, kind))
            found[kind] = {"roof_gflops": roof, "products": rows, "whole_ms": whole}
            print(kind, json.dumps(found[kind]), flush=True)
    content = {
        "command": f"python -m tests.benchmarks.roofline {' '.join(sys.argv[1:])}",
        "machine": machine("cpu", cores()),
        "bf16": computes_bf16(),
        "versions": versions(("onnxruntime-gpu",)),
        "batch": options.batch,
        "model": options.model,
        "found": found,
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(_page(content))


def _products(checkpoint: Checkpoint, batch: int) -> Iterator[Product]:
    sizes, side = checkpoint.image.sizes, checkpoint.spec.size[0]
    patches = sizes.tokens - 1
    rows, patch = batch * sizes.tokens, round(side / patches**0.5)
    yield Product("patches", 1, batch * patches, 3 * patch * patch, sizes.width)
    yield Product("queries, keys, values, output", 4 * sizes.layers, rows, sizes.width, sizes.width)
    yield Product("MLP, first", sizes.layers, rows, sizes.width, sizes.widest)
    yield Product("MLP, second", sizes.layers, rows, sizes.widest, sizes.width)


def _measure(make: Callable[[Product], Forward], product: Product) -> dict[str, float]:
    each = _milliseconds(make(product))
    return {"ms": round(each * product.count, 2), "gflops": round(product.gflop / each * 1e3, 1)}


def _milliseconds(forward: Forward) -> float:
    for _ in range(3):
        forward()
    times, began = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _torch(dtype: torch.dtype) -> Callable[[Product], Forward]:
    def make(product: Product) -> Forward:
        layer = torch.nn.Linear(product.inner, product.outer, dtype=dtype)
        given = torch.randn(product.rows, product.inner, dtype=dtype)
        return lambda: layer(given)

    return make


def _onnx_int8(product: Product) -> Forward:
    weight = np.random.default_rng(0).normal(size=(product.inner, product.outer)).astype(np.float32)
    shapes = [("x", product.inner), ("y", product.outer)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [product.rows, width]) for name, width in shapes)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "w")])
    with tempfile.TemporaryDirectory() as folder:
        plain, small = f"{folder}/plain.onnx", f"{folder}/int8.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), plain)
        quantize_dynamic(plain, small, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = cores(), 3
        session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    given = {"x": np.random.default_rng(1).normal(size=(product.rows, product.inner)).astype(np.float32)}
    return lambda: session.run(None, given)


def _whole(checkpoint: Checkpoint, batch: int, kind: str) -> Forward:
    """The backend of a job, for one batch."""
    from pipeline.backends.base import factory
    from pipeline.config.schema import BackendConfig, ParityConfig
    from pipeline.engine.demo.folder import rendered_sample

    name = "onnx_int8" if kind == "int8" else "torch"
    config = BackendConfig(name=name, device="cpu", precision="auto" if kind == "int8" else kind)
    images = rendered_sample(checkpoint.spec, batch)
    encoder = factory(name)(checkpoint, config, batch_size=batch, sample=lambda: images, limits=ParityConfig(top1=0.0))
    return lambda: encoder.encode(images.pixels)


def _page(content: dict[str, Any]) -> str:
    about = content["machine"]
    lines = [
        "# Roofline of an image tower",
        "",
        f"`{content['command']}`: {content['model']}, batches of {content['batch']}, random weights. "
        f"{about['processor']}, {about['cores']} cores.",
    ]
    if not content["bf16"]:
        lines += ["", "This processor multiplies no bf16, so that it has no column here."]
    for kind, found in content["found"].items():
        products = found["products"].values()
        inside = sum(row["ms"] for row in products)
        rate = content["batch"] / found["whole_ms"] * 1e3
        lines += [
            "",
            f"## {kind}",
            "",
            f"The roof is {found['roof_gflops']:.0f} GFLOP/s. A batch takes {found['whole_ms']:.0f} ms "
            f"({rate:.1f} images/s), its products alone {inside:.0f} ms; at the roof they would take "
            f"{sum(row['gflops'] * row['ms'] for row in products) / found['roof_gflops']:.0f} ms. So the products bind "
            f"{inside / found['whole_ms']:.0%} of it, and what lies between them the rest.",
            "",
            "| product | shape | how many | ms a batch | GFLOP/s | of the roof |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {row['name']} | {row['rows']} x {row['inner']} x {row['outer']} | {row['count']} | {row['ms']:.1f} "
            f"| {row['gflops']:.0f} | {row['share_of_roof']:.0%} |"
            for row in products
        ]
        lines.append(f"| attention, norms, activations and the rest | | | {found['whole_ms'] - inside:.1f} | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
