"""The decoder ``gpu``: baseline JPEG files by nvImageCodec on the GPU, everything else by the CPU beside it.

nvImageCodec gives a file to nvJPEG's hardware engine where the GPU has one, and to nvJPEG's CUDA kernels where it has
none or the engine does not take the file. Without the driver capability ``video`` it leaves the engine out without an
error, so the engine is asked for alone once, and the fingerprint names what decodes. What goes where, also to the
cores, depends on the file alone and not on the load: the ways differ by a level here and there, and a rerun must give
the same bytes.

The hardware engine of an H100 writes its output when it is called, whatever its stream still has to do first
(pytorch/vision #9606, meta-pytorch/torchcodec #1634). nvImageCodec takes the memory for that output from CUDA's pool,
which hands out again what was freed in stream order. So the host waits until nothing reads a decoded picture any more
before the picture is freed, until its stream is empty before the engine is called, and again before a kernel reads what
it wrote. torch must not take its memory from the same pool; where it does, the engine is left out.

Engines have left out a picture and reported it as decoded, which then is black: pictures of one colour are decoded
again by the CPU.

Untrusted files are decoded in this process here, as no other process can write to its GPU's memory:
``loader.isolation`` contains only what is left to the CPU.
"""

from __future__ import annotations

import io
import logging
import queue
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from PIL import Image

from pipeline.core.errors import BackendUnavailable, install_hint
from pipeline.core.records import PreprocessSpec
from pipeline.images.decode import Decoder
from pipeline.images.gpu.jpeg_header import Baseline, baseline
from pipeline.images.gpu.resize import FILTERS, resample

CHUNK = 64
# Larger images are left to the CPU, where they are decoded one at a time.
LARGEST = 2**26
# Pixels decoded in one call; the memory for them is three bytes each.
CALL_PIXELS = 2**26
# Calls at a time: while one decodes, the other resizes.
LANES = 2
# Threads that nvImageCodec starts in each lane to read headers, and for the part of CUDA decoding that is the host's.
CODEC_THREADS = 4
# Halved colours are interpolated, as libjpeg-turbo and with it Pillow does; the default was 0 up to nvImageCodec 0.8.
OPTIONS = ":fancy_upsampling=1"
# Names of the two ways to decode: the GPU's JPEG engine, or its kernels.
HARDWARE, KERNELS = "hardware", "kernels"
WORDS = {HARDWARE: "JPEG engine", KERNELS: "kernels"}
# Bytes at the end of a file that decide whether it goes to the device.
TAIL = 64
log = logging.getLogger(__name__)


class Codec(Protocol):
    """Interface of a decoder of whole files on a device, used by one thread at a time."""

    engine: str

    def active(self) -> AbstractContextManager[Any]:
        """Its stream and device are current within."""

    def wait(self) -> None:
        """Return when its stream has nothing to do."""

    def decode(self, encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        """uint8 ``[H, W, 3]`` as stored, on the device; None for a file that it does not take."""


class NvidiaDecoder:
    """Decodes and preprocesses what it takes; safe to use from many threads.

    Args:
        spec: what the model wants.
        device: where the pictures are wanted.
        rules: those of the decoder on the CPU; its formats, EXIF rule and limit of pixels count here too.
        share: the share of the files that it takes, from 0 to 1; which ones depends on their bytes alone.
        lanes: decoding calls at a time.
        open_codec: opens what decodes.

    Raises:
        BackendUnavailable: the device is no GPU, nvImageCodec is not there, the model's filter is not offered, or the
            JPEG engine comes and goes.
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
        self._lanes: queue.SimpleQueue[Codec] = queue.SimpleQueue()
        codecs = [(open_codec or Nvimgcodec)(device) for _ in range(lanes)]
        for codec in codecs:
            self._lanes.put(codec)
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

    def decode(self, encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        """uint8 ``[H, W, 3]`` at ``spec.size`` for each image, on the device and finished; None if left to the CPU.

        None for all that is not a baseline JPEG without a fault in its structure, so that an image that
        fails is decoded, and reported, by the CPU's decoder.

        Raises:
            BackendUnavailable: the device's memory is full.
        """
        results: list[torch.Tensor | None] = [None] * len(encoded)
        taken: list[tuple[int, Baseline]] = []
        pixels = 0
        for index, data in enumerate(encoded):
            if zlib.crc32(data[-TAIL:]) >= self._below:
                continue
            header = baseline(data, exif=self._exif)
            if header is None or header.height * header.width > self._most:
                continue
            if taken and pixels + header.height * header.width > CALL_PIXELS:
                self._call(encoded, taken, results)
                taken, pixels = [], 0
            taken.append((index, header))
            pixels += header.height * header.width
        if taken:
            self._call(encoded, taken, results)
        return results

    def _call(
        self, encoded: Sequence[bytes], taken: Sequence[tuple[int, Baseline]], results: list[torch.Tensor | None]
    ) -> None:
        codec = self._lanes.get()
        try:
            with _memory_explained(), codec.active():
                self._decode(codec, encoded, taken, results)
        finally:
            self._lanes.put(codec)

    def _decode(
        self,
        codec: Codec,
        encoded: Sequence[bytes],
        taken: Sequence[tuple[int, Baseline]],
        results: list[torch.Tensor | None],
    ) -> None:
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
            resampled = resample(pictures, self._spec)
            plain = _one_colour(resampled)
        finally:
            codec.wait()
        # Only now, as the host would spin on a core for what is not there yet.
        for index, picture, flat in zip(found, resampled, plain.tolist(), strict=True):
            results[index] = None if flat else picture


class Nvimgcodec:
    """nvImageCodec with a decoder and a stream of its own.

    Raises:
        BackendUnavailable: the device is no GPU, or the package or nvJPEG is not there.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise BackendUnavailable(
                f"images.decoder=gpu needs a GPU, and backend.device is {device.type}; "
                "take images=fast or backend.device=cuda"
            )
        self._module = module = _import()
        self._device = device
        self.stream = torch.cuda.Stream(device)
        # A wait for it does not spin on a core, as one for a stream does.
        self._done = torch.cuda.Event(blocking=True)
        kinds = [module.BackendKind.HYBRID_CPU_GPU, module.BackendKind.GPU_ONLY]
        hardware = module.BackendKind.HW_GPU_ONLY
        device_id = self.stream.device.index
        self.engine = KERNELS
        if torch.cuda.get_allocator_backend() != "cudaMallocAsync" and takes_a_picture(
            module, hardware, device_id, cuda_stream=self.stream.cuda_stream
        ):
            kinds.insert(0, hardware)
            self.engine = HARDWARE
            self.wait()
        try:
            self._decoder = decoder_of(module, kinds, device_id)
        except RuntimeError as error:
            raise BackendUnavailable(f"images.decoder=gpu: nvImageCodec finds no decoder: {error}") from error

    def active(self) -> AbstractContextManager[Any]:
        """See :class:`Codec`."""
        return torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """See :class:`Codec`."""
        self._done.record(self.stream)
        self._done.synchronize()

    def decode(self, encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        """See :class:`Codec`."""
        return decode(
            self._module,
            self._decoder,
            encoded,
            # Not by DLPack, which would have one stream wait for the other: the host has waited already.
            lambda image: torch.as_tensor(image, device=self._device),
            cuda_stream=self.stream.cuda_stream,
        )


def decoder_of(module: Any, kinds: Sequence[Any], device_id: int) -> Any:
    """A decoder of nvImageCodec that uses backends of these kinds alone, the first that takes a file.

    Raises:
        RuntimeError: there is none.
    """
    return module.Decoder(
        device_id=device_id,
        max_num_cpu_threads=CODEC_THREADS,
        backends=[module.Backend(kind, 1.0, module.LoadHintPolicy.IGNORE) for kind in kinds],
        options=OPTIONS,
    )


def takes_a_picture(module: Any, kind: Any, device_id: int, *, cuda_stream: int = 0) -> bool:
    """True if a backend of this kind alone decodes an ordinary JPEG file."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((512, 512)).convert("RGB").save(file, "JPEG", subsampling=2)
    try:
        decoder = decoder_of(module, [kind], device_id)
    except RuntimeError:
        return False
    [found] = decode(module, decoder, [file.getvalue()], lambda image: torch.empty(0), cuda_stream=cuda_stream)
    return found is not None


def decode(
    module: Any,
    decoder: Any,
    encoded: Sequence[bytes],
    to_tensor: Callable[[Any], torch.Tensor],
    *,
    cuda_stream: int = 0,
) -> list[torch.Tensor | None]:
    """RGB by rows in the stored orientation: a tensor that holds each decoded image; None where decoding fails."""
    streams = []
    places = []
    for index, data in enumerate(encoded):
        try:
            streams.append(module.CodeStream(data))
        except RuntimeError:
            # nvImageCodec reads headers more strictly than ``baseline``.
            continue
        places.append(index)
    parameters = module.DecodeParams(
        apply_exif_orientation=False, color_spec=module.ColorSpec.SRGB, sample_format=module.SampleFormat.I_RGB
    )
    results: list[torch.Tensor | None] = [None] * len(encoded)
    images = decoder.decode(streams, params=parameters, cuda_stream=cuda_stream) if streams else []
    for index, image in zip(places, images, strict=True):
        if image is not None:
            results[index] = to_tensor(image)
    return results


def turned(picture: torch.Tensor, orientation: int) -> torch.Tensor:
    """``[H, W, 3]`` as its EXIF orientation (1 to 8) wants it shown."""
    if orientation >= 5:
        picture = picture.transpose(0, 1)
    flips = [axis for axis, which in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in which]
    return picture.flip(flips) if flips else picture


def version() -> str:
    """Version of nvImageCodec, for fingerprints.

    Raises:
        BackendUnavailable: it is not there.
    """
    return str(_import().__version__)


def _import() -> Any:
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise BackendUnavailable(
            f"images.decoder=gpu needs nvImageCodec ({error}): {install_hint('gpu')}; or take images=fast"
        ) from error
    return nvimgcodec


def _one_colour(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """A bool for each picture, on its device."""
    if not pictures:
        return torch.zeros(0, dtype=torch.bool)
    all_of_them = torch.stack(list(pictures)).flatten(1, 2)
    return (all_of_them.amax(1) == all_of_them.amin(1)).all(1)


@contextmanager
def _memory_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        raise BackendUnavailable(
            "the device has no memory left to decode images on: lower loader.batch_size or take images.decoder=fast "
            f"({error})"
        ) from error
