"""The text tower of a job with texts, opened and compared with fp32."""

from __future__ import annotations

from pipeline.backends.base import ImageEncoder
from pipeline.backends.oom import HalvingEncoder
from pipeline.backends.streams import count_streams
from pipeline.backends.text import open_text_encoder, pass_text_gate
from pipeline.config.schema import Config
from pipeline.core.records import Parity
from pipeline.engine.texts import first_texts
from pipeline.manifest.manifest import Manifest
from pipeline.models.checkpoint import Checkpoint


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
