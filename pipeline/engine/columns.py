"""Text features of labels, and heads: the means of a job to compute columns from embeddings."""

from __future__ import annotations

import torch

from pipeline.config.schema import Config
from pipeline.core.processes import cores
from pipeline.core.records import TextBank
from pipeline.dataset.names import check_columns
from pipeline.dataset.vectors import check_heads, form_of
from pipeline.engine.demo import folder as demo
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.heads import Head, columns_of, read_heads
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


def heads_of(config: Config, checkpoint: Checkpoint) -> tuple[Head, ...]:
    """Read the heads of a config.

    Raises:
        ModelError: one cannot be read, or belongs to another model.
        ConfigError: one of their columns has the name of another one, or the output stores more numbers than an
            embedding has, or their signs alone.
    """
    form = form_of(config.output, checkpoint.dim)
    check_heads(form, config.labels.heads)
    heads = read_heads(config.labels.heads, checkpoint.fingerprint, form.dim)
    if heads:
        check_columns(config, columns_of(heads))
    return heads
