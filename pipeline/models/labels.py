"""Embeddings and a text bank in, labels and scores out; pure functions."""

from __future__ import annotations

import torch

from pipeline.records import Embeddings, Labels, TextBank


def label(batch: Embeddings, bank: TextBank, features: torch.Tensor, *, top_k: int) -> Labels:
    """Score every row against every label and keep the best ``min(top_k, L)``, best first.

    ``features`` is ``bank.features`` on the device of the batch. With the cosine ``c`` of a row and a
    label, the logit is ``bank.scale * c + bank.bias``; CLIP's score is the softmax over all labels
    (Radford et al. 2021), SigLIP's the sigmoid of each alone (Zhai et al. 2023). Equal scores keep the
    order of the label set.
    """
    logits = batch.vectors @ features.T * bank.scale + bank.bias
    scores = logits.softmax(dim=1) if bank.scoring == "softmax" else logits.sigmoid()
    # Ranked by logit: scores that saturate at 0 or 1 would tie. A stable sort settles real ties.
    order = logits.argsort(dim=1, descending=True, stable=True)[:, : min(top_k, len(bank.names))]
    return Labels(indices=order, scores=scores.gather(1, order))
