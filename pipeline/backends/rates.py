"""Rates of the candidates of ``backend=auto``, remembered in the artefact store for later jobs.

A rate counts for the same model, candidate, processor, cores, versions, code and limits alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.backends.artifacts.exports import recipe
from pipeline.backends.artifacts.store import ArtifactStore, Recipe
from pipeline.backends.candidates import Rate
from pipeline.backends.devices import choose_precision
from pipeline.backends.proofs import surroundings
from pipeline.config.choices import BACKENDS
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import ArtifactError, StorageError
from pipeline.models.checkpoint import Checkpoint

# Part of the recipe: raise it when rates are measured in another way.
VERSION = "1"
KIND, FILE = "rate", "rate.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of one model on one device within the same limits; ``root`` is that of the artefact store."""

    root: str | None
    checkpoint: Checkpoint
    device: torch.device
    limits: ParityConfig

    def find(self, backend: BackendConfig) -> Rate | None:
        """The rate of a backend; None if there is none, or the store cannot be read."""
        try:
            artifact = self._store.find(self._recipe(backend))
            return None if artifact is None else Rate(**artifact.card["facts"])
        except (ArtifactError, StorageError, KeyError, TypeError) as error:
            log.info("the rate of backend=%s cannot be read: %s", backend.name, error)
            return None

    def keep(self, backend: BackendConfig, rate: Rate) -> None:
        """Remember a rate; where the store cannot be written, the next job measures again."""

        def build(folder: Path) -> Mapping[str, Any]:
            (folder / FILE).write_text(json.dumps(asdict(rate)), encoding="utf-8")
            return {"facts": asdict(rate)}

        try:
            self._store.make(self._recipe(backend), build)
        except (ArtifactError, StorageError) as error:
            log.warning("%s; the rate of backend=%s is not remembered", error, backend.name)

    def forget(self, backend: BackendConfig) -> None:
        """Remove the rate of a backend that missed its limits on a job."""
        try:
            self._store.remove(self._recipe(backend))
        except (ArtifactError, StorageError) as error:
            log.warning("the rate of backend=%s cannot be removed: %s", backend.name, error)

    @property
    def _store(self) -> ArtifactStore:
        return ArtifactStore(self.root)

    def _recipe(self, backend: BackendConfig) -> Recipe:
        precision = choose_precision(backend, self.device)
        limits = {name: getattr(self.limits, name)[precision] for name in ("lowest_cosine", "mean_cosine", "top1")}
        around = surroundings(self.device)
        # The doctor has a compiler's cache of its own, which changes no rate.
        environment = {name: value for name, value in around["environment"].items() if not name.endswith("_CACHE_DIR")}
        options = {
            "backend": backend.name,
            "precision": precision,
            "compile": backend.compile,
            "cuda_graph": backend.cuda_graph,
            "limits": limits,
            "version": VERSION,
            **around,
            "environment": environment,
        }
        return recipe(KIND, self.checkpoint, options, BACKENDS[backend.name].packages)
