"""Functions of a config and its checkpoint: preprocessing, the opened backend, the number of compared images."""

from __future__ import annotations

from pipeline.backends.base import Draw, ImageEncoder, factory
from pipeline.config.schema import Config
from pipeline.core.records import PreprocessSpec
from pipeline.models.checkpoint import Checkpoint


def spec_of(config: Config, checkpoint: Checkpoint) -> PreprocessSpec:
    """Return the preprocessing of the checkpoint with the crop of the config."""
    return checkpoint.cropped(config.images.crop_corner)


def open_backend(config: Config, checkpoint: Checkpoint, sample: Draw, size: int) -> ImageEncoder:
    """Open the backend of the config for batches of ``size``; see :class:`~pipeline.backends.base.BackendFactory`."""
    opener = factory(config.backend.name)
    return opener(checkpoint, config.backend, batch_size=size, sample=sample, limits=config.parity)


def images_compared(config: Config) -> int:
    """Images that a backend is compared on; twice as many where one half is for calibration."""
    return config.parity.images * (2 if config.backend.quantization == "static" else 1)
