"""From ``model.name`` to an opened checkpoint of any family."""

from __future__ import annotations

from transformers import logging as transformers_logging

from pipeline.config.schema import ModelConfig
from pipeline.models import transformers_form
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.hub import find_folder
from pipeline.models.record import Checkpoint, as_recorded

__all__ = ["Checkpoint", "as_recorded", "open_checkpoint"]


def open_checkpoint(config: ModelConfig) -> Checkpoint:
    """Load a checkpoint from the package, a local folder or the Hugging Face hub.

    Raises:
        ModelError: not found, not reachable, or of a family that is not supported.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if config.weights == "random" and config.name in ARCHITECTURES:
        return transformers_form.open_known(config)
    return transformers_form.open_folder(config, find_folder(config))
