"""Which decoders can turn a JPEG into pixels here, and whether the processes start that the job's images go to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipeline.core.errors import PipelineError
from pipeline.doctor.check import Check, Status, Subject

GROUP = "decoders"
# A picture of half a megapixel and more, so that the decoder scaled does what it is there for.
WIDTH, HEIGHT = 1024, 768


def look(subject: Subject) -> Iterator[Check]:
    """Decode one picture by every decoder in this process, and by the job's own as the job does it."""
    from pipeline.config.validate import CHOICES
    from pipeline.core.records import Failure, PreprocessSpec
    from pipeline.engine.demo.folder import jpeg
    from pipeline.engine.demo.scenes import sample
    from pipeline.images.factory import decoder_of, open_decoders
    from pipeline.images.versions import library
    from pipeline.models.architectures import OPENAI_MEAN, OPENAI_STD

    config = subject.job
    data = jpeg(sample(11, 0), WIDTH, HEIGHT)
    spec = PreprocessSpec(resize=224, crop=(224, 224), resample=3, mean=OPENAI_MEAN, std=OPENAI_STD)
    for kind in CHOICES["images.decoder"]:
        wanted = kind == config.images.decoder
        if kind == "gpu":
            yield _gpu(subject, spec, wanted=wanted)
            continue
        decoder = decoder_of(replace(config, images=replace(config.images, decoder=kind, max_pixels=2**30)))
        try:
            if "JPEG" not in decoder.formats:
                yield Check(GROUP, kind, Status.SKIP, "images.formats is without JPEG")
                continue
            result = decoder.pixels(data, spec)
            words = library(kind)
        except Exception as error:
            # Libraries that do not fit together raise errors of many kinds.
            status = Status.FAIL if wanted else Status.SKIP
            way_out = "install the packages again: pip install --force-reinstall pillow simplejpeg"
            yield Check(GROUP, kind, status, f"{type(error).__name__}: {error}", way_out)
            continue
        if isinstance(result, Failure):
            status = Status.FAIL if wanted else Status.WARN
            yield Check(GROUP, kind, status, f"a good picture was refused: {result.error}", "install Pillow again")
        else:
            yield Check(GROUP, kind, Status.OK, f"{words}{' (of this job)' if wanted else ''}")
    decoders = open_decoders(config)
    if decoders is None:
        yield Check(GROUP, "isolation", Status.SKIP, "loader.isolation=none: the job decodes in its own process")
        return
    try:
        results = decoders.decode([data], spec)
    except PipelineError as error:
        yield Check(GROUP, "isolation", Status.FAIL, str(error), "or take loader.isolation=none for images you trust")
        return
    finally:
        decoders.close()
    failed = [result for result in results if isinstance(result, Failure)]
    if failed and failed[0].status not in ("unsupported_format", "too_many_pixels"):
        way_out = "raise loader.decode_memory or loader.decode_seconds"
        yield Check(GROUP, "isolation", Status.FAIL, f"a good picture was refused: {failed[0].error}", way_out)
    else:
        yield Check(GROUP, "isolation", Status.OK, f"{decoders.processes} processes of their own can start")


def _gpu(subject: Subject, spec: object, *, wanted: bool) -> Check:
    from pipeline.backends.devices import choose_device
    from pipeline.core.errors import BackendUnavailable
    from pipeline.core.records import PreprocessSpec
    from pipeline.images.gpu.nvimgcodec import NvidiaDecoder

    assert isinstance(spec, PreprocessSpec)
    images = subject.job.images
    try:
        device = choose_device(subject.job.backend.device)
        NvidiaDecoder(spec, device, formats=images.formats, exif=images.exif, max_pixels=images.max_pixels)
    except BackendUnavailable as error:
        return Check(GROUP, "gpu", Status.FAIL if wanted else Status.SKIP, str(error))
    return Check(GROUP, "gpu", Status.OK, f"nvImageCodec on {device}{' (of this job)' if wanted else ''}")
