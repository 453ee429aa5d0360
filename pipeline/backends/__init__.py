"""Backends: the same model on different runtimes, opened by name from a table."""

from __future__ import annotations

from importlib import import_module

from pipeline.backends.base import BackendFactory

# Name to module; a module is imported when its backend is opened, never before.
TABLE: dict[str, str] = {
    "torch": "pipeline.backends.torch",
}


def factory(name: str) -> BackendFactory:
    """The ``open_encoder`` function of the backend ``name``."""
    opener: BackendFactory = import_module(TABLE[name]).open_encoder
    return opener
