"""Proofs of numbers where they are made: text features, image embeddings, scale, bias and scores; labels alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import ModelError, NumericalError

# An embedding of length 1 in float32 is off by rounding only.
UNIT_TOLERANCE = 1e-3
# Two labels whose features have a higher cosine get the same scores.
SAME_COSINE = 1 - 1e-6
# Pairs of such labels that are looked for.
_PAIRS = 100


def are_unit(vectors: NDArray[Any]) -> NDArray[np.bool_]:
    """True for each row of float32 ``[N, D]`` of length 1; NaN is within no tolerance."""
    with np.errstate(all="ignore"):
        found: NDArray[np.bool_] = np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_TOLERANCE
    return found


def check_scores(scores: NDArray[Any] | torch.Tensor, where: str) -> None:
    """Hold scores against NaN and infinity; ``where`` is the beginning of the message.

    Raises:
        NumericalError: one is not finite; no label would be right.
    """
    values = torch.as_tensor(scores)
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(
            f"{where}: a score is NaN or infinite, so no label is right and nothing of it is kept; check logit_scale "
            "and logit_bias of the checkpoint, or try backend.precision=fp32"
        )


def _not_finite(model: Any) -> str | None:
    """The name of the first tensor of a model that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return str(name)
    return None


def say_damaged(tower: Any, name: str) -> str:
    """The beginning of a message about a tower, ``image`` or ``text``, whose vectors :func:`are_unit` refuses."""
    damaged = _not_finite(tower.model)
    where = f" (its tensor {damaged} holds NaN or infinity)" if damaged else ""
    return f"the {name} tower{where} gives NaN, infinity or zeros"


def scale_and_bias(name: str, model: Any) -> tuple[float, float]:
    """The factor of the cosine and the summand of a model, as it was trained.

    Raises:
        ModelError: a score with them would not be a finite number, or the same for all images.
    """
    logarithm = float(model.logit_scale)
    summand = getattr(model, "logit_bias", None)
    bias = 0.0 if summand is None else float(summand)
    scale = float(model.logit_scale.exp())
    most = torch.finfo(torch.float32).max / 4
    if not 0 < scale < most:
        raise ModelError(
            f"{name}: logit_scale is {logarithm:g}, and the factor of the cosine, its exponential, {scale:g}; no score "
            "with it says anything (trained models have up to 4.6, a factor of 100): the tensor is damaged, or the "
            "conversion wrote the factor in place of its logarithm"
        )
    if not abs(bias) < most:
        raise ModelError(f"{name}: logit_bias is {bias:g}, so no score is a number; the tensor is damaged")
    return scale, bias


def alike(features: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Pairs of rows of L2-normalised ``[L, D]`` whose cosine is over ``SAME_COSINE``, up to about a hundred.

    Rows that close are close along every direction: sorted along one, only neighbours are compared, since all pairs of
    many labels would take longer than embedding them.
    """
    count, dim = features.shape
    directions = np.random.default_rng(0).standard_normal((dim, 4)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    # The chord of that cosine, and rounding.
    near = float(np.sqrt(2 * (1 - SAME_COSINE))) + 1e-5
    places = features @ directions
    order = places[:, 0].argsort()
    places, pairs = places[order], list[tuple[int, int]]()
    rows = np.arange(count)
    for step in range(1, count):
        rows = rows[rows + step < count]
        rows = rows[places[rows + step, 0] - places[rows, 0] <= near]
        if not len(rows) or len(pairs) >= _PAIRS:
            break
        close = rows[(np.abs(places[rows + step] - places[rows]) <= near).all(axis=1)]
        one, other = order[close], order[close + step]
        cosines = np.einsum("ij,ij->i", features[one].astype(np.float64), features[other].astype(np.float64))
        same = cosines > SAME_COSINE
        pairs += [(min(pair), max(pair)) for pair in zip(one[same].tolist(), other[same].tolist(), strict=True)]
    return sorted(pairs)
