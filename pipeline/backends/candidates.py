"""Candidates of ``backend=auto``: the backends that may be the fastest on a device, and what it takes to try each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pipeline.backends.artifacts.exports import GraphOptions, graph_recipe, need_packages
from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.devices import choose_precision
from pipeline.backends.tensorrt import is_built
from pipeline.backends.torch_fp8 import HOPPER
from pipeline.backends.torch_int8 import multiplies_int8
from pipeline.backends.torch_module import need_torchao
from pipeline.config.schema import BackendConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.core.processes import cores
from pipeline.models.checkpoint import Checkpoint

# A candidate is taken for its speed alone where it is faster than a simpler one by this factor.
GAIN = 1.03
# Operations in fp32 that a core, or a GPU, does in a second: a guess for the time before anything is measured.
OPERATIONS = {"cpu": 4e10, "cuda": 2e13}
# Seconds that are guessed for what was not made before: compiling a layer; exporting a graph, and a million of its
# parameters, besides so many images in fp32 with which it is compared; opening a graph.
COMPILING = {"cpu": 6.0, "cuda": 4.0}
EXPORTING, EXPORTING_MILLION, EXPORT_IMAGES, OPENING = 5.0, 0.3, 140, 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that may be the fastest.

    Attributes:
        backend: names its precision.
        speed: images/s in multiples of eager fp32, as a guess for what measuring takes.
        making: seconds, as a guess, to export or compile what is not there yet.
    """

    backend: BackendConfig
    speed: float
    making: float = 0.0

    @property
    def reference(self) -> bool:
        """True for eager fp32, with which all others are compared."""
        return self.backend.name == "torch" and self.backend.precision == "fp32" and not self.backend.compiles

    @property
    def missing(self) -> str:
        """A message about packages that are not installed; empty if all are."""
        try:
            if self.backend.info.extra == "onnx":
                need_packages()
            elif self.backend.info.torch_compile:
                need_torchao()
        except BackendUnavailable as error:
            return str(error)
        return ""

    def __str__(self) -> str:
        precision = [self.backend.precision] if len(self.backend.info.precisions) > 1 else []
        words = [self.backend.name, *precision]
        return " ".join([*words, *(["compiled"] if self.backend.compile != "none" else [])])


@dataclass(frozen=True, slots=True)
class Rate:
    """Measured speed of a candidate, and the limits that it misses.

    Attributes:
        images_per_second: of the encoder alone; 0 if it has none.
        opening: seconds to open it where its export or its compiler's cache is there.
        missed: the limits of parity that it misses; empty if it holds all.
    """

    images_per_second: float
    opening: float
    missed: str = ""

    def seconds(self, rows: int | None) -> float:
        """Seconds to open it and to embed so many rows; of one of very many with None."""
        each = 1 / self.images_per_second if self.images_per_second else float("inf")
        return each if rows is None else self.opening + rows * each


def candidates(config: BackendConfig, checkpoint: Checkpoint, device: torch.device) -> list[Candidate]:
    """The candidates on a device, simpler ones first; the first one is eager fp32."""
    sizes = checkpoint.image.sizes
    compiling = COMPILING[device.type] * sizes.layers

    def named(name: str, precision: str, compile: str = "none") -> BackendConfig:
        return replace(config, name=name, precision=precision, compile=compile, quantization="dynamic")

    fp32 = Candidate(named("torch", "fp32"), 1.0)
    if device.type == "cuda":
        half = choose_precision(named("torch", "auto"), device)
        found = [
            fp32,
            Candidate(named("torch", half), 10.0),
            Candidate(named("torch", half, "reduce-overhead"), 10.0, compiling),
        ]
        if torch.cuda.get_device_capability(device) >= HOPPER:
            found.append(Candidate(named("torch_fp8", "fp8"), 10.0, compiling))
        if is_built(checkpoint, config.artifacts):
            found.append(Candidate(named("tensorrt", "fp16"), 10.0, OPENING))
        return found
    found, half = [fp32], "bf16" if computes_bf16() else "fp32"
    if half == "bf16":
        found.append(Candidate(named("torch", half), 2.0))
    image, store = seconds_per_image(checkpoint, device), ArtifactStore(config.artifacts)
    exporting = EXPORTING + EXPORTING_MILLION * sizes.parameters / 1e6 + EXPORT_IMAGES * image
    for name, precision, speed in (("onnx", "fp32", 1.0), ("onnx_int8", "int8", 2.0)):
        graph = GraphOptions(precision=precision, quantization="dynamic" if precision == "int8" else None)
        there = store.has(graph_recipe(checkpoint, graph))
        found.append(Candidate(named(name, precision), speed, OPENING if there else exporting))
    if multiplies_int8(device):
        found.append(Candidate(named("torch_int8", "int8"), 3.0, compiling))
    return [*found, Candidate(named("torch", half, "default"), 2.0 if half == "bf16" else 1.0, compiling)]


def fallback(known: list[Candidate]) -> Candidate:
    """The candidate to take where nothing is measured: eager PyTorch in the precision that the device is made for."""
    eager = (each for each in known if each.backend.name == "torch" and not each.backend.compiles)
    return max(eager, key=lambda each: each.speed)


def fastest(rates: Mapping[Candidate, Rate], rows: int | None) -> Candidate | None:
    """The candidate within its limits that takes least for so many rows; None if there is none.

    Of those that take nearly as little, the first one.
    """
    seconds = {each: rate.seconds(rows) for each, rate in rates.items() if not rate.missed}
    least = min(seconds.values(), default=0.0)
    return next((each for each, taken in seconds.items() if taken <= GAIN * least), None)


def computes_bf16() -> bool:
    """True if the processor has products of bf16; elsewhere these are slower than fp32's."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def seconds_per_image(checkpoint: Checkpoint, device: torch.device) -> float:
    """Seconds to embed an image in fp32, guessed from the number of its multiplications."""
    speed = OPERATIONS[device.type] * (cores() if device.type == "cpu" else 1)
    return 2.0 * checkpoint.image.sizes.tokens * checkpoint.image.sizes.parameters / speed
