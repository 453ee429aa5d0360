"""Recall of stored embeddings: how many of the nearest neighbours are those of the model's own embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import OutputConfig
from pipeline.dataset.vectors import VectorFormat, form_of

# Embeddings of a sample, in memory in float32, and the neighbours that are compared.
ROWS, NEIGHBOURS = 2000, 10
# Rows with cosines this close to the last neighbour's are as near: equal images, and float32.
TIE = 1e-6


class RecallSample:
    """The first embeddings of a process, before they are stored; ``form`` is how they are stored."""

    def __init__(self, form: VectorFormat) -> None:
        self._form = form
        self._batches: list[NDArray[np.float32]] = []
        self._count = 0
        self._measured: tuple[int, Mapping[str, float]] = (0, {})

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Keep embeddings, float32 ``[N, D]``, until there are enough."""
        if self._count < ROWS:
            self._batches.append(vectors[: ROWS - self._count].copy())
            self._count += len(self._batches[-1])

    def measure(self) -> Mapping[str, float]:
        """``rows`` of the sample, and the share ``at_10`` of their nearest rows; empty for a sample of few rows."""
        if self._count <= NEIGHBOURS:
            return {}
        # Another thread may add to them meanwhile.
        vectors = np.concatenate(list(self._batches))
        if self._measured[0] != len(vectors):
            found = recall(vectors, self._form.decode(self._form.encode(vectors)))
            self._measured = len(vectors), {"rows": len(vectors), "at_10": round(found, 4)}
        return self._measured[1]


def sample_of(output: OutputConfig, dim: int) -> RecallSample | None:
    """A sample for a job whose output stores less than the floats of a model's embeddings of length ``dim``."""
    form = form_of(output, dim)
    return None if form.exact and form.dim == dim else RecallSample(form)


def recall(vectors: NDArray[np.float32], stored: NDArray[np.float32]) -> float:
    """The share of the 10 rows nearest to each row of ``stored`` that are among its 10 nearest of ``vectors``.

    Both are float32 ``[N, D]`` of length 1, with different ``D``, and ``N`` of more than 10. A row is no neighbour of
    its own; one that is as near as the tenth counts.
    """
    true, rough = vectors @ vectors.T, stored @ stored.T
    for cosines in (true, rough):
        np.fill_diagonal(cosines, -2)
    least = np.partition(true, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS, None]
    nearest = np.argpartition(-rough, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    return float((np.take_along_axis(true, nearest, axis=1) >= least - TIE).mean())
