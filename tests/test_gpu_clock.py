"""The clock of a GPU: which seconds count, by events of a made-up GPU, and on a real one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pipeline.core.machine import gpu_memory, memory
from pipeline.engine.gpu_clock import GpuClock, GpuTime


@dataclass
class Gpu:
    """A GPU that computes what is queued, one after the other; ``now`` is the host's time in seconds."""

    now: float = 0.0
    free_at: float = 0.0

    def compute(self, seconds: float, *, launch: float = 0.0) -> None:
        """Queue work, in launches that take the host so long; it ends no earlier than they do."""
        begins = max(self.now, self.free_at)
        self.now += launch
        self.free_at = max(begins + seconds, self.now)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, -1.0

    def record(self) -> None:
        self.at = max(self.gpu.now, self.gpu.free_at)

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


def clock_of(gpu: Gpu) -> GpuClock:
    return GpuClock(torch.device("cpu"), open_event=lambda: Event(gpu), clock=lambda: gpu.now)


def test_a_gpu_that_always_has_the_next_batch_is_busy_all_the_time() -> None:
    gpu = Gpu()
    clock = clock_of(gpu)
    for _ in range(10):
        with clock.batch():
            gpu.compute(0.030, launch=0.001)
        # The host waits for the batch before.
        gpu.now = max(gpu.now, gpu.free_at - 0.030)
    gpu.now = gpu.free_at
    found = clock.total()
    assert (found.batches, found.starved) == (10, 0)
    assert found.seconds == pytest.approx(0.300)
    assert found.seconds / gpu.now == pytest.approx(1.0)


def test_a_gpu_that_waits_for_images_is_busy_while_it_computes_alone() -> None:
    gpu = Gpu()
    clock = clock_of(gpu)
    for _ in range(10):
        gpu.now += 0.100
        with clock.batch():
            gpu.compute(0.030, launch=0.001)
        gpu.now = gpu.free_at
    found = clock.total()
    assert (found.batches, found.starved) == (10, 0)
    assert found.seconds == pytest.approx(0.300)


def test_gaps_between_slow_launches_are_not_the_time_of_the_gpu() -> None:
    gpu = Gpu()
    clock = clock_of(gpu)
    for launch in (0.001, 0.001, *[0.100] * 8):
        with clock.batch():
            gpu.compute(0.030, launch=launch)
    gpu.now = gpu.free_at
    found = clock.total()
    assert (found.batches, found.starved) == (10, 8)
    # The second batch was launched ahead: the others count no more than it.
    assert found.seconds == pytest.approx(0.030 * 10)


def test_what_has_not_ended_or_has_failed_does_not_count() -> None:
    gpu = Gpu()
    clock = clock_of(gpu)
    with clock.batch():
        gpu.compute(0.030, launch=0.001)
    assert clock.total() == GpuTime()
    with pytest.raises(ValueError, match="broken"), clock.batch():
        raise ValueError("broken")
    gpu.now = gpu.free_at
    assert clock.total().batches == 1


def test_a_cpu_has_no_such_clock_and_no_memory_of_a_gpu() -> None:
    clock = GpuClock(torch.device("cpu"))
    with clock.batch():
        pass
    assert clock.total() == GpuTime()
    assert gpu_memory("cpu") == 0
    assert memory("cpu").keys() == {"peak_rss_mib"}


@pytest.mark.gpu
def test_a_real_gpu_is_measured_without_waiting_for_it() -> None:
    clock = GpuClock(torch.device("cuda", 0))
    with clock.batch():
        torch.cuda._sleep(10**6)
    torch.cuda.synchronize()
    clock.total()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            with clock.batch():
                torch.cuda._sleep(10**7)
        clock.total()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    found = clock.total()
    assert (found.batches, found.starved) == (6, 0)
    assert 0.001 < found.seconds < 1


@pytest.mark.gpu
def test_the_memory_of_a_gpu_is_what_its_driver_counts() -> None:
    device = "cuda:0"
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert gpu_memory(device) >= 256
    # CUDA itself takes some, which torch does not know.
    assert gpu_memory(device) > torch.cuda.memory_reserved(device) / 2**20
    assert memory(device)["peak_gpu_mib"] >= 256
    del held
