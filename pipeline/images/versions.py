"""Versions of the libraries that decode and resize, for the fingerprint."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import PIL

from pipeline.images.decode import EXACT


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
