"""Readers and decoders of images from the config; light enough to start processes before torch is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.core.processes import cores
from pipeline.core.records import PreprocessSpec
from pipeline.images.decode import Decoder
from pipeline.images.pool.pool import Decoders
from pipeline.images.reader import PixelReader
from pipeline.images.sources.source import Source

if TYPE_CHECKING:
    import torch

# Pictures of a sample that are read at once, and decoder processes that start before anything is known about the job.
SAMPLE_THREADS = 8


def worker_threads(config: Config) -> int:
    """Decoding threads: as configured, or one for each core."""
    return config.loader.workers or cores()


def decoder_processes(config: Config) -> int:
    """Decoder processes at most.

    Threads beyond the cores help where reading waits; processes beyond them would only take memory.
    """
    return min(worker_threads(config), cores())


def decoder_of(config: Config) -> Decoder:
    """The rules by which this job decodes."""
    images = config.images
    return Decoder(
        formats=tuple(images.formats),
        max_pixels=images.max_pixels,
        exif=images.exif,
        transparency=images.transparency,
        # The CPU decodes the images that the GPU does not take.
        kind="fast" if images.decoder == "gpu" else images.decoder,
    )


def open_decoders(config: Config) -> Decoders | None:
    """Decoder processes, none of which is started yet; None if images are decoded in this process."""
    loader = config.loader
    if loader.isolation != "process":
        return None
    processes = decoder_processes(config)
    return Decoders(decoder_of(config), processes=processes, seconds=loader.decode_seconds, memory=loader.decode_memory)


def pixel_reader(config: Config, root: str, spec: PreprocessSpec, decoders: Decoders | None = None) -> PixelReader:
    """The reader of a job's images; close it, as it may start processes that decode.

    Args:
        config: the job's.
        root: the folder or address below which relative paths lie.
        spec: the model's preprocessing.
        decoders: those of :func:`open_decoders`, if they were opened before.
    """
    images, loader = config.images, config.loader
    return PixelReader(
        source=Source(
            root=root,
            max_bytes=images.max_bytes,
            schemes=tuple(images.schemes),
            private_hosts=tuple(images.private_hosts),
            read_seconds=loader.read_seconds,
        ),
        decoder=decoder_of(config),
        spec=spec,
        decoders=decoders or open_decoders(config),
    )


def with_gpu(reader: PixelReader, config: Config, device: torch.device) -> PixelReader:
    """The same reader, with the decoder ``gpu`` on a device.

    Raises:
        BackendUnavailable: see :class:`~pipeline.images.gpu.decoder.NvidiaDecoder`.
    """
    from pipeline.images.gpu.decoder import NvidiaDecoder

    return replace(reader, gpu=NvidiaDecoder(reader.spec, device, reader.decoder, share=config.images.gpu_share))
