"""The decoder ``gpu``: baseline JPEG files by nvImageCodec on the GPU, everything else by the CPU beside it.

What goes where, also to the cores, depends on the file alone and not on the load: the ways differ by a level here and
there, and a rerun must give the same bytes. The pictures are handed back on the host, like those of every other
decoder, so that whoever decodes need not be the process of the encoder.

nvImageCodec takes the memory for its output from CUDA's pool, which hands out again what was freed in stream order, and
the hardware engine does not wait for its stream (see :mod:`pipeline.images.gpu.nvimgcodec`). So the host waits until
nothing reads a decoded picture any more before the picture is freed, until its stream is empty before the engine is
called, and again before a kernel reads what it wrote.

Engines have left out a picture and reported it as decoded, which then is black: pictures of one colour are decoded
again by the CPU.

Untrusted files are decoded in the process that calls: ``loader.isolation`` contains only what is left to the CPU.
"""

from __future__ import annotations

import logging
import queue
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import BackendUnavailable
from pipeline.core.records import PreprocessSpec
from pipeline.images.decode import Decoder
from pipeline.images.gpu.jpeg_header import Baseline, baseline
from pipeline.images.gpu.nvimgcodec import KERNELS, Codec, Nvimgcodec
from pipeline.images.gpu.resize import FILTERS, resample

# Files decoded in one call at most.
CHUNK = 64
# Larger images are left to the CPU, where they are decoded one at a time.
LARGEST = 2**26
# Pixels decoded in one call; the memory for them is three bytes each.
CALL_PIXELS = 2**26
# Calls at a time: while one decodes, the other resizes.
LANES = 2
# Bytes at the end of a file that decide whether it goes to the device.
TAIL = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Lane:
    """One call at a time: what decodes, and the memory on the host, pinned for a GPU, that its results are copied to.

    ``pixels`` is uint8 ``[CHUNK, H, W, 3]``, ``plain`` one bool for each of them.
    """

    codec: Codec
    pixels: torch.Tensor
    plain: torch.Tensor


class NvidiaDecoder:
    """Decodes and preprocesses what it takes; safe to use from many threads.

    Args:
        spec: what the model wants.
        device: what decodes.
        rules: those of the decoder on the CPU; its formats, EXIF rule and limit of pixels count here too.
        share: the share of the files that it takes, from 0 to 1; which ones depends on their bytes alone.
        lanes: decoding calls at a time.
        open_codec: opens what decodes.

    Raises:
        BackendUnavailable: the device is no GPU or its memory is full, nvImageCodec is not there, the model's filter
            is not offered, or the JPEG engine comes and goes.
    """

    def __init__(
        self,
        spec: PreprocessSpec,
        device: torch.device,
        rules: Decoder,
        *,
        share: float = 1.0,
        lanes: int = LANES,
        open_codec: Callable[[torch.device], Codec] | None = None,
    ) -> None:
        if spec.resample not in FILTERS:
            raise BackendUnavailable(
                f"images.decoder=gpu has no resampling filter {spec.resample}, which this model wants; "
                "take images.decoder=exact"
            )
        self._spec, self._exif = spec, rules.exif
        self._most = min(rules.max_pixels, LARGEST) if "JPEG" in rules.formats else 0
        # Images that are worth a call.
        self.chunk = CHUNK
        self._below = round(share * 2**32)
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        pinned = device.type == "cuda"
        with _memory_explained():
            codecs = [(open_codec or Nvimgcodec)(device) for _ in range(lanes)]
            for codec in codecs:
                pixels = torch.empty((CHUNK, *spec.size, 3), dtype=torch.uint8, pin_memory=pinned)
                self._lanes.put(_Lane(codec, pixels, torch.empty(CHUNK, dtype=torch.bool, pin_memory=pinned)))
        # The way in which files are decoded, for fingerprints: HARDWARE or KERNELS.
        self.engine = codecs[0].engine
        if any(codec.engine != self.engine for codec in codecs):
            raise BackendUnavailable(
                "images.decoder=gpu: the JPEG engine answered only once; another program may have taken the GPU's "
                "memory meanwhile: run the same command again"
            )
        if self.engine == KERNELS:
            log.warning(
                "images.decoder=gpu: no JPEG engine answers, so the GPU's kernels decode: this GPU has none, or the "
                "container lacks a driver capability (NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"
            )

    def decode(self, encoded: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
        """uint8 ``[H, W, 3]`` at ``spec.size`` for each image, on the host; None if left to the CPU.

        None for all that is not a baseline JPEG without a fault in its structure, so that an image that
        fails is decoded, and reported, by the CPU's decoder.

        Raises:
            BackendUnavailable: the device's memory is full.
        """
        results: list[NDArray[np.uint8] | None] = [None] * len(encoded)
        taken: list[tuple[int, Baseline]] = []
        pixels = 0
        for index, data in enumerate(encoded):
            if zlib.crc32(data[-TAIL:]) >= self._below:
                continue
            header = baseline(data, exif=self._exif)
            if header is None or header.height * header.width > self._most:
                continue
            if taken and (len(taken) == CHUNK or pixels + header.height * header.width > CALL_PIXELS):
                self._call(encoded, taken, results)
                taken, pixels = [], 0
            taken.append((index, header))
            pixels += header.height * header.width
        if taken:
            self._call(encoded, taken, results)
        return results

    def _call(
        self,
        encoded: Sequence[bytes],
        taken: Sequence[tuple[int, Baseline]],
        results: list[NDArray[np.uint8] | None],
    ) -> None:
        lane = self._lanes.get()
        try:
            with _memory_explained(), lane.codec.active():
                found = self._decode(lane, encoded, taken)
            # One copy, as the next call writes over the lane's memory.
            pixels = lane.pixels[: len(found)].numpy().copy()
            for index, rgb, plain in zip(found, pixels, lane.plain[: len(found)].tolist(), strict=True):
                results[index] = None if plain else rgb
        finally:
            self._lanes.put(lane)

    def _decode(self, lane: _Lane, encoded: Sequence[bytes], taken: Sequence[tuple[int, Baseline]]) -> list[int]:
        """Decode into the lane's memory; the places in ``encoded`` of the pictures there."""
        codec = lane.codec
        codec.wait()
        decoded = codec.decode([encoded[index] for index, _ in taken])
        # This wait and the last one are needed: see the docstring of the module.
        codec.wait()
        try:
            found, pictures = [], []
            for (index, header), picture in zip(taken, decoded, strict=True):
                if picture is not None and picture.shape == (header.height, header.width, 3):
                    found.append(index)
                    pictures.append(turned(picture, header.orientation))
            if found:
                resampled = torch.stack(resample(pictures, self._spec))
                lane.pixels[: len(found)].copy_(resampled, non_blocking=True)
                lane.plain[: len(found)].copy_(_one_colour(resampled), non_blocking=True)
        finally:
            codec.wait()
        return found


def turned(picture: torch.Tensor, orientation: int) -> torch.Tensor:
    """``[H, W, 3]`` as its EXIF orientation (1 to 8) wants it shown."""
    if orientation >= 5:
        picture = picture.transpose(0, 1)
    flips = [axis for axis, which in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in which]
    return picture.flip(flips) if flips else picture


def _one_colour(pictures: torch.Tensor) -> torch.Tensor:
    """A bool for each picture of ``[N, H, W, 3]``, on its device."""
    colours = pictures.flatten(1, 2)
    return (colours.amax(1) == colours.amin(1)).all(1)


@contextmanager
def _memory_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        raise BackendUnavailable(
            "the device has no memory left to decode images on: lower loader.batch_size or loader.feeders, or take "
            f"images.decoder=fast ({error})"
        ) from error
