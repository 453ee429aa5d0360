"""Rows that are not those of the pictures at their places are found, whatever way they went wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.backends.row_order import in_order, turned
from pipeline.backends.torch import open_encoder
from pipeline.config.schema import BackendConfig, ModelConfig, ParityConfig
from pipeline.core.errors import NumericalError
from pipeline.engine.padding import repeats, repeats_on
from pipeline.job.main import run_job
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from tests.jobs import StubEncoder, config_for, scenes_manifest, stub_backend

CLIP = "openai/clip-vit-base-patch32"


class Stale(StubEncoder):
    """Hands out what it computed for the batch before."""

    before: torch.Tensor | None = None

    def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
        before, Stale.before = Stale.before, vectors
        return vectors if before is None else before


SPOILS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two rows changed places": lambda vectors: vectors[[1, 0, *range(2, len(vectors))]],
    "all rows turned by one": lambda vectors: vectors.roll(1, dims=0),
    "rows in reverse": lambda vectors: vectors.flip(0),
    "every row the first": lambda vectors: vectors[:1].expand_as(vectors).clone(),
    "one constant": lambda vectors: torch.full_like(vectors, 0.5),
}


def job_of(tmp_path: Path, rows: int, encoder: type[StubEncoder]) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", rows, damaged={})
    config = config_for(manifest, tmp_path / "out", prompts={"labels": []})
    config = config.changed({"model.name": str(DEMO_FOLDER)})
    with stub_backend(encoder):
        run_job(config)


@pytest.mark.parametrize("rows", [24, 20], ids=["full batches", "a batch with free places"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_wrong_rows_are_never_committed(tmp_path: Path, rows: int, spoil: str) -> None:
    class Spoiled(StubEncoder):
        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            return SPOILS[spoil](vectors)

    with pytest.raises(NumericalError, match=r"shard 0, batch \d, rows \d+ to \d+: the encoder's rows are not those"):
        job_of(tmp_path, rows, Spoiled)
    assert not list((tmp_path / "out").glob("_commits/*.json"))


def test_results_of_the_batch_before_are_never_committed(tmp_path: Path) -> None:
    Stale.before = None
    with pytest.raises(NumericalError, match="shard 0, batch 0, rows 0 to 7"):
        job_of(tmp_path, 24, Stale)
    assert not list((tmp_path / "out").glob("_commits/*.json"))


def test_pictures_that_are_all_the_same_are_no_error() -> None:
    pixels = torch.full((8, 3, 4, 4), 7, dtype=torch.uint8)
    vectors = torch.full((8, 4), 0.5)
    other, order = turned(pixels)
    assert in_order(vectors, vectors, order, pixels)
    assert torch.equal(other, pixels)


def test_nan_is_not_in_order() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert in_order(vectors, vectors, torch.tensor([0, 1]), pixels)
    assert not in_order(vectors, vectors * float("nan"), torch.tensor([0, 1]), pixels)


@pytest.mark.parametrize(("count", "size"), [(1, 5), (2, 5), (4, 5), (5, 5), (3, 64)])
def test_free_places_repeat_the_pictures(count: int, size: int) -> None:
    found = repeats(count, size).tolist()
    assert len(found) == size - count
    assert all(0 <= place < count for place in found)


def test_places_are_made_once_for_a_device() -> None:
    found = repeats_on(torch.device("cpu"), 3, 8)
    assert torch.equal(found, repeats(3, 8))
    assert repeats_on(torch.device("cpu"), 3, 8) is found
    pixels = torch.zeros(8, 3, 2, 2, dtype=torch.uint8)
    assert turned(pixels)[1] is turned(pixels.clone())[1]


@pytest.mark.gpu
def test_the_proof_waits_for_no_device() -> None:
    pixels = torch.randint(0, 255, (8, 3, 4, 4), dtype=torch.uint8, device="cuda")
    vectors = torch.nn.functional.normalize(torch.randn(8, 16, device="cuda"), dim=1)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            _, order = turned(pixels)
            whole = in_order(vectors, vectors[order], order, pixels)
            part = in_order(vectors[:5], vectors[5:], repeats_on(pixels.device, 5, 8), pixels[:5])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert whole
    assert not part


def test_a_turned_batch_keeps_its_layout_in_memory() -> None:
    pixels = torch.arange(7 * 3 * 2 * 2, dtype=torch.uint8).reshape(7, 2, 2, 3).permute(0, 3, 1, 2)
    other, order = turned(pixels)
    assert other.stride() == pixels.stride()
    assert sorted(order.tolist()) == list(range(7))
    assert order.tolist() not in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0])
    assert torch.equal(other, pixels[order])


@pytest.fixture(
    scope="module", params=[str(DEMO_FOLDER), pytest.param(CLIP, marks=pytest.mark.slow)], ids=["demo", "ViT-B32"]
)
def random_weights(request: pytest.FixtureRequest) -> Checkpoint:
    """The hardest case, as any two pictures come out nearly the same."""
    return open_checkpoint(ModelConfig(name=request.param, weights="random"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embeddings_that_are_all_alike_are_still_told_apart(random_weights: Checkpoint, precision: str) -> None:
    config = BackendConfig(precision=precision, device="cpu")
    encoder = open_encoder(random_weights, config, batch_size=6, sample=lambda: None, limits=ParityConfig())  # type: ignore[arg-type,return-value]
    dice = torch.Generator().manual_seed(5)
    grid = torch.rand(6, 3, 4, 4, generator=dice) * 255
    pixels = torch.nn.functional.interpolate(grid, size=random_weights.spec.size).to(torch.uint8)
    vectors = encoder.encode(pixels)
    other, order = turned(pixels)
    again = encoder.encode(other)
    assert in_order(vectors, again, order, pixels)
    assert not in_order(vectors, again.flip(0), order, pixels)
    assert not in_order(vectors, again, order.roll(1), pixels)
