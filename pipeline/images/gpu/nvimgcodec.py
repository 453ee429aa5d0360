"""nvImageCodec: JPEG files to pictures on a GPU.

nvImageCodec gives a file to nvJPEG's hardware engine where the GPU has one, and to nvJPEG's CUDA kernels where it has
none or the engine does not take the file. Without the driver capability ``video`` it leaves the engine out without an
error, so the engine is asked for alone once, and the fingerprint names what decodes.

The hardware engine of an H100 writes its output when it is called, whatever its stream still has to do first
(pytorch/vision #9606, meta-pytorch/torchcodec #1634). torch must not take its memory from CUDA's pool, as nvImageCodec
does; where it does, the engine is left out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from PIL import Image

from pipeline.core.errors import BackendUnavailable, install_hint

# Threads that nvImageCodec starts in each lane to read headers, and for the part of CUDA decoding that is the host's.
CODEC_THREADS = 4
# Halved colours are interpolated, as libjpeg-turbo and with it Pillow does; the default was 0 up to nvImageCodec 0.8.
OPTIONS = ":fancy_upsampling=1"
# Names of the two ways to decode: the GPU's JPEG engine, or its kernels.
HARDWARE, KERNELS = "hardware", "kernels"
WORDS = {HARDWARE: "JPEG engine", KERNELS: "kernels"}


class Codec(Protocol):
    """Interface of a decoder of whole files on a device, used by one thread at a time."""

    engine: str

    def active(self) -> AbstractContextManager[Any]:
        """Its stream and device are current within."""

    def wait(self) -> None:
        """Return when its stream has nothing to do."""

    def decode(self, encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        """uint8 ``[H, W, 3]`` as stored, on the device; None for a file that it does not take."""


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
