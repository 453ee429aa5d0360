"""The folder of the images in the plan of a dataset: its place is no part of what the dataset is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.storage.moved import has_moved
from pipeline.storage.urls import is_local, local_path


def moved_root(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The root of a stored plan's images, where the same images lie at another root by now; else None.

    They are the same if both paths lead to one folder, if both lie at the same place relative to their manifests, which
    are equal, or if the old folder is gone. A folder that is still there, beside another one, holds other images.

    Args:
        found: the content of the stored plan.
        wanted: the content of the plan of a job.
    """
    old, new = (_at(content, "fingerprints", "manifest", "root") for content in (found, wanted))
    if not isinstance(old, str) or not isinstance(new, str) or old == new:
        return None
    if has_moved(old, new):
        return old
    before, after = (_at(content, "config", "manifest", "path") for content in (found, wanted))
    inner = _within_project(old, before)
    return old if inner is not None and inner == _within_project(new, after) else None


def _within_project(root: str, manifest: Any) -> str | None:
    """The path from the manifest's folder to the root; None where one of them is not local."""
    if not isinstance(manifest, str) or not is_local(manifest) or not is_local(root):
        return None
    return os.path.relpath(local_path(root), os.path.dirname(local_path(manifest)))


def _at(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content
