"""nvImageCodec's decoders for the CPU in place of those of a GPU, in this process and in its feeders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.images.gpu import decoder, nvimgcodec

# Python imports a module of this name when it starts.
START = """
import sys

if "pipeline.engine.feeder_process" in sys.orig_argv:
    from pipeline.images.gpu import decoder
    from tests.host_codec import HostCodec

    HostCodec.engine = {engine!r}
    decoder.Nvimgcodec = HostCodec
"""


class HostCodec:
    """nvImageCodec without a GPU: the same calls, its own decoders for the CPU."""

    engine = nvimgcodec.HARDWARE

    def __init__(self, device: torch.device) -> None:
        module: Any = pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
        self.module = module
        kinds = [module.BackendKind.CPU_ONLY]
        self.decoder = nvimgcodec.decoder_of(module, kinds, module.NVIMGCODEC_DEVICE_CPU_ONLY)

    def active(self) -> nullcontext[None]:
        return nullcontext()

    def wait(self) -> None:
        pass

    def decode(self, encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        return nvimgcodec.decode(self.module, self.decoder, encoded, lambda image: torch.from_numpy(np.asarray(image)))


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *, feeders: str = nvimgcodec.HARDWARE) -> None:
    """Decode with it here and in feeders, whose engine is called ``feeders``; ``folder`` is an empty one."""
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    monkeypatch.setattr(decoder, "Nvimgcodec", HostCodec)
    (folder / "sitecustomize.py").write_text(START.format(engine=feeders))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
