from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.models.labels import best, label
from pipeline.records import Embeddings, TextBank


def bank(features: np.ndarray, *, scoring: str = "softmax", scale: float = 10.0, bias: float = 0.0) -> TextBank:
    names = tuple(f"label {i}" for i in range(len(features)))
    return TextBank(names=names, features=features, scoring=scoring, scale=scale, bias=bias, fingerprint="x")


def unit(rows: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_scores_are_those_of_the_formula(scoring: str, top_k: int) -> None:
    images, texts = unit(5, 16, 0), unit(7, 16, 1)
    found = label(
        Embeddings(torch.from_numpy(images)),
        bank(texts, scoring=scoring, bias=-2.5),
        torch.from_numpy(texts),
        top_k=top_k,
    )
    logits = (images.astype(np.float64) @ texts.T.astype(np.float64)) * 10 - 2.5
    if scoring == "softmax":
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(found.indices.numpy(), order)
    np.testing.assert_allclose(found.scores.numpy(), np.take_along_axis(scores, order, 1), rtol=1e-5, atol=1e-7)


def test_top_k_is_cut_to_the_number_of_labels() -> None:
    texts = unit(3, 8, 2)
    found = label(Embeddings(torch.from_numpy(unit(2, 8, 3))), bank(texts), torch.from_numpy(texts), top_k=10)
    assert found.indices.shape == found.scores.shape == (2, 3)


def test_saturated_scores_are_still_ranked_by_logit() -> None:
    texts = np.eye(4, dtype=np.float32)
    image = torch.tensor([[0.5, 0.7, 0.1, 0.5]])
    found = label(Embeddings(image), bank(texts, scoring="sigmoid", scale=1000.0), torch.from_numpy(texts), top_k=4)
    assert found.indices.tolist() == [[1, 0, 3, 2]]
    assert found.scores[0, :3].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_equal_logits_keep_the_order_of_the_labels(count: int) -> None:
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 0.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    )
    expected = torch.tensor([[1, 2, 4, 5, 0, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    assert torch.equal(best(logits, count), expected[:, :count])
