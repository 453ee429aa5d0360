"""The gate: before a backend works on a job, its embeddings are compared with fp32's on images of that job."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.base import Draw, ImageEncoder
from pipeline.backends.compare import compare, from_json, hold, in_words
from pipeline.backends.devices import out_of_memory
from pipeline.backends.streams import Streams
from pipeline.backends.torch import reference
from pipeline.config.schema import ParityConfig
from pipeline.core.errors import ArtifactError, BackendUnavailable, StorageError
from pipeline.core.records import Parity, Sample, TextBank
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.base import Storage

FILE = "_parity.json"
REFERENCE_BATCH = 16
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Gate:
    """Limits of the parity gates of a job, and the figures that its output keeps of them.

    Attributes:
        limits: the lowest values that pass.
        fingerprints: those of the job.
        storage: the output.
        bank: the embedded labels, if there are any.
    """

    limits: ParityConfig
    fingerprints: Mapping[str, Any]
    storage: Storage
    bank: TextBank | None = None

    def key(self, encoder: ImageEncoder) -> str:
        """A digest of all that decides the figures: the job, the hardware, and the number of compared images."""
        if encoder.device.type == "cuda":
            name, capability = torch.cuda.get_device_name, torch.cuda.get_device_capability
            hardware: Any = [name(encoder.device), capability(encoder.device)]
        else:
            # int8 products come out differently where an instruction is missing.
            hardware = sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)
        content = json.dumps([self.fingerprints, hardware, self.limits.images], sort_keys=True, default=str)
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
            content = {"key": self.key(encoder), "parity": dataclasses.asdict(parity)}
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
    batch_size = min(len(sample.ids), REFERENCE_BATCH)
    exact = reference(checkpoint, encoder.device, batch_size=batch_size, sample=lambda: sample)
    exact.streams = encoder.streams
    vectors = embed_sample(exact, sample)
    if encoder.device.type == "cuda":
        # The reference is not part of the job's memory.
        del exact
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(encoder.device)
    return Reference(sample, vectors)


def measure(encoder: ImageEncoder, wanted: Reference, bank: TextBank | None) -> Parity:
    """Compare ``encoder`` with eager fp32 on all images of ``wanted``, at every place of a batch."""
    sample = wanted.sample
    count = len(sample.ids)
    rows = torch.arange(max(count, encoder.batch_size)) % count
    ids = tuple(sample.ids[row] for row in rows)
    vectors = embed_sample(encoder, Sample(ids=ids, pixels=sample.pixels[rows]))
    return dataclasses.replace(compare(vectors, wanted.vectors[rows], ids=ids, bank=bank), images=count)


def pass_gate(encoder: ImageEncoder, checkpoint: Checkpoint, sample: Draw, gate: Gate) -> Parity | None:
    """The figures of this backend on this job: those that the output keeps, or measured now.

    None for eager fp32 in PyTorch, with which all others are compared.

    Raises:
        ParityError: a figure misses its limit.
    """
    if is_reference(encoder):
        return None
    parity = gate.recorded(FILE, encoder)
    if parity is None:
        try:
            parity = measure(encoder, embed_reference(encoder, checkpoint, sample()), gate.bank)
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


def record(parity: Parity, encoder: ImageEncoder, gate: Gate) -> None:
    """Write the figures into the output, and onto the card of the artefact, if there is one."""
    gate.record(FILE, encoder, parity)
    key = gate.key(encoder)
    if encoder.artifact is not None and key not in encoder.artifact.card.get("gates", {}):
        try:
            ArtifactStore(encoder.artifact.path.parent).note(encoder.artifact, key, dataclasses.asdict(parity))
        except (ArtifactError, StorageError) as error:
            # The store may be read-only; the output has the figures too.
            log.warning("the parity figures are not on the artefact's card: %s", error)


def is_reference(encoder: ImageEncoder) -> bool:
    """True for eager fp32 in PyTorch, with which all others are compared."""
    return encoder.name == "torch" and encoder.precision == "fp32" and "compile" not in encoder.fingerprint


def embed_sample(encoder: ImageEncoder, sample: Sample) -> torch.Tensor:
    """Embeddings of the sample, float32 ``[N, D]`` on the CPU, in batches of the encoder's static shape."""
    size = encoder.batch_size

    def embed(start: int) -> torch.Tensor:
        part = sample.pixels[start : start + size]
        batch = torch.zeros(size, *sample.pixels.shape[2:], 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        batch[: len(part)] = part
        return encoder.encode(batch.to(encoder.device)).cpu()[: len(part)]

    with Streams(encoder.device, encoder.streams) as streams:
        rows = [streams.submit(partial(embed, start)) for start in range(0, len(sample.ids), size)]
        return torch.cat([row.result() for row in rows])
