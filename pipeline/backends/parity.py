"""The gate: before a backend works on a job, its embeddings are compared with fp32's on images of that job."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
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


def measure(
    encoder: ImageEncoder,
    checkpoint: Checkpoint,
    sample: Sample,
    bank: TextBank | None,
    wanted: torch.Tensor | None = None,
) -> Parity:
    """Compare ``encoder`` with eager fp32 on its own device, over all of ``sample``, at every place of a batch.

    ``wanted`` are fp32's embeddings by :func:`exact_rows`, if somebody has them already.
    """
    if wanted is None:
        wanted = exact_rows(encoder, checkpoint, sample)
    sample = _compared(encoder, sample)
    count = len(sample.ids)
    rows = torch.arange(max(count, encoder.batch_size)) % count
    ids = tuple(sample.ids[row] for row in rows)
    vectors = embed_sample(encoder, Sample(ids=ids, pixels=sample.pixels[rows]))
    return dataclasses.replace(compare(vectors, wanted[rows], ids=ids, bank=bank), images=count)


def exact_rows(encoder: ImageEncoder, checkpoint: Checkpoint, sample: Sample) -> torch.Tensor:
    """Embeddings of the compared images by eager fp32 on the encoder's device, float32 ``[N, D]``."""
    sample = _compared(encoder, sample)
    batch_size = min(len(sample.ids), REFERENCE_BATCH)
    exact = reference(checkpoint, encoder.device, batch_size=batch_size, sample=lambda: sample)
    exact.streams = encoder.streams
    wanted = embed_sample(exact, sample)
    if encoder.device.type == "cuda":
        # The reference is not part of the job's memory.
        del exact
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(encoder.device)
    return wanted


def _compared(encoder: ImageEncoder, sample: Sample) -> Sample:
    """Without the images that an encoder was calibrated on."""
    return sample.half(1) if encoder.fingerprint.get("quantization") == "static" else sample


def pass_gate(
    encoder: ImageEncoder,
    checkpoint: Checkpoint,
    sample: Draw,
    *,
    bank: TextBank | None,
    limits: ParityConfig,
    fingerprints: Mapping[str, Any],
    storage: Storage,
) -> Parity | None:
    """The figures of this backend on this job: those in the output's books, or measured now.

    None for eager fp32 in PyTorch, with which all others are compared.

    Raises:
        ParityError: a figure misses its limit.
    """
    if is_reference(encoder):
        return None
    parity = recorded(storage, FILE, key_of(encoder, fingerprints, limits))
    if parity is None:
        try:
            parity = measure(encoder, checkpoint, sample(), bank)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise BackendUnavailable(
                f"{encoder.device} has no memory to compare backend={encoder.name} with fp32 PyTorch, which takes "
                f"{REFERENCE_BATCH} images at a time beside it ({error}); free the device, or lower loader.batch_size"
            ) from error
        log.info("%s", in_words(parity))
    hold(parity, limits, precision=encoder.precision, what=f"{checkpoint.name} on backend={encoder.name}")
    return parity


def check(
    encoder: ImageEncoder,
    checkpoint: Checkpoint,
    sample: Draw,
    *,
    bank: TextBank | None,
    limits: ParityConfig,
    wanted: torch.Tensor | None = None,
) -> Parity | None:
    """Compare a backend that was opened at another batch size; ``wanted`` is as for :func:`measure`.

    None for eager fp32 in PyTorch.

    Raises:
        ParityError: a figure misses its limit.
        torch.OutOfMemoryError: the device has no memory for the encoder and fp32 side by side.
    """
    if is_reference(encoder):
        return None
    parity = measure(encoder, checkpoint, sample(), bank, wanted)
    log.info("batches of %d images: %s", encoder.batch_size, in_words(parity))
    hold(parity, limits, precision=encoder.precision, what=f"{checkpoint.name} on backend={encoder.name}")
    return parity


def record(
    parity: Parity, encoder: ImageEncoder, *, limits: ParityConfig, fingerprints: Mapping[str, Any], storage: Storage
) -> None:
    """Write the figures into the output's books, and onto the card of the artefact, if there is one."""
    key = key_of(encoder, fingerprints, limits)
    write_down(storage, FILE, key, parity)
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


def key_of(encoder: ImageEncoder, fingerprints: Mapping[str, Any], limits: ParityConfig) -> str:
    """A digest of what the figures follow from: the job, the hardware, and how many images are compared."""
    if encoder.device.type == "cuda":
        hardware: Any = [torch.cuda.get_device_name(encoder.device), torch.cuda.get_device_capability(encoder.device)]
    else:
        # int8 products come out differently where an instruction is missing.
        hardware = sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    content = json.dumps([fingerprints, hardware, limits.images], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def recorded(storage: Storage, file: str, key: str) -> Parity | None:
    """The figures that ``file`` of the output holds under ``key``; None if it holds others, or none."""
    try:
        content = json.loads(storage.read(file) or b"{}")
        return from_json(content["parity"]) if content.get("key") == key else None
    except (ValueError, KeyError, TypeError, AttributeError):
        # Not written by this: measured again.
        return None


def write_down(storage: Storage, file: str, key: str, parity: Parity) -> None:
    """Put the figures into ``file`` of the output, unless they are there."""
    if recorded(storage, file, key) is None:
        storage.write(file, (json.dumps({"key": key, "parity": dataclasses.asdict(parity)}, indent=2) + "\n").encode())
