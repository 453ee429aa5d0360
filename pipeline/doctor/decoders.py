"""Checks of the decoders on this machine, and of the processes that decode the images of the job."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from pipeline.core.errors import BackendUnavailable, PipelineError
from pipeline.doctor.check import Check, Status, Subject

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.core.records import PreprocessSpec

GROUP = "decoders"
# Larger than a model's input, so that the decoder "scaled" has something to scale.
WIDTH, HEIGHT = 1024, 768


def look(subject: Subject) -> Iterator[Check]:
    """Decode a JPEG file with every decoder in this process, and in the processes that the job starts."""
    from pipeline.config.validate import CHOICES
    from pipeline.core.records import PreprocessSpec
    from pipeline.engine.demo.folder import jpeg
    from pipeline.engine.demo.scenes import sample
    from pipeline.images.formats import PACKAGES
    from pipeline.models.architectures import OPENAI_MEAN, OPENAI_STD

    config = subject.job
    data = jpeg(sample(11, 0), WIDTH, HEIGHT)
    spec = PreprocessSpec(resize=224, crop=(224, 224), resample=3, mean=OPENAI_MEAN, std=OPENAI_STD)
    for kind in CHOICES["images.decoder"]:
        yield _gpu(config, spec) if kind == "gpu" else _in_process(config, kind, data, spec)
    for name in PACKAGES:
        yield _further(config, name)
    yield _isolated(config, data, spec)


def _further(config: Config, name: str) -> Check:
    """Check the package that decodes a format besides Pillow."""
    from pipeline.images.formats import HEIF, PACKAGES, installed

    package, what, way_out = PACKAGES[name]
    if name not in config.images.formats:
        return Check(GROUP, name, Status.SKIP, f"images.formats is without {name}")
    if not installed(name):
        status = Status.WARN if name == HEIF else Status.SKIP
        return Check(
            GROUP, name, status, f"{package} is not installed: {what} are rows with status unsupported", way_out
        )
    return Check(GROUP, name, Status.OK, f"{what} by {package} {version(package)}")


def _in_process(config: Config, kind: str, data: bytes, spec: PreprocessSpec) -> Check:
    from pipeline.core.records import Failure
    from pipeline.images.factory import decoder_of
    from pipeline.images.versions import library

    wanted = kind == config.images.decoder
    try:
        decoder = decoder_of(config.changed({"images.decoder": kind, "images.max_pixels": 2**30}))
        if "JPEG" not in decoder.formats:
            return Check(GROUP, kind, Status.SKIP, "images.formats is without JPEG")
        result = decoder.pixels(data, spec)
        words = library(kind)
    except Exception as error:
        # Versions of libraries that do not fit together raise errors of many types.
        way_out = "install the packages again: pip install --force-reinstall pillow simplejpeg"
        return Check(GROUP, kind, _missing(wanted), f"{type(error).__name__}: {error}", way_out)
    if isinstance(result, Failure):
        status = Status.FAIL if wanted else Status.WARN
        return Check(GROUP, kind, status, f"a good image was refused: {result.error}", "install Pillow again")
    return Check(GROUP, kind, Status.OK, f"{words}{' (of this job)' if wanted else ''}")


def _gpu(config: Config, spec: PreprocessSpec) -> Check:
    from pipeline.backends.devices import choose_device
    from pipeline.images.factory import decoder_of
    from pipeline.images.gpu.decoder import NvidiaDecoder
    from pipeline.images.gpu.nvimgcodec import WORDS

    wanted = config.images.decoder == "gpu"
    try:
        device = choose_device(config.backend.device)
        opened = NvidiaDecoder(spec, device, decoder_of(config))
    except BackendUnavailable as error:
        return Check(GROUP, "gpu", _missing(wanted), str(error))
    fact = f"nvImageCodec on {device} by the GPU's {WORDS[opened.engine]}{' (of this job)' if wanted else ''}"
    return Check(GROUP, "gpu", Status.OK, fact)


def _isolated(config: Config, data: bytes, spec: PreprocessSpec) -> Check:
    from pipeline.core.records import Failure
    from pipeline.images.factory import open_decoders

    decoders = open_decoders(config)
    if decoders is None:
        return Check(GROUP, "isolation", Status.SKIP, "loader.isolation=none: the job decodes in its own process")
    try:
        [result] = decoders.decode([data], spec)
    except PipelineError as error:
        return Check(GROUP, "isolation", Status.FAIL, str(error), "or take loader.isolation=none for images you trust")
    finally:
        decoders.close()
    if isinstance(result, Failure) and result.status not in ("unsupported_format", "too_many_pixels"):
        way_out = "raise loader.decode_memory or loader.decode_seconds"
        return Check(GROUP, "isolation", Status.FAIL, f"a good image was refused: {result.error}", way_out)
    return Check(GROUP, "isolation", Status.OK, f"{decoders.processes} decoder processes can start")


def _missing(wanted: bool) -> Status:
    return Status.FAIL if wanted else Status.SKIP
