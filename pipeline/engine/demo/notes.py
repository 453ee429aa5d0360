"""The notice about the demo model for people who try it on images of their own."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from pipeline.config.schema import DEMO_MODEL, Config
from pipeline.engine.demo.scenes import COLOURS, SHAPES
from pipeline.storage.urls import local_path

FACT = (
    f'model={DEMO_MODEL}, the default, knows rendered shapes only, such as "red circle": its labels and its embeddings '
    "of other images mean nothing, whatever the scores"
)
WAY_OUT = "model=clip_vit_b32 takes a real model"
NOTICE = f"{FACT}; {WAY_OUT}"
log = logging.getLogger(__name__)
# The name that pipeline.engine.demo.folder gives the manifest of rendered scenes.
_SCENES = re.compile(r"scenes-\d+-\d+x\d+-\d+\.parquet")


def notes_of(config: Config) -> tuple[str, ...]:
    """The notice, where a config uses the demo model with other images or labels than the demo's own; else nothing."""
    if config.model.name != DEMO_MODEL:
        return ()
    path, prompts = config.manifest.path, config.prompts
    scenes = path is None or _SCENES.fullmatch(Path(local_path(path)).name) is not None
    known = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    return () if scenes and prompts.path is None and {*prompts.labels} <= known else (NOTICE,)


def log_notes(config: Config) -> None:
    """Log the notice."""
    for note in notes_of(config):
        log.warning("%s", note)
