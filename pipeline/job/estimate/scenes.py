"""The demo's scenes for a trial: those of the job if they are there, else a few of them in a folder of the trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import ManifestError
from pipeline.core.records import Piece
from pipeline.dataset import plan
from pipeline.engine.demo import folder as demo
from pipeline.storage.base import Storage

# Scenes that are rendered for the gates, which look at the first ones, and for the trial.
GATES, TRIAL = 256, 1024
log = logging.getLogger(__name__)


class Scenes:
    """What stands for the manifest of a job that has none; one that has its own stays as it is.

    Args:
        config: of the job.
        storage: its output.
        folder: of the trial; nothing is left anywhere else.

    Raises:
        ManifestError: the output was begun with scenes that are gone.
    """

    def __init__(self, config: Config, storage: Storage, folder: Path) -> None:
        self.seconds, self._rendered, self._folder, self.config = 0.0, 0, folder, config
        manifest, self._few = config.manifest, False
        if manifest.path is not None:
            return
        where = demo.scenes_folder(config.output.dir)
        path = demo.manifest_in(where, manifest.demo_scenes)
        log.info("manifest.path is not set: estimated for %d rendered scenes in %s", manifest.demo_scenes, where)
        if not path.exists():
            if plan.read(storage) is not None:
                raise ManifestError(
                    f"{path}: the scenes of {storage.url} are gone, and an estimate renders none there; the same "
                    "command without run.dry does"
                )
            self._few = True
            path = self._render(range(min(GATES, manifest.demo_scenes)))
        given = replace(manifest, path=str(path), id="id", image="path", keep=[demo.TRUTH], root=None)
        self.config = replace(config, manifest=given)

    @property
    def to_render(self) -> float:
        """Seconds that rendering those of the job will take; 0 where they are there."""
        if not self._few:
            return 0.0
        return self.seconds / self._rendered * self.config.manifest.demo_scenes

    def sample(self, runs: Sequence[Piece]) -> list[Piece]:
        """As many of the runs as there are scenes for."""
        if not self._few:
            return list(runs)
        taken, rows = list[Piece](), list[int]()
        for run in runs:
            if len(rows) >= TRIAL:
                break
            taken.append(run)
            rows += range(run.start, run.stop)
        self._render(rows)
        return taken

    def _render(self, rows: Sequence[int]) -> Path:
        began = time.time()
        path = demo.render_folder(self._folder, self.config.manifest.demo_scenes, rows=rows)
        self._rendered += len(rows)
        self.seconds += time.time() - began
        return path
