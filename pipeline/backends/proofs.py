"""Proofs: figures with which a backend passed its gate, remembered in the artefact store for the jobs after that one.

A proof counts for the same arithmetic alone. Its recipe holds everything that decides it: the model's files, the
backend with its options and artefact, the batch size and the threads, the processor and its instructions, the versions
and the build of the libraries, this package's own code, variables of the environment, the limits and the labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.backends.artifacts.exports import recipe
from pipeline.backends.artifacts.store import PROOFS, Artifact, ArtifactStore, Recipe
from pipeline.backends.base import ImageEncoder
from pipeline.backends.compare import from_json, to_json
from pipeline.backends.proportion import Costs, Extent
from pipeline.config.choices import BACKENDS
from pipeline.config.schema import ParityConfig
from pipeline.core.errors import ArtifactError, StorageError
from pipeline.core.machine import machine
from pipeline.core.processes import cores
from pipeline.core.records import Parity, TextBank
from pipeline.models.checkpoint import Checkpoint

# Part of the recipe: raise it when a gate compares in another way.
VERSION = "1"
KIND, FILE = "parity", "parity.json"
# Beginnings of variables that choose kernels, their precision or their threads.
VARIABLES = ("ATEN_", "CUBLAS_", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_TF32_", "OMP_", "ONEDNN_", "ORT_", "TORCH")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """Figures of an earlier job, a digest of that job, and what its comparison cost."""

    parity: Parity
    job: str
    extent: Extent
    costs: Costs


@dataclasses.dataclass(frozen=True, slots=True)
class Proofs:
    """The proofs of one model with the same limits and labels.

    Attributes:
        root: of the artefact store; None for that of the user's cache.
        checkpoint: the model.
        limits: of the gate.
        bank: the embedded labels, if there are any.
    """

    root: str | None
    checkpoint: Checkpoint
    limits: ParityConfig
    bank: TextBank | None

    def find(self, encoder: ImageEncoder, extents: Sequence[Extent]) -> Proof | None:
        """The proof of the largest extent; None if there is none, or the store cannot be read."""
        if not _repeatable(encoder):
            return None
        try:
            found = (self._store.find(self._recipe(encoder, extent)) for extent in reversed(extents))
            return next((_proof(artifact) for artifact in found if artifact is not None), None)
        except (ArtifactError, StorageError) as error:
            log.info("parity figures of earlier jobs cannot be read: %s", error)
            return None

    def keep(self, encoder: ImageEncoder, proof: Proof) -> None:
        """Remember a proof; where the store cannot be written, the next job compares all again."""
        if not _repeatable(encoder):
            return
        facts = {
            "parity": to_json(proof.parity),
            "job": proof.job,
            "extent": dataclasses.asdict(proof.extent),
            "costs": dataclasses.asdict(proof.costs),
        }

        def build(folder: Path) -> Mapping[str, Any]:
            (folder / FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            return facts

        try:
            self._store.make(self._recipe(encoder, proof.extent), build)
        except (ArtifactError, StorageError) as error:
            log.info("the parity figures are not remembered for other jobs: %s", error)

    def forget(self, encoder: ImageEncoder, extents: Sequence[Extent]) -> None:
        """Remove the proofs of an encoder that is not near any more to what was proved."""
        try:
            for extent in extents:
                self._store.remove(self._recipe(encoder, extent))
        except (ArtifactError, StorageError) as error:
            log.warning("parity figures of earlier jobs cannot be removed: %s", error)

    @property
    def _store(self) -> ArtifactStore:
        return ArtifactStore(ArtifactStore(self.root).root / PROOFS)

    def _recipe(self, encoder: ImageEncoder, extent: Extent) -> Recipe:
        options = {
            "backend": encoder.fingerprint,
            # More than one where the device had no memory for the first.
            "batch_sizes": getattr(encoder, "batch_sizes", [encoder.batch_size]),
            "streams": encoder.streams,
            **surroundings(encoder.device),
            "limits": dataclasses.asdict(self.limits),
            "labels": None if self.bank is None else self.bank.fingerprint,
            "extent": dataclasses.asdict(extent),
            "version": VERSION,
        }
        return recipe(KIND, self.checkpoint, options, BACKENDS[encoder.name].packages)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Processor, libraries, environment and code, on which numbers and speed of every backend depend."""
    return {
        "cores": cores(),
        "processor": machine(str(device), cores())["processor"],
        "hardware": hardware(device),
        "libraries": _libraries(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "code": _code(),
    }


def hardware(device: torch.device) -> Any:
    """The kind of processor, in JSON: what decides which kernels it runs."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    # int8 products come out differently where an instruction is missing.
    return sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)


def _repeatable(encoder: ImageEncoder) -> bool:
    """False where kernels are chosen by timing them: the next process may choose others."""
    return "kernels" not in encoder.fingerprint and encoder.name != "tensorrt"


def _libraries() -> dict[str, Any]:
    """Builds and settings of the libraries in this process, besides the versions of the packages."""
    return {
        # With the instructions that torch uses, and the versions of oneDNN, MKL, CUDA and cuDNN.
        "torch": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@cache
def _code() -> str:
    """A digest of this package's modules between the pixels and the embeddings."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in ("backends", "models"):
        for path in sorted((package / name).rglob("*.py")):
            digest.update(f"{path.relative_to(package)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _proof(artifact: Artifact) -> Proof | None:
    """The proof in an artefact; None if its card was written by another version."""
    card = artifact.card
    try:
        return Proof(
            parity=from_json(card["parity"]),
            job=str(card["job"]),
            extent=Extent(**card["extent"]),
            costs=Costs(**card["costs"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
