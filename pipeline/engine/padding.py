"""Padding of a batch that is not full."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def repeated(count: int, size: int) -> NDArray[np.int64]:
    """The pictures of the ``count`` in a batch that fill its free places: int64 ``[size - count]``.

    Pictures that are in a batch twice cost nothing, and show if an encoder keeps its rows in order. The numbers follow
    a square, because rotated or reversed rows could look like a simpler pattern.
    """
    place = np.arange(size - count, dtype=np.int64)
    return (place * place + 3 * place + 1) % count


def repeats(count: int, size: int) -> torch.Tensor:
    """The same as a tensor."""
    import torch

    return torch.from_numpy(repeated(count, size))


@lru_cache(maxsize=16)
def repeats_on(device: torch.device, count: int, size: int) -> torch.Tensor:
    """The same on ``device``, kept: the copy would wait for the device each time. Do not change it."""
    return repeats(count, size).to(device)
