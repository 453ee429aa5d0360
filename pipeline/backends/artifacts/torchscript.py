"""Export of an image tower to TorchScript.

``torch.jit`` is deprecated in favour of ``torch.export``, but C++ services and older deployments load TorchScript.
Only this module calls it.
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

from pipeline.backends.artifacts.exports import ExportedTower, check_parity, hold_card, recipe
from pipeline.backends.artifacts.onnx_export import quiet
from pipeline.backends.artifacts.store import Artifact, ArtifactStore
from pipeline.backends.compare import to_json
from pipeline.backends.devices import DTYPES
from pipeline.config.schema import ParityConfig
from pipeline.core.records import Sample
from pipeline.models.checkpoint import Checkpoint

FILE = "model.pt"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class TraceOptions:
    """Precision and device of a trace."""

    precision: str
    device: torch.device


def traced(
    checkpoint: Checkpoint,
    options: TraceOptions,
    store: ArtifactStore,
    *,
    sample: Callable[[], Sample],
    limits: ParityConfig,
) -> Artifact:
    """Return the traced image tower ``model.pt``, from the store, or traced and compared with fp32.

    Raises:
        ParityError: the trace is too far from fp32; it is not published.
    """
    precision, device, dtype = options.precision, options.device, DTYPES[options.precision]
    details = {"tower": "image", "precision": precision, "device": device.type}

    def build(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        log.info("tracing %s in %s; later runs load it from the store", checkpoint.name, precision)
        tower = copy.deepcopy(checkpoint.image).to(device=device, dtype=dtype)
        example = torch.zeros(2, 3, *checkpoint.spec.size, device=device, dtype=dtype)
        with quiet(), torch.no_grad():
            torch.jit.trace(tower, example, check_trace=False).save(str(folder / FILE))
        module = load(folder / FILE, device)
        exported = ExportedTower(
            lambda inputs: _run(module, torch.from_numpy(inputs["pixel_values"]).to(device=device, dtype=dtype)),
            tower="image",
            precision=precision,
            title=f"{checkpoint.name}, image tower in TorchScript {precision}",
        )
        parity = check_parity(exported, checkpoint, sample=sample, limits=limits)
        facts = {"seconds": round(time.perf_counter() - started, 1)}
        return {"parity": to_json(parity), "facts": facts}

    artifact = store.make(recipe("torchscript", checkpoint, details), build)
    hold_card(artifact, limits, precision=precision)
    return artifact


def load(path: Path, device: torch.device) -> Any:
    """Load a TorchScript file onto ``device``."""
    with quiet():
        return torch.jit.load(str(path), map_location=device).eval()


@torch.inference_mode()
def _run(module: Any, pixel_values: torch.Tensor) -> Any:
    return module(pixel_values).cpu().numpy()
