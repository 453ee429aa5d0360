"""The child process of one backend: open it at a batch size, embed the sample, warm up, measure."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.devices import choose_device
from pipeline.backends.parity import embed_sample
from pipeline.backends.timing import settle
from pipeline.bench.backends_run import BANK, SAMPLE
from pipeline.config.schema import from_dict
from pipeline.core.machine import machine, memory
from pipeline.core.processes import cores
from pipeline.core.records import Sample
from pipeline.engine.engine import Engine
from pipeline.engine.opening import open_backend
from pipeline.models.checkpoint import Checkpoint, open_checkpoint

# The longest warm-up, in multiples of one measurement.
WARM_UP = 3.0


class Backend:
    """One row of the table; it holds one encoder at a time, and no checkpoint while it waits."""

    def __init__(self, config: dict[str, Any], work: str) -> None:
        self._config, self._work = from_dict(config), Path(work)
        self._checkpoint: Checkpoint | None = None
        self._encoder: ImageEncoder | None = None
        self._pixels = torch.empty(0)
        self._settled, self._opened_mib = 1.0, 0.0

    def prepare(self) -> dict[str, Any]:
        """Draw the sample and embed the labels, once for all children; return the facts of the machine."""
        config = self._config
        device = choose_device(config.backend.device)
        with Engine(config) as engine:
            checkpoint, bank, sample = engine.checkpoint, engine.bank(), engine.cpu_decoded_sample()
        assert bank is not None, "the command gives labels"
        self._checkpoint = checkpoint
        # In the loader's layout of memory: [N, H, W, 3].
        pixels = sample.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        np.savez(self._work / SAMPLE, pixels=pixels, ids=np.array(sample.ids))
        np.savez(self._work / BANK, names=np.array(bank.names), features=bank.features)
        return {
            "device": device.type,
            "images": len(sample.ids),
            "labels": len(bank.names),
            "sample": "rendered scenes" if config.manifest.path is None else f"images of {config.manifest.path}",
            "machine": {**machine(str(device), cores()), "instructions": torch.backends.cpu.get_cpu_capability()},
        }

    def open(self, batch: int, vectors: str, seconds: float) -> dict[str, Any]:
        """Open the encoder for batches of ``batch``, write the embedded sample to the file ``vectors``, warm up."""
        self._release()
        with np.load(self._work / SAMPLE) as file:
            pixels, ids = torch.from_numpy(file["pixels"]), tuple(map(str, file["ids"]))
        sample = Sample(ids=ids, pixels=pixels.permute(0, 3, 1, 2))
        checkpoint = self._checkpoint or open_checkpoint(self._config.model)
        device = choose_device(self._config.backend.device)
        if device.type == "cuda":
            # Every process has a context of the same size; its memory is not counted.
            torch.cuda.set_device(device)
            torch.cuda.init()
        free = _free_gpu_mib()
        began = time.perf_counter()
        encoder = self._encoder = open_backend(self._config, checkpoint, lambda: sample, batch)
        # The images of a batch, from the first one again where there are too few.
        self._pixels = pixels[torch.arange(batch) % len(pixels)].permute(0, 3, 1, 2).to(encoder.device)
        self._encode(1)
        startup = time.perf_counter() - began
        # Many children wait at once: each keeps only what its encoder needs.
        self._checkpoint = None
        del checkpoint
        gc.collect()
        np.save(vectors, embed_sample(encoder, sample).numpy())
        self._settled = settle(partial(self._encode, 1), limit=WARM_UP * seconds)
        _free_cache()
        self._opened_mib = free - _free_gpu_mib()
        return {
            "startup_seconds": startup,
            "precision": encoder.precision,
            "weight_bytes": encoder.weight_bytes,
            "fingerprint": encoder.fingerprint,
        }

    def measure(self, seconds: float) -> dict[str, Any]:
        """Encode for about ``seconds``, one batch at least; the clock stops when the device is done."""
        # Reset the peak of resident memory, where the system can.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        free = _free_gpu_mib()
        self._encode(1)
        batch, calls = len(self._pixels), max(1, math.ceil(seconds / self._settled))
        # Calls queue up on a GPU, as in a job; latency is measured call by call, at batch 1 only.
        latencies = [self._encode(1) for _ in range(calls)] if batch == 1 else []
        taken = sum(latencies) if latencies else self._encode(calls)
        # Only one child works at a time: memory that the device lost meanwhile is used by this one.
        device_mib = self._opened_mib + free - _free_gpu_mib()
        _free_cache()
        return {
            "images_per_second": batch * calls / taken,
            "latencies": latencies,
            "rss": memory()["peak_rss_mib"],
            "device": round(device_mib, 1),
        }

    def _encode(self, calls: int) -> float:
        if self._encoder is None:
            raise RuntimeError("no encoder is open")
        began = time.perf_counter()
        for _ in range(calls):
            self._encoder.encode(self._pixels)
        if self._encoder.device.type == "cuda":
            torch.cuda.synchronize(self._encoder.device)
        return time.perf_counter() - began

    def _release(self) -> None:
        self._encoder, self._pixels = None, torch.empty(0)
        if self._config.backend.compile != "none":
            torch.compiler.reset()
        gc.collect()
        _free_cache()


def _free_cache() -> None:
    """Return cached memory of the device, for the other children."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _free_gpu_mib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**20 if torch.cuda.is_initialized() else 0.0
