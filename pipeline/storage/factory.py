"""The storage at an address."""

from __future__ import annotations

from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.object_store import ObjectStorage
from pipeline.storage.urls import is_local, local_path


def open_storage(url: str) -> Storage:
    """The storage at a local path or an fsspec address such as ``s3://bucket/prefix``."""
    return LocalStorage(local_path(url)) if is_local(url) else ObjectStorage(url)
