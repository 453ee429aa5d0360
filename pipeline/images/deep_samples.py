"""Samples of more than eight bits to grey levels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.core.records import Failure
from pipeline.images.tiff import Reading

# Rows of deep samples that are scaled at a time: the sums need eight bytes a sample.
BAND = 256
_FULL = 65_535


def to_eight_bits(image: Image.Image) -> Image.Image | Failure:
    """Grey of eight bits in RGB, or in RGBA where the file names a clear grey (``tRNS`` in PNG).

    Integers are samples of 16 bits, or of as many as the file says, of which the high byte counts; floats are scaled
    from their lowest and highest value.
    """
    samples = np.asarray(image)
    reading = image.info.get("reading", Reading(b""))
    if image.mode == "F":
        grey = _scaled(samples)
    elif image.mode == "I" and (int(samples.min()) < 0 or int(samples.max()) > _FULL):
        return Failure("unsupported", "integers of 32 bits that are beyond 16 bits: their black and white are unknown")
    else:
        grey = np.empty(samples.shape, dtype=np.uint8)
        for band in _bands(samples):
            grey[band] = samples[band].astype(np.int64) >> (reading.bits - 8)
    if reading.negative:
        grey = 255 - grey
    clear = image.info.get("transparency")
    result = Image.fromarray(grey).convert("RGB")
    if isinstance(clear, int):
        result.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    return result


def _bands(samples: np.ndarray) -> list[slice]:
    return [slice(start, start + BAND) for start in range(0, len(samples), BAND)]


def _scaled(samples: np.ndarray) -> np.ndarray:
    bands, grey = _bands(samples), np.empty(samples.shape, dtype=np.uint8)
    low = min(float(_finite(samples[band]).min()) for band in bands)
    high = max(float(_finite(samples[band]).max()) for band in bands)
    for band in bands:
        finite = _finite(samples[band])
        grey[band] = ((finite - low) / (high - low) * 255).round() if high > low else 0
    return grey


def _finite(samples: np.ndarray) -> np.ndarray:
    return np.nan_to_num(samples.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
