"""The gate: before anything of a job is written, embeddings of its backend are compared with fp32's on images of it.

How many, is in proportion to the job (:mod:`pipeline.backends.proportion`). A few are compared where an earlier job has
proved the same arithmetic (:mod:`pipeline.backends.proofs`). Where these few are too far, as many as the limits say
decide.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.base import ImageEncoder
from pipeline.backends.compare import compare, from_json, hold, in_words, to_json
from pipeline.backends.devices import out_of_memory
from pipeline.backends.proofs import Proof, Proofs, hardware
from pipeline.backends.proportion import Costs, Extent, affordable, batch_places, extents
from pipeline.backends.streams import Streams
from pipeline.backends.torch import reference
from pipeline.config.schema import ParityConfig
from pipeline.core.errors import ArtifactError, BackendUnavailable, ParityError, StorageError
from pipeline.core.records import Parity, Remembered, Sample, TextBank
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.base import Storage

FILE = "_parity.json"
REFERENCE_BATCH = 16
# Images that are compared again where an earlier job has proved the same arithmetic. An error in all images shows in
# each, one in three of ten images among eight with a probability of 94 %.
AGAIN = 8
# Compared again, images are at most so many times as far from fp32 as the furthest one of the proof, or what rounding
# alone can do.
FURTHER, ROUNDING = 4, 1e-6
# Draws so many pictures of the job, the same ones every time.
DrawSome = Callable[[int], Sample]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Gate:
    """Limits of the parity gates of a job, and the figures that its output keeps of them.

    Attributes:
        limits: the lowest values that pass.
        fingerprints: those of the job.
        storage: the output.
        bank: the embedded labels, if there are any.
        rows: of the manifest, to which the gate is in proportion; None: it is as large as the limits say.
        seconds: for an image, on the clock, in the batches of the job whose embeddings are compared, if there are any.
        store: root of the artefact store that remembers proofs; None: that of the user's cache.
    """

    limits: ParityConfig
    fingerprints: Mapping[str, Any]
    storage: Storage
    bank: TextBank | None = None
    rows: int | None = None
    seconds: float = 0.0
    store: str | None = None

    def key(self, encoder: ImageEncoder) -> str:
        """A digest of all that decides the figures: the job, the hardware, and the number of compared images."""
        parts = [self.fingerprints, hardware(encoder.device), self.limits.images]
        content = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def recorded(self, file: str, encoder: ImageEncoder) -> Parity | None:
        """The figures of this job in ``file`` of the output; None if it holds others, or none."""
        key = self.key(encoder)
        try:
            content = json.loads(self.storage.read(file) or b"{}")
            return from_json(content["parity"]) if content.get("key") == key else None
        except (ValueError, KeyError, TypeError, AttributeError):
            # Not written by this: measured again.
            return None

    def record(self, file: str, encoder: ImageEncoder, parity: Parity) -> None:
        """Write the figures into ``file`` of the output, unless they are there, so that a resumed job finds them."""
        if self.recorded(file, encoder) is None:
            content = {"key": self.key(encoder), "parity": to_json(parity)}
            self.storage.write(file, (json.dumps(content, indent=2) + "\n").encode())


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """Images to compare on, and their embeddings by eager fp32, float32 ``[N, D]`` on the CPU."""

    sample: Sample
    vectors: torch.Tensor


def embed_reference(encoder: ImageEncoder, checkpoint: Checkpoint, sample: Sample) -> Reference:
    """Embed the sample in eager fp32 on the encoder's device, without the images that the encoder was calibrated on."""
    if encoder.fingerprint.get("quantization") == "static":
        sample = sample.half(1)
    return _embed_exactly(encoder, checkpoint, sample)


def _embed_exactly(encoder: ImageEncoder, checkpoint: Checkpoint, sample: Sample) -> Reference:
    exact = open_reference(encoder, checkpoint, len(sample.ids))
    vectors = embed_sample(exact, sample)
    if encoder.device.type == "cuda":
        # The reference is not part of the job's memory.
        del exact
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(encoder.device)
    return Reference(sample, vectors)


def open_reference(encoder: ImageEncoder, checkpoint: Checkpoint, images: int) -> ImageEncoder:
    """Eager fp32 on the encoder's device, in batches of its own for a few images, as many at a time as the encoder."""
    batch_size = min(-(-images // encoder.streams), REFERENCE_BATCH)
    exact = reference(checkpoint, encoder.device, batch_size=batch_size, sample=_no_sample)
    exact.streams = encoder.streams
    return exact


def _no_sample() -> Sample:
    raise NotImplementedError("fp32 is not calibrated")


def measure(encoder: ImageEncoder, wanted: Reference, bank: TextBank | None, *, whole: bool = True) -> Parity:
    """Compare ``encoder`` with eager fp32 on all images of ``wanted``, at every place of a batch.

    Unless ``whole``, embeddings that the job has made of them are taken, or an encoder that takes smaller batches gets
    these.
    """
    sample = wanted.sample
    count = len(sample.ids)
    if sample.vectors is not None and not whole:
        return compare(sample.vectors, wanted.vectors, ids=sample.ids, bank=bank)
    small = encoder.flexible and not whole
    rows = torch.arange(count if small else max(count, encoder.batch_size)) % count
    ids = tuple(sample.ids[row] for row in rows)
    vectors = embed_sample(encoder, Sample(ids=ids, pixels=sample.pixels[rows]), small=small)
    return dataclasses.replace(compare(vectors, wanted.vectors[rows], ids=ids, bank=bank), images=count)


def is_pending(encoder: ImageEncoder, gate: Gate) -> bool:
    """True if :func:`pass_gate` will have to measure: the output does not keep the figures of this job."""
    return not is_reference(encoder) and gate.recorded(FILE, encoder) is None


def pass_gate(encoder: ImageEncoder, checkpoint: Checkpoint, sample: DrawSome, gate: Gate) -> Parity | None:
    """The figures of this backend on this job: those that the output keeps, or measured now.

    Args:
        encoder: the job's.
        checkpoint: its model.
        sample: draws pictures of the job.
        gate: of the job.

    None for eager fp32 in PyTorch, with which all others are compared.

    Raises:
        ParityError: a figure misses its limit.
    """
    if is_reference(encoder):
        return None
    parity = gate.recorded(FILE, encoder)
    if parity is None:
        try:
            parity = _Comparison(encoder, checkpoint, sample, gate).figures()
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise BackendUnavailable(
                f"{encoder.device} has no memory to compare backend={encoder.name} with fp32 PyTorch, which takes "
                f"{REFERENCE_BATCH} images at a time beside it ({error}); free the device, or lower loader.batch_size"
            ) from error
        log.info("%s", in_words(parity))
    hold(parity, gate.limits, precision=encoder.precision, what=f"{checkpoint.name} on backend={encoder.name}")
    return parity


def check(
    encoder: ImageEncoder,
    checkpoint: Checkpoint,
    wanted: Callable[[], Reference],
    *,
    bank: TextBank | None,
    limits: ParityConfig,
) -> Parity | None:
    """Compare a backend that was opened at another batch size; ``wanted`` returns what :func:`embed_reference` does.

    None for eager fp32 in PyTorch, for which ``wanted`` is not called.

    Raises:
        ParityError: a figure misses its limit.
        torch.OutOfMemoryError: the device has no memory for the encoder and fp32 side by side.
    """
    if is_reference(encoder):
        return None
    parity = measure(encoder, wanted(), bank)
    log.info("batches of %d images: %s", encoder.batch_size, in_words(parity))
    hold(parity, limits, precision=encoder.precision, what=f"{checkpoint.name} on backend={encoder.name}")
    return parity


@dataclasses.dataclass(slots=True)
class _Comparison:
    """The comparison of an encoder with fp32 on a job; the arguments are those of :func:`pass_gate`."""

    encoder: ImageEncoder
    checkpoint: Checkpoint
    sample: DrawSome
    gate: Gate
    costs: Costs = dataclasses.field(default_factory=lambda: Costs(backend=0.0, fp32=0.0))

    def figures(self) -> Parity:
        """The figures of as many images as the job is worth; they miss their limits only if those of all do."""
        began, gate, encoder = time.perf_counter(), self.gate, self.encoder
        choices = extents(gate.limits, encoder)
        if gate.rows is None:
            return self._look(choices[-1])
        proofs = Proofs(gate.store, self.checkpoint, gate.limits, gate.bank)
        again = self._compared_again(proofs, choices, rows=gate.rows)
        if again is not None:
            return again
        chosen, found = choices[0], self._look(choices[0])
        if chosen != choices[-1]:
            spent = time.perf_counter() - began
            larger = affordable(choices, self.costs, encoder, rows=gate.rows, spent=spent)
            holds = self._holds(found)
            if not holds:
                log.warning("%s; this misses a limit, so parity.images=%d decide", in_words(found), choices[-1].images)
            chosen = larger if holds else choices[-1]
            found = found if chosen == choices[0] else self._look(chosen)
        # A job of few images proves less than was asked for.
        proved = [each for each in choices if chosen.covers(each) and each.images <= found.images]
        if proved and self._holds(found):
            proofs.keep(encoder, Proof(found, gate.key(encoder), proved[-1], self.costs))
        return found

    def _compared_again(self, proofs: Proofs, choices: list[Extent], *, rows: int) -> Parity | None:
        """The figures of a few images, if an earlier job has proved as much as this one asks for; else None."""
        proof = proofs.find(self.encoder, choices)
        # No more than the job has.
        possible = [each for each in choices if each.images <= rows] or choices[:1]
        if proof is None or not proof.extent.covers(affordable(possible, proof.costs, self.encoder, rows=rows)):
            return None
        found = self._look(Extent(min(AGAIN, self.gate.limits.images), whole=False))
        furthest = FURTHER * (1 - proof.parity.lowest_cosine) + ROUNDING
        if self._holds(found) and 1 - found.lowest_cosine <= furthest:
            return dataclasses.replace(found, remembered=Remembered(proof.job, proof.parity))
        log.warning(
            "%s; this is further than what an earlier job proved, so parity.images=%d decide",
            in_words(found),
            choices[-1].images,
        )
        proofs.forget(self.encoder, choices)
        # Held against the limits by the caller, whatever they are.
        return self._look(choices[-1])

    def _look(self, extent: Extent) -> Parity:
        encoder, clock = self.encoder, time.perf_counter
        times = [clock()]
        pictures = self._draw(extent.images)
        times.append(clock())
        wanted = _embed_exactly(encoder, self.checkpoint, pictures)
        times.append(clock())
        parity = measure(encoder, wanted, self.gate.bank, whole=extent.whole)
        times.append(clock())
        drawing, fp32, backend = (end - start for start, end in pairwise(times))
        places = batch_places(parity.images, encoder) if extent.whole or not encoder.flexible else parity.images
        kept = pictures.vectors is not None and not extent.whole
        self.costs = Costs(
            self.gate.seconds if kept else backend / places, fp32 / parity.images, drawing / parity.images
        )
        return parity

    def _draw(self, count: int) -> Sample:
        if self.encoder.fingerprint.get("quantization") != "static":
            return self.sample(count)
        # Not those that the encoder was calibrated on.
        return self.sample(2 * self.gate.limits.images).half(1).spread(count)

    def _holds(self, parity: Parity) -> bool:
        try:
            hold(parity, self.gate.limits, precision=self.encoder.precision, what=self.checkpoint.name)
        except ParityError:
            return False
        return True


def record(parity: Parity, encoder: ImageEncoder, gate: Gate) -> None:
    """Write the figures into the output, and onto the card of the artefact, if there is one.

    If an earlier run of this very job compared more images, its figures are written.
    """
    key = gate.key(encoder)
    if parity.remembered is not None and parity.remembered.job == key:
        parity = parity.remembered.parity
    gate.record(FILE, encoder, parity)
    if encoder.artifact is not None and key not in encoder.artifact.card.get("gates", {}):
        try:
            ArtifactStore(encoder.artifact.path.parent).note(encoder.artifact, key, to_json(parity))
        except (ArtifactError, StorageError) as error:
            # The store may be read-only; the output has the figures too.
            log.warning("the parity figures are not on the artefact's card: %s", error)


def is_reference(encoder: ImageEncoder) -> bool:
    """True for eager fp32 in PyTorch, with which all others are compared."""
    return encoder.name == "torch" and encoder.precision == "fp32" and "compile" not in encoder.fingerprint


def embed_sample(encoder: ImageEncoder, sample: Sample, *, small: bool = False) -> torch.Tensor:
    """Embeddings of the sample, float32 ``[N, D]`` on the CPU, in batches of the encoder's static shape.

    With ``small``, an encoder that takes smaller batches gets one for each stream.
    """
    size = encoder.batch_size
    if small and encoder.flexible:
        size = min(size, -(-len(sample.ids) // encoder.streams))

    def embed(start: int) -> torch.Tensor:
        part = sample.pixels[start : start + size]
        batch = torch.zeros(size, *sample.pixels.shape[2:], 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        batch[: len(part)] = part
        return encoder.encode(batch.to(encoder.device)).cpu()[: len(part)]

    with Streams(encoder.device, encoder.streams) as streams:
        rows = [streams.submit(partial(embed, start)) for start in range(0, len(sample.ids), size)]
        return torch.cat([row.result() for row in rows])
