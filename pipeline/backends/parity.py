"""How far a backend's embeddings are from fp32's, on images of the job itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.records import TextBank

WORST = 5


@dataclass(frozen=True, slots=True)
class Parity:
    """One comparison: cosines over ``images`` pictures, and the share whose best label is the same.

    ``top1`` is None where there are no labels; ``worst`` holds ids and cosines, lowest first.
    """

    images: int
    lowest_cosine: float
    mean_cosine: float
    top1: float | None
    worst: tuple[tuple[str, float], ...]


def compare(vectors: torch.Tensor, reference: torch.Tensor, *, ids: Sequence[str], bank: TextBank | None) -> Parity:
    """Compare embeddings with fp32's, both L2-normalised float32 ``[N, D]``, row i being the picture ``ids[i]``."""
    vectors, reference = vectors.cpu().double(), reference.cpu().double()
    # Both are of length 1 up to float32's rounding, which would hide the last digits of a cosine.
    cosine = torch.nn.functional.cosine_similarity(vectors, reference, dim=1)
    # NaN is worse than anything.
    cosine = torch.nan_to_num(cosine, nan=-1.0)
    order = cosine.argsort()[:WORST].tolist()
    top1 = None
    if bank is not None:
        features = torch.from_numpy(bank.features).double()
        same = (vectors @ features.T).argmax(dim=1) == (reference @ features.T).argmax(dim=1)
        top1 = float(same.double().mean())
    return Parity(
        images=len(ids),
        lowest_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        top1=top1,
        worst=tuple((str(ids[i]), float(cosine[i])) for i in order),
    )
