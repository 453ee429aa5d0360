"""The text tower of an engine: for the labels, once and in fp32, and for the texts of a manifest, batch by batch."""

from __future__ import annotations

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.oom import HalvingEncoder
from pipeline.backends.streams import count_streams
from pipeline.backends.text import open_text_encoder, pass_text_gate
from pipeline.config.schema import Config
from pipeline.core.processes import cores
from pipeline.core.records import Parity, TextBank
from pipeline.engine.demo import folder as demo
from pipeline.engine.texts import first_texts
from pipeline.manifest.manifest import Manifest
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.label_files import read_labels
from pipeline.models.text import build_bank
from pipeline.telemetry.tracing import span


def bank_of(config: Config, checkpoint: Checkpoint) -> TextBank | None:
    """Embed the labels of a config, those of the demo for the demo model; None where it has none."""
    if config.manifest.image is None:
        # The demo's own labels are of images too.
        return None
    # A new thread may have fewer of torch's threads than the machine has cores.
    torch.set_num_threads(cores())
    prompts = demo.prompts_of(config)
    with span("prompts"):
        labels = read_labels(prompts)
        return build_bank(checkpoint, labels, prompts, config.labels) if labels.names else None


def open_tower(config: Config, checkpoint: Checkpoint) -> HalvingEncoder | None:
    """Open the text tower for the batch size of a config; None where its manifest names no texts.

    Raises:
        ModelError, BackendUnavailable: see :func:`~pipeline.backends.text.open_text_encoder`.
    """
    if config.manifest.text is None:
        return None

    def opened(size: int) -> ImageEncoder:
        encoder = open_text_encoder(checkpoint, config.backend, batch_size=size)
        encoder.streams = count_streams(config.backend.streams, encoder.device)
        return encoder

    # Smaller batches are embedded by the same operations, which need no other comparison with fp32.
    return HalvingEncoder(opened, lambda encoder: None, batch_size=config.loader.batch_size)


def tower_parity(
    tower: ImageEncoder | None, checkpoint: Checkpoint, manifest: Manifest, config: Config
) -> Parity | None:
    """Compare the text tower with fp32 on the first texts; None where it is fp32 itself, or there is no text.

    Raises:
        ParityError: it is too far.
    """
    if tower is None or tower.precision == "fp32":
        return None
    texts, tokens = first_texts(manifest, checkpoint.texts()[1])
    return pass_text_gate(tower, checkpoint, tokens, texts, config.parity)
