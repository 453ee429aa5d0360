"""``backend=auto``: the plan's backend, or the fastest of those that were measured within the limits of parity.

Each candidate is measured once for a model on a machine (:mod:`pipeline.backends.rates`), by a job that is large
enough: measuring takes at most 3 % of it, or two seconds. A smaller job takes the fastest one that is known, or the one
that needs no measuring. The job's own gate compares the chosen one with fp32 as any other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.candidates import Candidate, Rate, candidates, fallback, fastest, seconds_per_image
from pipeline.backends.compare import misses
from pipeline.backends.devices import choose_device, free_memory, out_of_memory
from pipeline.backends.parity import DrawSome, Reference, embed_reference, measure
from pipeline.backends.proportion import SECONDS, SHARE
from pipeline.backends.rates import Rates
from pipeline.backends.streams import count_streams
from pipeline.backends.timing import images_per_second
from pipeline.config.schema import BackendConfig, Config
from pipeline.core.errors import ArtifactError, BackendUnavailable, ParityError, StorageError
from pipeline.core.records import TextBank
from pipeline.dataset import plan
from pipeline.dataset.saved_config import with_backend_of
from pipeline.engine.batch_size import COMPILED_SIZES, default_on_cuda, is_default_of_cuda
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.base import Storage

# The batch size of a backend that is not compiled, on a CPU: larger batches are hardly faster.
CPU_SIZE = 16
# Batches of each stream that measuring takes: one of the comparison, and three of the timing.
BATCHES = 4
# About how many seconds a rate is measured, and as many to warm up, where batches take less.
RATE_SECONDS = 0.2
# A backend that took longer to open made an export, or filled the compiler's cache: it is opened again, as later jobs
# open it.
MADE_SECONDS = 2.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """Means to measure candidates on a job.

    Attributes:
        open: opens a backend for batches of a size; it is not used elsewhere, so that its memory can be freed.
        sample: draws so many images of the job.
        wait: returns the embedded labels when nothing else is at work in this process.
        rows: of the manifest.
        whole: measure every candidate, however small the job.
    """

    open: Callable[[int, BackendConfig], ImageEncoder]
    sample: DrawSome
    wait: Callable[[], TextBank | None]
    rows: int
    whole: bool


def settle_backend(
    config: Config, checkpoint: Checkpoint, *, storage: Storage | None = None, trial: Trial | None = None
) -> Config:
    """The config with the backend that ``backend=auto`` takes, with its precision.

    Args:
        config: of the job.
        checkpoint: its model.
        storage: the output, which may hold a plan.
        trial: measures candidates; None: of those that are remembered, the one with the highest rate.

    Raises:
        PlanMismatch: the output holds something that cannot be read as a plan.
        PipelineError: what eager fp32 raises, with which all others are compared.
    """
    planned = None if storage is None else plan.read(storage)
    if storage is not None and planned is not None:
        config = with_backend_of(config, planned.config or {"backend": planned.fingerprints["backend"]})
        log.info("backend=auto: %s, as %s/%s says", config.backend.name, storage.url, plan.NAME)
        return config
    return _Choice(config, checkpoint, trial).settle()


def forget(config: Config, checkpoint: Checkpoint) -> None:
    """Remove the rate of a backend that ``backend=auto`` took, and that missed a limit on the images of the job."""
    _Choice(config, checkpoint, None).rates.forget(config.backend)
    log.warning(
        "backend=auto took backend=%s, whose rate is forgotten: the next job that measures holds it to the limits "
        "again, and a named backend, such as backend=torch, is taken as it is",
        config.backend.name,
    )


class _Choice:
    """A choice among the candidates on the device of a config."""

    def __init__(self, config: Config, checkpoint: Checkpoint, trial: Trial | None) -> None:
        self.config, self.checkpoint, self.trial = config, checkpoint, trial
        self.device = choose_device(config.backend.device)
        self.rates = Rates(config.backend.artifacts, checkpoint, self.device, config.parity)
        self._wanted: Reference | None = None
        self._reasons: list[str] = []

    @cached_property
    def known(self) -> list[Candidate]:
        """The candidates, eager fp32 first."""
        return candidates(self.config.backend, self.checkpoint, self.device)

    def settle(self) -> Config:
        """The config with the backend that is taken; what is measured for it is remembered."""
        found = {each: self.rates.find(each.backend) for each in self.known}
        rates = {each: rate for each, rate in found.items() if rate is not None}
        if self.trial is not None:
            self._measure(self.trial, rates)
            # In the order of the candidates again.
            rates = {each: rates[each] for each in self.known if each in rates}
        chosen = fastest(rates, None if self.trial is None else self.trial.rows)
        log.info("backend=auto: %s", self._in_words(chosen, rates))
        return self.config.changed({"backend": (chosen or fallback(self.known)).backend})

    def _measure(self, trial: Trial, rates: dict[Candidate, Rate]) -> None:
        """Add the rates of what can be measured in proportion to the job, and note why the others are not there."""
        reference = rates.get(self.known[0])
        image = 1 / reference.images_per_second if reference else seconds_per_image(self.checkpoint, self.device)
        known = [rate.seconds(trial.rows) for rate in rates.values() if not rate.missed]
        job = min(known, default=trial.rows * image / fallback(self.known).speed)
        left = float("inf") if trial.whole else max(SECONDS, SHARE * job)
        streams = count_streams(self.config.backend.streams, self.device)
        missing = {each: each.missing for each in self.known if each not in rates}
        self._reasons += [f"{each} cannot be tried: {reason}" for each, reason in missing.items() if reason]
        possible = [each for each, reason in missing.items() if not reason]
        # Eager fp32, then cheap ones first, by what they promise.
        for each in sorted(possible, key=lambda one: (not one.reference, one.making / one.speed)):
            images = BATCHES * streams * self._size(each, trial) / each.speed + self._compared
            cost = each.making + images * image + 2 * RATE_SECONDS
            if cost > left:
                self._reasons.append(f"{each} is not measured, which takes about {cost:,.0f} s")
                if each.reference:
                    # The others would have nothing to be weighed against.
                    break
                continue
            log.info("backend=auto: measuring %s, once for this model and machine", each)
            began = time.perf_counter()
            rate = self._measured(trial, each)
            left -= time.perf_counter() - began
            if rate is not None:
                rates[each] = rate
                self.rates.keep(each.backend, rate)

    def _measured(self, trial: Trial, each: Candidate) -> Rate | None:
        """The rate of a candidate, whose memory is given back; None, and the reason noted, if it cannot be opened."""
        try:
            return self._rate(trial, each)
        except ParityError as error:
            # Of the export, which is made no more.
            return Rate(0.0, 0.0, str(error).partition(". The worst")[0])
        except (BackendUnavailable, ArtifactError, StorageError) as error:
            if each.reference:
                raise
            reason = str(error)
        except Exception as error:
            # Runtimes have no common class for it.
            if not out_of_memory(error):
                raise
            reason = f"the device has no memory for batches of {self._size(each, trial)} images"
        finally:
            self._free(each)
        self._reasons.append(f"{each} cannot be measured: {reason}")
        return None

    def _rate(self, trial: Trial, each: Candidate) -> Rate:
        bank, size = trial.wait(), self._size(each, trial)
        began = time.perf_counter()
        encoder = trial.open(size, each.backend)
        opening = time.perf_counter() - began
        if each.making and opening > MADE_SECONDS:
            del encoder
            self._free(each)
            began = time.perf_counter()
            encoder = trial.open(size, each.backend)
            opening = time.perf_counter() - began
        missed: list[str] = []
        if not each.reference:
            if self._wanted is None:
                self._wanted = embed_reference(encoder, self.checkpoint, trial.sample(self._compared))
            parity = measure(encoder, self._wanted, bank, whole=False)
            missed = misses(parity, self.config.parity, precision=encoder.precision)
        rate = images_per_second(encoder, size=self.checkpoint.spec.size, seconds=RATE_SECONDS)
        return Rate(rate, opening, "; ".join(missed))

    @property
    def _compared(self) -> int:
        return min(self.config.parity.fewest, self.config.parity.images)

    def _size(self, each: Candidate, trial: Trial) -> int:
        """The batch size of the job, as far as it is known; a smaller one where that is as fast."""
        typed, shard = self.config.loader.batch_size, self.config.manifest.shard_rows
        if self.device.type == "cuda":
            default = is_default_of_cuda(self.config) or not typed
            size = default_on_cuda(self.checkpoint, self.device) if default else typed
        else:
            size = (typed or COMPILED_SIZES["cpu"][1]) if each.backend.compiles else min(typed or CPU_SIZE, CPU_SIZE)
        return max(1, min(size, shard, trial.rows))

    def _free(self, each: Candidate) -> None:
        # To collect takes half a second; on a CPU, encoders that are not compiled are in no cycle.
        if each.backend.compiles or torch.cuda.is_initialized():
            free_memory(compiled=each.backend.compiles)

    def _in_words(self, chosen: Candidate | None, rates: dict[Candidate, Rate]) -> str:
        """The chosen backend, its rate and those of the others, and the reasons why some have none."""
        if chosen is None:
            words = [f"{fallback(self.known)}, for nothing is measured of this model on this machine"]
        else:
            words = [f"{chosen} with {rates[chosen].images_per_second:,.1f} images/s"]
        least = rates[chosen].images_per_second if chosen is not None else float("inf")
        for each, rate in rates.items():
            if each == chosen:
                continue
            times = rate.images_per_second / least
            said = f"{each} is {times:.1f} times as fast" if times > 1 else f"{each} {rate.images_per_second:,.1f}"
            said += f", and takes {rate.opening:,.0f} s to open" if times > 1 and not rate.missed else ""
            words.append(f"{said}, and is too far from fp32: {rate.missed}" if rate.missed else said)
        words += self._reasons
        if chosen is None or any(" is not measured" in reason for reason in self._reasons):
            words.append("python -m pipeline.run with run.dry=true measures all that is installed, for all later jobs")
        return "; ".join(words)
