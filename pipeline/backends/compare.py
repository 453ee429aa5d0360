"""Comparison of embeddings with those of fp32, and their limits; pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.config.schema import ParityConfig
from pipeline.core.errors import ParityError
from pipeline.core.records import Parity, Remembered, TextBank

WORST = 5


def compare(vectors: torch.Tensor, reference: torch.Tensor, *, ids: Sequence[str], bank: TextBank | None) -> Parity:
    """Compare embeddings with fp32's, both float32 ``[N, D]`` of length 1, row i being the picture ``ids[i]``."""
    vectors, reference = vectors.cpu().double(), reference.cpu().double()
    # Both are of length 1 only up to float32's rounding, which would hide the last digits of a cosine.
    cosine = torch.nn.functional.cosine_similarity(vectors, reference, dim=1)
    # NaN is worse than anything.
    cosine = torch.nan_to_num(cosine, nan=-1.0)
    # A picture may stand there several times, at several places of a batch.
    worst: dict[str, float] = {}
    for row in cosine.argsort().tolist():
        worst.setdefault(str(ids[row]), float(cosine[row]))
        if len(worst) == WORST:
            break
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
        worst=tuple(worst.items()),
    )


def to_json(parity: Parity) -> dict[str, Any]:
    """The figures in types that JSON has; entries of gates that took a shorter way are there for those alone."""
    return {
        name: value
        for name, value in dataclasses.asdict(parity).items()
        if value is not None or name not in ("remembered", "screened")
    }


def from_json(figures: Mapping[str, Any]) -> Parity:
    """The figures as :func:`to_json` returns them.

    Raises:
        KeyError, TypeError, ValueError: they are not.
    """
    worst = tuple((str(id), float(cosine)) for id, cosine in figures["worst"])
    before = figures.get("remembered")
    remembered = None if before is None else Remembered(job=str(before["job"]), parity=from_json(before["parity"]))
    return Parity(**{**figures, "worst": worst, "remembered": remembered})


def in_words(parity: Parity, *, than: str = "fp32") -> str:
    """The figures in a sentence; ``than`` is what was compared with."""
    agreed = "" if parity.top1 is None else f", the same best label for {parity.top1:.1%}"
    chosen = "" if parity.screened is None else f", the furthest of {parity.screened} by their pixels"
    before = ""
    if parity.remembered is not None:
        earlier = parity.remembered.parity
        before = f"; an earlier job compared {earlier.images}: lowest cosine {earlier.lowest_cosine:.6f}"
    return (
        f"compared with {than} on {parity.images} images{chosen}: lowest cosine {parity.lowest_cosine:.6f}, mean "
        f"{parity.mean_cosine:.6f}{agreed}{before}"
    )


def misses(parity: Parity, limits: ParityConfig, *, precision: str) -> list[str]:
    """The figures that are below their limits for ``precision``, in words.

    One picture alone may change its best label, however few there are.
    """
    figures = {"lowest_cosine": parity.lowest_cosine, "mean_cosine": parity.mean_cosine}
    # Of few pictures, a single one between two labels would weigh more than the limit allows.
    if parity.top1 is not None and round((1 - parity.top1) * parity.images) > 1:
        figures["top1"] = parity.top1
    return [
        f"parity.{name}.{precision} wants {getattr(limits, name)[precision]}, measured {value:.6f}"
        for name, value in figures.items()
        # Written so that NaN misses.
        if not value >= getattr(limits, name)[precision]
    ]


def hold(parity: Parity, limits: ParityConfig, *, precision: str, what: str) -> None:
    """Pass if every figure is at least its limit for ``precision``; ``what`` names the model and its runtime.

    Raises:
        ParityError: with the figures that miss, and the worst pictures.
    """
    if missed := misses(parity, limits, precision=precision):
        worst = ", ".join(f"{id} ({cosine:.5f})" for id, cosine in parity.worst)
        raise ParityError(
            f"{what} is too far from fp32 over {parity.images} images: {'; '.join(missed)}. The worst by cosine: "
            f"{worst}. Take another backend or precision, or lower the limit if that is near enough for you"
        )
