"""Offline batch inference for CLIP-style models: images in, embeddings and labels out.

For programs and notebooks: :func:`embed`, :func:`embed_texts`, :func:`open_dataset`, the :class:`Dataset` that comes of
them, :func:`save_head` for models of embeddings, and :class:`PipelineError`, from which every foreseen error descends
(see :mod:`pipeline.core.errors`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.api.dataset import Dataset
    from pipeline.api.embed import embed, embed_texts, open_dataset
    from pipeline.api.heads import save_head
    from pipeline.core.errors import PipelineError

__all__ = ["Dataset", "PipelineError", "embed", "embed_texts", "open_dataset", "save_head"]
__version__ = "0.1.0"

_HOMES = {
    "Dataset": "pipeline.api.dataset",
    "PipelineError": "pipeline.core.errors",
    "embed": "pipeline.api.embed",
    "embed_texts": "pipeline.api.embed",
    "open_dataset": "pipeline.api.embed",
    "save_head": "pipeline.api.heads",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, when it is: the command lines of this package start without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
