"""A tower to a TorchScript file.

``torch.jit`` is deprecated in favour of ``torch.export``, and still what C++ services and older deployments load.
It is called here and nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.backends.artifacts.exports import check_parity, hold_card, recipe
from pipeline.backends.artifacts.onnx_export import quiet
from pipeline.backends.artifacts.store import Artifact, ArtifactStore
from pipeline.config.schema import ParityConfig
from pipeline.core.records import Sample
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower

FILE = "model.pt"
log = logging.getLogger(__name__)


def traced(
    checkpoint: Checkpoint,
    store: ArtifactStore,
    *,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    sample: Callable[[], Sample],
    limits: ParityConfig,
) -> Artifact:
    """The traced image tower ``model.pt``, from the store or traced now and compared with fp32.

    Raises:
        ParityError: the trace is too far from fp32; nothing is published.
    """
    options = {"tower": "image", "precision": precision, "device": device.type}

    def build(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        log.info("tracing %s in %s; once, then it comes from the store", checkpoint.name, precision)
        tower = copy.deepcopy(ImageTower(checkpoint)).to(device=device, dtype=dtype)
        example = torch.zeros(2, 3, *checkpoint.spec.size, device=device, dtype=dtype)
        with quiet(), torch.no_grad():
            torch.jit.trace(tower, example, check_trace=False).save(str(folder / FILE))
        module = load(folder / FILE, device)
        parity = check_parity(
            lambda inputs: _run(module, torch.from_numpy(inputs["pixel_values"]).to(device=device, dtype=dtype)),
            checkpoint,
            tower="image",
            precision=precision,
            sample=sample,
            limits=limits,
            what=f"{checkpoint.name}, image tower in TorchScript {precision}",
        )
        return {
            "parity": dataclasses.asdict(parity),
            "facts": {"seconds": round(time.perf_counter() - started, 1)},
        }

    artifact = store.make(recipe("torchscript", checkpoint, options), build)
    hold_card(artifact, limits, precision=precision)
    return artifact


def load(path: Path, device: torch.device) -> Any:
    """The module in a TorchScript file, on ``device``."""
    with quiet():
        return torch.jit.load(str(path), map_location=device).eval()


@torch.inference_mode()
def _run(module: Any, pixel_values: torch.Tensor) -> Any:
    return module(pixel_values).cpu().numpy()
