"""From ``model.name`` to an opened checkpoint of any family."""

from __future__ import annotations

from importlib.util import find_spec

from transformers import logging as transformers_logging

from pipeline.config.schema import DEMO_MODEL, ModelConfig
from pipeline.models import transformers_form
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.files import is_open_clip
from pipeline.models.hub import OPEN_CLIP_PREFIX, find_folder
from pipeline.models.record import Checkpoint, as_recorded
from pipeline.storage.urls import local_file

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
    if config.weights == "random" and not local_file(config.name).is_dir() and (known := _known(config)) is not None:
        return known
    folder = find_folder(config)
    if is_open_clip(folder) or config.name.startswith(OPEN_CLIP_PREFIX):
        # Its library is imported only now.
        from pipeline.models import open_clip_form

        return open_clip_form.open_folder(config, folder)
    return transformers_form.open_folder(config, folder)


def _known(config: ModelConfig) -> Checkpoint | None:
    """A model with random weights that open_clip has the config of; None where it has none, or is not installed."""
    if config.name == DEMO_MODEL or find_spec("open_clip") is None:
        return None
    from pipeline.models import open_clip_form

    return open_clip_form.open_known(config)
