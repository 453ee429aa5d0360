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
    order = best(logits, min(top_k, len(bank.names)))
    return Labels(indices=order, scores=scores.gather(1, order))


def best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest of each row of ``[N, L]``, largest first, equal ones in their order.

    Ranked by logit, since scores that saturate at 0 or 1 would tie. Sorting all labels costs several times
    the matrix product once there are thousands, so only rows that tie at the last place are sorted.
    """
    values, order = logits.topk(count, dim=1)
    # topk leaves the order of equal values open: sort by index first, then, stably, by value.
    order, by_index = order.sort(dim=1)
    values = values.gather(1, by_index)
    order = order.gather(1, values.argsort(dim=1, descending=True, stable=True))
    tied = (logits >= values.amin(dim=1, keepdim=True)).sum(dim=1) > count
    if tied.any():
        order[tied] = logits[tied].argsort(dim=1, descending=True, stable=True)[:, :count]
    return order
