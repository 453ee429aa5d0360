from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core.records import Embeddings, TextBank
from pipeline.models.labels import _FEW, _by_keys, _by_selecting, best, label


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


def rows(kind: str, labels: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(labels)
    values = torch.randn(40, labels, generator=dice) * 3
    if kind == "ties":
        return values.round()
    if kind == "zeros of either sign":
        return values.sign() * 0.0
    odd = torch.tensor([float(kind), -float(kind), 0.0])[torch.randint(0, 3, values.shape, generator=dice)]
    return torch.where(torch.rand(values.shape, generator=dice) < 0.3, odd, values.round())


KINDS = ["ties", "zeros of either sign", "inf", "nan", "1e-40", "3e38"]


@pytest.mark.parametrize("labels", [1, 4, _FEW, _FEW + 1, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_order(kind: str, labels: int) -> None:
    logits = rows(kind, labels)
    expected = logits.argsort(dim=1, descending=True, stable=True)
    for count in {1, min(3, labels), labels}:
        assert torch.equal(best(logits, count), expected[:, :count])
        assert torch.equal(_by_keys(logits, count), expected[:, :count])
        assert torch.equal(_by_selecting(logits, count), expected[:, :count])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_ranks_as_a_cpu_does_and_is_not_waited_for(kind: str) -> None:
    logits = rows(kind, 70)
    on_device = logits.cuda()
    best(on_device, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = best(on_device, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), best(logits, 5))
