"""Samples of the machine while a job runs: the GPU by its driver, core time of processes by the kernel."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from pipeline.core.processes import descendants, running

# Seconds between two samples.
EVERY = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """At a time (seconds since the epoch): core seconds so far of the watched processes and of all that they started,
    and of the GPU the percentage of the last moments in which a kernel ran, and its used memory in MiB; -1 without."""

    at: float
    own: float
    others: float
    busy: float
    gpu_mib: float


class Watch:
    """A thread that takes samples of the processes ``pids`` until it is closed; use it as a context manager."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._samples = tuple(pids), list[Sample]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._gpu = Gpu()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def samples(self) -> tuple[Sample, ...]:
        """The samples so far."""
        return tuple(self._samples)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            self._samples.append(Sample(time.time(), *spent_by(self._pids), *self._gpu.read()))


class Gpu:
    """The first GPU of CUDA_VISIBLE_DEVICES by NVML, which comes with every driver and opens no CUDA context."""

    def __init__(self) -> None:
        self._handle: ctypes.c_void_p | None = None
        name = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        handle = ctypes.c_void_p()
        with suppress(OSError, AttributeError):
            nvml = self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            failed = nvml.nvmlInit_v2() or (
                nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
                if name.isdecimal()
                else nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
            )
            self._handle = None if failed else handle

    def read(self) -> tuple[float, float]:
        """Busy percentage and used MiB; -1 for what the driver does not tell, as of a MIG instance."""
        if self._handle is None:
            return -1.0, -1.0
        # nvmlUtilization_t: gpu, memory; nvmlMemory_t: total, free, used.
        rates, memory = (ctypes.c_uint * 2)(), (ctypes.c_ulonglong * 3)()
        no_rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(rates))
        no_memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        return -1.0 if no_rates else float(rates[0]), -1.0 if no_memory else memory[2] / 2**20


def spent_by(pids: Sequence[int]) -> tuple[float, float]:
    """Core seconds of processes, and of all that they have started, living or waited for."""
    every, tick = running(), os.sysconf("SC_CLK_TCK")
    own = sum(every[pid][1] for pid in pids if pid in every)
    others = sum(every[pid][2] for pid in pids if pid in every)
    others += sum(sum(every[pid][1:]) for pid in descendants(pids, every))
    return own / tick, others / tick
