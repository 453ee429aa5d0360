"""Throughput of an opened encoder, with as many batches at the same time as in a job."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.streams import Streams

# Times have settled when the last few lie this near to one another, or when warming up has taken too long.
SETTLED, LAST = 1.1, 3
# Measurements whose median counts.
ROUNDS = 5
Clock = Callable[[], float]


def settle(once: Callable[[], float], *, limit: float) -> float:
    """Call ``once``, which returns its seconds, until these have settled or ``limit`` seconds went by; their median.

    It is called twice at least: what is compiled or laid out at the first call is not paid again.
    """
    times: list[float] = []
    while len(times) < 2 or sum(times) < limit:
        times.append(once())
        if len(times) >= LAST and max(times[-LAST:]) <= SETTLED * min(times[-LAST:]):
            break
    return sorted(times[-LAST:])[len(times[-LAST:]) // 2]


def images_per_second(
    encoder: ImageEncoder,
    *,
    size: tuple[int, int],
    seconds: float,
    clock: Clock = time.perf_counter,
    after: Callable[[], object] = lambda: None,
) -> float:
    """The median of a few measurements, after warming up; the clock stops when the device is done.

    Args:
        encoder: opened; ``encoder.streams`` batches are embedded side by side.
        size: height and width of its pictures, which are noise in the loader's layout of memory.
        seconds: about how long to measure. Warming up comes before it, and takes up to as long again; a slow encoder
            takes three rounds of batches at least.
        clock: seconds, from any starting point.
        after: called behind each batch, in the thread of its encoder.
    """
    dice = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (encoder.batch_size, *size, 3), dtype=torch.uint8, generator=dice)
    pixels = noise.to(encoder.device).permute(0, 3, 1, 2)

    with Streams(encoder.device, encoder.streams) as streams:

        def once() -> None:
            encoder.encode(pixels)
            after()

        def timed(rounds: int) -> float:
            began = clock()
            batches = [streams.submit(once) for _ in range(rounds) for _ in range(streams.count)]
            for batch in batches:
                batch.result()
            if encoder.device.type == "cuda":
                torch.cuda.synchronize(encoder.device)
            return clock() - began

        rounds = max(1, math.ceil(seconds / ROUNDS / settle(partial(timed, 1), limit=seconds)))
        times: list[float] = []
        while len(times) < ROUNDS and (not times or sum(times) < 2 * seconds):
            times.append(timed(rounds))
    return encoder.batch_size * streams.count * rounds / median(times)
