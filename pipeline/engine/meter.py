"""Measurement of what this process does for a job."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pipeline.core.machine import gpu_memory, memory
from pipeline.core.processes import Spent, cores, spent
from pipeline.core.records import ShardReport
from pipeline.engine.engine import Engine
from pipeline.engine.gpu_clock import GpuClock
from pipeline.engine.recall import sample_of
from pipeline.telemetry.clocks import StageClocks
from pipeline.telemetry.run_stats import WorkerStats


class Meter:
    """Clocks, core seconds and counts of this process, from the creation of the meter on.

    Create it in the thread that runs the loop, whose core time before does not count.

    Args:
        engine: the opened engine.
        name: name of the process in the report.
        startup_seconds: time until its engine was opened.
    """

    def __init__(self, engine: Engine, name: str, startup_seconds: float) -> None:
        self.clocks, self._before = StageClocks(), spent()
        self.gpu = GpuClock(engine.encoder.device)
        self.sample = sample_of(engine.config.output, engine.encoder.dim)
        self._engine, self._spent, self._peak_gpu = engine, Spent(0.0, 0.0), 0.0
        self._stats = WorkerStats(
            name=name,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(engine.encoder.device),
            cores=cores(),
            startup_seconds=startup_seconds,
        )

    def add(self, report: ShardReport) -> None:
        """Count a shard that is durable."""
        self._sample_gpu()
        self._stats = self._stats.with_shard(report)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what this process spends in the body; its decoders go on with the job."""
        before = spent()
        yield
        self._before += Spent(spent().own - before.own, 0.0)

    def lap(self) -> None:
        """Take the core seconds so far as those of the job."""
        self._spent, others = spent() - self._before, self.clocks.others
        if others is not None:
            # The children are feeders: their imports do not count, and they send the figures of their decoders.
            self._spent = Spent(self._spent.own + others.own, others.children)

    def stats(self) -> WorkerStats:
        """Return the statistics so far; core seconds are those of the last :meth:`lap`."""
        engine, gpu = self._engine, self.gpu.total()
        self._sample_gpu()
        peak = {"peak_gpu_mib": self._peak_gpu} if self._peak_gpu else {}
        return replace(
            self._stats,
            clocks=self.clocks.total(),
            own_core_seconds=self._spent.own,
            child_core_seconds=self._spent.children,
            memory={**memory(), **peak, **(engine.reader.memory() if engine.has_images else {})},
            batch_sizes=tuple(engine.encoder.batch_sizes),
            timeline=self.clocks.timeline(),
            gpu_batches=gpu.batches,
            gpu_seconds=gpu.seconds,
            gpu_starved=gpu.starved,
            recall={} if self.sample is None else self.sample.measure(),
        )

    def _sample_gpu(self) -> None:
        # Memory stays allocated from batch to batch, so a sample for each shard finds the peak.
        self._peak_gpu = max(self._peak_gpu, gpu_memory(str(self._engine.encoder.device)))
