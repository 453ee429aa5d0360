"""Versions of the libraries that decode and resize, for the fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import PIL

from pipeline.config.schema import FORMATS, PILLOW_FORMATS, ImagesConfig
from pipeline.images.decode import EXACT

# Packages that decode further formats, and the version with which that began. It is left out of fingerprints, so that
# datasets from before stay the same ones.
_FURTHER = {"HEIF": ("pi-heif", "1.4.0"), "JXL": ("pillow-jxl-plugin", "1.3.8")}


def fingerprint(images: ImagesConfig, engine: str | None = None) -> dict[str, Any]:
    """The fingerprint of decoding: the config, the versions of the libraries, and what decodes on a GPU, if any does.

    ``engine`` is that of an opened :class:`~pipeline.images.gpu.decoder.NvidiaDecoder`. The plans of earlier
    datasets lack it (see :func:`pipeline.dataset.plan.compare`), and the default of ``gpu_share``.
    """
    formats = list(images.formats)
    if formats == list(FORMATS):
        # The default: that of earlier datasets is the same one.
        formats = list(PILLOW_FORMATS)
    values = asdict(images)
    share = values.pop("gpu_share")
    if images.decoder == "gpu" and share != 1:
        values["gpu_share"] = share
    if engine is not None:
        values["engine"] = engine
    return {**values, "formats": formats, "library": library(images.decoder) + _further(images.formats)}


def library(kind: str) -> str:
    """The versions of the libraries behind ``images.decoder=kind``; nothing is loaded to find them.

    simplejpeg brings its own libjpeg-turbo, one for each of its versions. Builds of torch for other devices (``+cpu``,
    ``+cu130``) resize alike.
    """
    used = f"Pillow {PIL.__version__}"
    if kind == EXACT:
        return used
    used += f", simplejpeg {version('simplejpeg')}, torch {version('torch').partition('+')[0]}"
    return f"{used}, nvImageCodec {_codec()}" if kind == "gpu" else used


def _codec() -> str:
    """The version of nvImageCodec, which is packaged by the version of CUDA."""
    for cuda in ("cu13", "cu12"):
        with suppress(PackageNotFoundError):
            return version(f"nvidia-nvimgcodec-{cuda}")
    return "of unknown version"


def _further(formats: Sequence[str]) -> str:
    """The versions behind further formats, where they are installed and not those that began it."""
    words = ""
    for name, (package, first) in _FURTHER.items():
        with suppress(PackageNotFoundError):
            if name in formats and version(package) != first:
                words += f", {package} {version(package)}"
    return words
