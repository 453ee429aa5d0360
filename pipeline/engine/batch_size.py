"""The batch size of a job: its number, the default of the device, or ``auto``.

``loader.batch_size=auto`` is the smallest batch with which this model, backend and device are near their
best, beside the loader of the job (:mod:`pipeline.engine.loaded_rate`). Sizes are doubled until the gain is under 3 %,
or the device has no memory. What came out is kept in the artefact store, for the next job of this model, backend and
device with such a loader; a resume takes what the plan says.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from pipeline.backends.artifacts.exports import recipe
from pipeline.backends.artifacts.store import ArtifactStore, Recipe
from pipeline.backends.base import ImageEncoder
from pipeline.backends.devices import choose, choose_device, free_memory, out_of_memory
from pipeline.backends.streams import count_streams
from pipeline.backends.timing import Clock, images_per_second
from pipeline.config.choices import BACKENDS
from pipeline.config.ranges import DefaultNumber
from pipeline.config.schema import BackendConfig, Config
from pipeline.core.errors import BackendUnavailable, StorageError
from pipeline.core.machine import machine
from pipeline.core.processes import cores
from pipeline.dataset import plan
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.base import Storage

# A size is better than a smaller one only if it is faster by this factor.
GAIN = 1.03
# The smallest and the largest size that are tried, by kind of device; and where each has to be compiled, or built.
# Smaller batches leave a large GPU idle, and let the process that feeds it handle more of them in a second.
SIZES = {"cpu": (8, 256), "cuda": (512, 1024)}
COMPILED_SIZES = {"cpu": (16, 64), "cuda": (512, 1024)}
# Bytes of the activations of a picture, in sizes of the widest layer in half precision: that layer twice, what it is
# computed from, attention, and the allocator's room.
LAYERS = 6
# A job on a CPU has at least so many batches, unless they would be smaller than all sizes.
CPU_BATCHES = 8
# A smaller batch on CUDA is mentioned in the log.
SMALL_ON_CUDA = 256
# About how many seconds one size is measured.
SECONDS = {"cpu": 1.5, "cuda": 1.0}
# No further size is begun after so many seconds.
LONGEST = 180.0
# Part of what is remembered: raise it when sizes are measured or chosen in another way.
VERSION = "2"
KIND, FILE = "batch-size", "batch_size.json"
Open = Callable[[int], ImageEncoder]
Rate = Callable[[ImageEncoder, float], float]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measured:
    """Images/s by batch size, in the order tried; ``full`` is the first size that the device had no memory for."""

    rates: Mapping[int, float]
    full: int | None = None

    @property
    def batch_size(self) -> int:
        """The smallest size from which the fastest one gains less than 3 %."""
        best = max(self.rates.values())
        return min(size for size, rate in self.rates.items() if best < GAIN * rate)

    def __str__(self) -> str:
        chosen = self.batch_size
        others = [f"{size}: {rate:,.1f}" for size, rate in self.rates.items() if size != chosen]
        others += [f"{self.full}: no memory"] if self.full else []
        words = f"batch size {chosen}: {self.rates[chosen]:,.1f} images/s"
        return f"{words} ({', '.join(others)})" if others else words


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Measurement of one backend at several batch sizes.

    Attributes:
        config: the backend's.
        checkpoint: the model.
        open_at: opens the backend for a batch size, for the streams of the config; the encoder is not used elsewhere,
            so that its memory can be freed. It must raise out-of-memory errors, not handle them.
        wait: called before the first measurement; returns when nothing else is at work in this process.
        rate: images/s of an opened encoder in about so many seconds; by default with nothing beside it, see
            :func:`~pipeline.backends.timing.images_per_second`.
        beside: facts of what runs beside the encoder while ``rate`` measures it.
    """

    config: BackendConfig
    checkpoint: Checkpoint
    open_at: Open
    wait: Callable[[], object] = lambda: None
    rate: Rate | None = None
    beside: Mapping[str, object] = field(default_factory=dict)
    clock: Clock = time.perf_counter

    @property
    def compiles(self) -> bool:
        """True if opening takes long at every size, because the size is compiled in."""
        return self.config.compiles or self.config.info.builds

    def sizes(self, largest: int) -> list[int]:
        """The sizes to try, none of them above ``largest`` but the first."""
        lowest, highest = (COMPILED_SIZES if self.compiles else SIZES)[choose_device(self.config.device).type]
        sizes = [lowest]
        while sizes[-1] * 2 <= min(highest, largest):
            sizes.append(sizes[-1] * 2)
        return sizes

    def recipe(self, sizes: Sequence[int]) -> Recipe:
        """All that the measurement follows from; a change of any means that it is made anew."""
        device, precision = choose(self.config)
        cpu = f"{machine('cpu', cores())['processor']}, {cores()} cores"
        options = {
            "backend": self.config.name,
            "precision": precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "streams": count_streams(self.config.streams, device),
            "compile": self.config.compile,
            "quantization": self.config.quantization,
            "pixels": list(self.checkpoint.spec.size),
            "sizes": [sizes[0], sizes[-1]],
            "version": VERSION,
            **self.beside,
            **({} if self.config.cuda_graph else {"cuda_graph": False}),
        }
        return recipe(KIND, self.checkpoint, options, BACKENDS[self.config.name].packages)

    def run(self, sizes: Sequence[int]) -> Measured:
        """Measure one size after the other until the next is not worth it.

        Raises:
            BackendUnavailable: the device has no memory for a single picture, or the backend cannot be opened.
        """
        self.wait()
        how = "; the backend is compiled anew for each size" if self.compiles else ""
        log.info("loader.batch_size=auto: measuring batches of %d to %d images, once%s", sizes[0], sizes[-1], how)
        rates: dict[int, float] = {}
        began, full = self.clock(), None
        for size in sizes:
            best = max(rates.values(), default=0.0)
            rate = self._measure(size)
            if rate is None:
                full = size
                break
            rates[size] = rate
            if rate < GAIN * best:
                break
            if size != sizes[-1] and self.clock() - began > LONGEST:
                log.info("batches of more than %d images are not tried: measuring takes too long", size)
                break
        while full and not rates:
            if full == 1:
                raise BackendUnavailable(
                    "loader.batch_size=auto: the device has no memory to embed a single picture; free it, or take a "
                    "smaller model or precision"
                )
            smaller = full // 2
            rate = self._measure(smaller)
            if rate is None:
                full = smaller
            else:
                rates[smaller] = rate
        return Measured(rates=rates, full=full)

    def _measure(self, size: int) -> float | None:
        """Images/s of batches of ``size``; None if the device has no memory for them. Its memory is given back."""
        rate = self._opened_rate(size)
        # Not while the encoder, or an exception that holds it, is still there.
        free_memory(compiled=self.compiles)
        return rate

    def _opened_rate(self, size: int) -> float | None:
        try:
            encoder = self.open_at(size)
            seconds = SECONDS[encoder.device.type]
            if self.rate is not None:
                return self.rate(encoder, seconds)
            return images_per_second(encoder, size=self.checkpoint.spec.size, seconds=seconds, clock=self.clock)
        except Exception as error:
            # Runtimes have no common class for it.
            if not out_of_memory(error):
                raise
            return None


def settle_batch_size(config: Config, benchmark: Benchmark, *, rows: int, storage: Storage) -> int:
    """The batch size of the config; where that is ``auto``, the plan's, the one remembered, or one measured now.

    It never exceeds the largest shard: what is over would be padding in every batch.

    Args:
        config: of the job.
        benchmark: of its backend.
        rows: of the manifest.
        storage: the output, which may hold a plan.

    Raises:
        BackendUnavailable: the device has no memory for a single picture, or the backend cannot be opened.
        PlanMismatch: the output holds something that cannot be read as a plan.
        PipelineError: what ``benchmark.open_at`` raises.
    """
    largest = max(1, min(config.manifest.shard_rows, rows))
    if is_default_of_cuda(config):
        planned = _planned(storage)
        size = planned or default_on_cuda(benchmark.checkpoint, choose_device(config.backend.device))
        reason = f"as {storage.url}/{plan.NAME} says" if planned else "for this model and GPU"
        log.info("batch size %d, %s", size, reason)
        return min(size, largest)
    if isinstance(config.loader.batch_size, DefaultNumber):
        return min(_planned(storage) or default_on_cpu(config, rows), largest)
    if config.loader.batch_size:
        size = min(config.loader.batch_size, largest)
        if size < min(SMALL_ON_CUDA, largest) and choose_device(config.backend.device).type == "cuda":
            log.warning(
                "batches of %d images leave much of a GPU idle: loader.batch_size=auto chooses between %d and %d",
                size,
                *SIZES["cuda"],
            )
        return size
    planned = _planned(storage)
    if planned:
        log.info("batch size %d, as %s/%s says", planned, storage.url, plan.NAME)
        return min(planned, largest)
    sizes = benchmark.sizes(largest)
    if len(sizes) < 2:
        log.info("batch size %d: a whole shard", largest)
        return largest
    measured = cache(partial(benchmark.run, sizes))
    found, where = _remembered(ArtifactStore(config.backend.artifacts), benchmark.recipe(sizes), measured)
    log.info("%s; %s", found, where)
    return found.batch_size


def is_default_of_cuda(config: Config) -> bool:
    """True if nobody typed a batch size, and a GPU embeds."""
    return isinstance(config.loader.batch_size, DefaultNumber) and choose_device(config.backend.device).type == "cuda"


def known_size(config: Config, rows: int) -> int:
    """The batch size of a job over so many rows that has no plan; 0 where it is measured, or goes by the GPU."""
    if is_default_of_cuda(config):
        return 0
    size = config.loader.batch_size
    return default_on_cpu(config, rows) if isinstance(size, DefaultNumber) else size


def default_on_cpu(config: Config, rows: int) -> int:
    """The default of the config, or for few rows a power of two of which they make ``CPU_BATCHES`` or more.

    So all cores have batches to the end of a small job, and its first results come soon. A backend that is compiled for
    each size keeps to one.
    """
    # Chosen now, so an ordinary number: workers send it to the driver, which takes no other kind.
    default = int(config.loader.batch_size)
    if config.backend.compiles or config.backend.info.builds:
        return default
    smallest, _ = SIZES["cpu"]
    fitting = max(smallest, rows // CPU_BATCHES)
    return min(default, 1 << (fitting.bit_length() - 1))


def default_on_cuda(checkpoint: Checkpoint, device: torch.device) -> int:
    """1,024 images, or 512 where the activations of as many would fill half of the memory."""
    sizes = checkpoint.image.sizes
    image = LAYERS * sizes.tokens * sizes.widest * torch.bfloat16.itemsize
    smallest, largest = SIZES["cuda"]
    memory = torch.cuda.get_device_properties(device).total_memory
    return largest if image * largest <= memory / 2 else smallest


def _planned(storage: Storage) -> int | None:
    found = plan.read(storage)
    size = found.fingerprints.get("batch_size") if found is not None else None
    return size if isinstance(size, int) and size > 0 else None


def _remembered(store: ArtifactStore, about: Recipe, measured: Callable[[], Measured]) -> tuple[Measured, str]:
    """The stored batch size, or else the one that ``measured`` returns; and its place, in words."""

    def build(folder: Path) -> dict[str, Any]:
        found = measured()
        facts = {"images_per_second": {str(size): rate for size, rate in found.rates.items()}, "full": found.full}
        (folder / FILE).write_text(json.dumps(facts), encoding="utf-8")
        return {"facts": facts}

    try:
        artifact = store.make(about, build)
    except StorageError as error:
        # Measured by now, unless the store cannot even be locked. Where it is a backend's export that cannot be stored,
        # the same error is raised again here.
        found = measured()
        log.warning("%s; the batch size is not remembered", error)
        return found, "measured again in the next job"
    facts = artifact.card["facts"]
    rates = {int(size): float(rate) for size, rate in facts["images_per_second"].items()}
    return Measured(rates=rates, full=facts["full"]), f"remembered in {artifact.path}"
