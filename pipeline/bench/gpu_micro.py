"""``python -m pipeline.bench.gpu_micro SPEC``: the forward of one model alone, against what its device can do.

Each figure is written as soon as it is known: a step whose time is up keeps what it has.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Sides of the square products that find the rate of the device; a rehearsal takes the first one of the other row.
SIDES = {"cuda": (4096, 8192, 16384), "cpu": (256,)}
# Words in the names of kernels that compute attention.
ATTENTION = ("flash", "fmha", "attention", "sdpa", "mha")
KERNELS = 12


@dataclass(frozen=True, slots=True)
class Spec:
    """The request: model, device, batch sizes, the one that is compiled, seconds of one measurement, output file."""

    model: str
    device: str
    sizes: tuple[int, ...]
    compiled: int
    seconds: float
    out: str

    def to_json(self) -> str:
        """Return the argument of the command."""
        return json.dumps(asdict(self))


class Micro:
    """The encoder of a job, launched operation by operation, and the figures so far."""

    def __init__(self, spec: Spec) -> None:
        import torch

        from pipeline.backends.devices import DTYPES
        from pipeline.config.compose import compose_config
        from pipeline.core.machine import machine, versions
        from pipeline.core.processes import cores
        from pipeline.models.checkpoint import open_checkpoint

        self._spec, self._torch = spec, torch
        weights = [] if spec.model == "demo" else ["model.weights=random"]
        self._config = compose_config([f"model={spec.model}", *weights, f"backend.device={spec.device}"])
        self._checkpoint = open_checkpoint(self._config.model)
        self._encoder = self._open(spec.sizes[0], {"backend.cuda_graph": False})
        self._device, self._dtype = self._encoder.device, DTYPES[self._encoder.precision]
        facts = {"machine": machine(str(self._device), cores()), "versions": versions(("triton",))}
        self.figures: dict[str, Any] = {"precision": self._encoder.precision, **facts, "rows": []}

    def _open(self, size: int, values: Mapping[str, Any]) -> Any:
        from pipeline.engine.demo.folder import rendered_sample
        from pipeline.engine.opening import open_backend

        spec, config = self._checkpoint.spec, self._config.changed(values)
        return open_backend(config, self._checkpoint, lambda: rendered_sample(spec, 8), size)

    def note(self, case: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one row, and write all; a failure is its remark."""
        try:
            row = measure()
        except Exception as error:
            # Of CUDA, of the compiler and its toolchain: of many kinds, and each is a row of the table.
            row = {"remark": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        most = self.figures.get("matmul_images_per_second")
        if most and "images_per_second" in row:
            row["of_matmul"] = row["images_per_second"] / most
        self.figures["rows"].append({"case": case, **row})
        # Whole at any time, as this process may be ended at any time.
        written = Path(f"{self._spec.out}.new")
        written.write_text(json.dumps(self.figures), encoding="utf-8")
        written.replace(self._spec.out)

    def run(self) -> None:
        """Measure everything, what proves most first."""
        self.note("achievable matmul", self._matmul)
        self.note("as a job opens it", partial(self._own, {}))
        for size in self._spec.sizes:
            self.note(f"eager {size}", partial(self._eager, size))
            if self._device.type == "cuda":
                self.note(f"graph {size}", partial(self._graph, size))
        self.note("attention kernel", self._kernels)
        self.note("compiled", partial(self._own, {"backend.compile": "default"}))

    def _pixels(self, size: int) -> Any:
        """Pixels in the layout of the loader: [N, H, W, 3] in memory."""
        height, width = self._checkpoint.spec.size
        shape = (size, height, width, 3)
        made = self._torch.randint(0, 256, shape, dtype=self._torch.uint8, device=self._device)
        return made.permute(0, 3, 1, 2)

    def _forward(self, size: int) -> Callable[[], Any]:
        pixels = self._pixels(size)
        return lambda: self._encoder.encode(pixels)

    def _eager(self, size: int) -> dict[str, float]:
        return self._rate(self._forward(size), size)

    def _graph(self, size: int) -> dict[str, float]:
        from pipeline.backends.torch_graph import cuda_graph

        inputs = (self._pixels(size),)
        # Inputs and results live as long as the graph that reads and writes them.
        replay, results = cuda_graph(lambda pixels: (self._encoder.encode(pixels),), inputs)
        rate = self._rate(replay, size)
        del inputs, results
        return rate

    def _rate(self, call: Callable[[], Any], size: int) -> dict[str, float]:
        milliseconds = self._timed(call)
        rate = {"milliseconds": milliseconds, "images_per_second": 1000 * size / milliseconds}
        return {**rate, "launch_milliseconds": self._launch(call)}

    def _timed(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call: by events on the device, by the clock on a CPU."""
        for _ in range(3):
            call()
        once = self._span(call, 1)
        return self._span(call, max(1, min(1000, int(1000 * self._spec.seconds / max(once, 1e-3)))))

    def _span(self, call: Callable[[], Any], calls: int) -> float:
        cuda = self._torch.cuda
        if self._device.type != "cuda":
            began = time.perf_counter()
            for _ in range(calls):
                call()
            return 1000 * (time.perf_counter() - began) / calls
        first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda.synchronize(self._device)
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / calls

    def _flop(self) -> int:
        """Floating-point operations of an image; a multiplication and its addition are two."""
        from torch.utils.flop_counter import FlopCounterMode

        # On the CPU, where no kernel hides what it is made of.
        with self._torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._checkpoint.image(self._torch.zeros(1, 3, *self._checkpoint.spec.size))
        return int(counter.get_total_flops())

    def _matmul(self) -> dict[str, str]:
        """The highest rate of a square product in the precision of the forward."""
        rates = []
        for side in SIDES[self._device.type]:
            a, b = (self._torch.randn(side, side, device=self._device).to(self._dtype) for _ in range(2))
            out = self._torch.empty(side, side, device=self._device, dtype=self._dtype)
            rates.append(2 * side**3 / (self._timed(partial(self._torch.matmul, a, b, out=out)) / 1000))
        flop = self._flop()
        self.figures |= {"matmul_flops": max(rates), "flop_per_image": flop}
        self.figures["matmul_images_per_second"] = max(rates) / flop
        return {"remark": f"{max(rates) / 1e12:,.1f} TFLOP/s; an image has {flop / 1e9:,.1f} GFLOP"}

    def _launch(self, call: Callable[[], Any]) -> float:
        """Milliseconds that the host takes for a call whose work the device does later."""
        taken = []
        for _ in range(5 if self._device.type == "cuda" else 1):
            if self._device.type == "cuda":
                self._torch.cuda.synchronize(self._device)
            began = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - began))
        return sorted(taken)[len(taken) // 2]

    def _kernels(self) -> dict[str, str]:
        """The kernels of one forward by their share of its time, and those that compute attention."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self._device.type == "cuda"
        call = self._forward(self._spec.compiled)
        call()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
            call()
            if cuda:
                self._torch.cuda.synchronize(self._device)
        events = [event for event in profiler.key_averages() if not cuda or str(event.device_type).endswith("CUDA")]
        times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
        total = sum(times.values()) or 1.0
        ranked = sorted(times, key=lambda name: -times[name])
        self.figures["kernels"] = {name[:120]: times[name] / total for name in ranked[:KERNELS]}
        named = [name for name in ranked if any(word in name.lower() for word in ATTENTION)]
        launches = sum(event.count for event in events)
        return {"remark": f"{named[0][:120] if named else 'none by its name'}; {launches} launches a forward"}

    def _own(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder as a job opens it, at the one size that is compiled."""
        size = self._spec.compiled
        encoder, pixels = self._open(size, values), self._pixels(size)
        said = ", ".join(f"{name} {text}" for name, text in encoder.fingerprint.items())
        return {**self._rate(lambda: encoder.encode(pixels), size), "remark": f"batch {size}; {said}"}


def main(text: str) -> None:
    """Measure what the request asks for."""
    values = json.loads(text)
    Micro(Spec(**{**values, "sizes": tuple(values["sizes"])})).run()


if __name__ == "__main__":
    main(sys.argv[1])
