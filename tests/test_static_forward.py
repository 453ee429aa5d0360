"""The forward on CUDA, with a device and a capture of the CPU: the same results as batch by batch, in reused memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import NumericalError
from pipeline.core.records import ImageBatch, Shard, TextBank
from pipeline.engine import loop
from pipeline.engine.forward import Forward, Labelling, PendingBatch, check
from pipeline.engine.padding import repeats
from pipeline.engine.static_forward import HostBuffers, StaticForward, open_forward
from pipeline.job.main import run_job
from pipeline.models.hub import DEMO_FOLDER
from pipeline.telemetry.clocks import StageClocks
from tests.jobs import StubEncoder, config_for, content, scenes_manifest, stub_backend
from tests.test_torch_graph import again

SIZE = 6


class GraphEncoder(StubEncoder):
    """As a backend on CUDA that has a graph."""

    graph = True
    calls = 0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().encode(pixels)


class Turned(GraphEncoder):
    def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.roll(1, dims=0)


def labelling(top_k: int = 2) -> Labelling:
    features = np.eye(4, dtype=np.float32)
    bank = TextBank(
        names=("red", "green", "blue", "none"),
        features=features,
        scale=100.0,
        bias=0.0,
        scoring="softmax",
        fingerprint="f",
    )
    return Labelling(bank=bank, features=torch.from_numpy(features), top_k=top_k)


def batch(count: int, *, seed: int = 0, shard: Shard | None = None) -> ImageBatch:
    """A batch whose free places repeat its pictures, as the loader fills them."""
    dice = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (SIZE, 32, 32, 3), dtype=torch.uint8, generator=dice)
    if count < SIZE:
        pixels[count:] = pixels[repeats(count, SIZE)]
    return ImageBatch(shard or Shard(0, count, ()), np.arange(count), pixels.permute(0, 3, 1, 2), slot=0)


def launched(forward: Forward, one: ImageBatch, number: int = 1) -> PendingBatch:
    pending = forward.launch(one, StageClocks(), number=number)
    pending.wait()
    return pending


@pytest.mark.parametrize("graph", [True, False], ids=["a graph", "single operations"])
@pytest.mark.parametrize("labels", [labelling(), None], ids=["labels", "no labels"])
def test_the_results_are_those_of_the_forward_on_a_cpu(labels: Labelling | None, graph: bool) -> None:
    encoder = GraphEncoder(SIZE)
    encoder.graph = graph
    plain, static = Forward(encoder, labels), StaticForward(encoder, labels, again)
    for number, count in enumerate((SIZE, 4, 1, SIZE)):
        one = batch(count, seed=number)
        wanted, found = launched(plain, one), launched(static, one)
        for name in ("rows", "vectors", "lengths", "in_order", "top", "scores"):
            mine, other = torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(wanted, name))
            assert mine.shape == other.shape
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other)
        check(found, found.rows, "here")
        found.release()


def test_results_on_the_way_are_not_written_over() -> None:
    forward = StaticForward(GraphEncoder(SIZE), labelling(), again)
    ones = [batch(SIZE, seed=seed) for seed in range(3)]
    on_the_way = [launched(forward, one) for one in ones]
    for one, pending in zip(ones, on_the_way, strict=True):
        assert torch.equal(pending.vectors, StubEncoder(SIZE).encode(one.pixels))
    assert forward.host.made == 3


def test_memory_on_the_host_is_used_again() -> None:
    forward = StaticForward(GraphEncoder(SIZE), labelling(), again)
    places = set()
    for seed in range(5):
        pending = launched(forward, batch(SIZE, seed=seed))
        places.add(pending.vectors.data_ptr())
        pending.release()
    assert len(places) == forward.host.made == 1


def test_a_batch_that_was_not_given_back_keeps_its_memory() -> None:
    buffers = HostBuffers()
    first = buffers.copy((torch.ones(2),))
    second = buffers.copy((torch.zeros(2),))
    assert torch.equal(first.tensors[0], torch.ones(2))
    buffers.give_back(first)
    assert buffers.copy((torch.full((2,), 3.0),)) is first
    assert torch.equal(second.tensors[0], torch.zeros(2))
    assert buffers.made == 2


@pytest.mark.parametrize("count", [SIZE, 4], ids=["encoded twice", "with free places"])
def test_rows_in_another_order_are_found(count: int) -> None:
    found = launched(StaticForward(Turned(SIZE), labelling(), again), batch(count), number=0)
    with pytest.raises(NumericalError, match=r"rows 0 to .* are not those of the images"):
        check(found, found.rows, "here")


def test_only_the_first_full_batch_of_some_shards_is_encoded_twice() -> None:
    forward = StaticForward(GraphEncoder(SIZE), None, again)
    counts = []
    for index, number, count in ((0, 0, SIZE), (0, 1, SIZE), (1, 0, SIZE), (8, 0, SIZE), (8, 0, 3)):
        before = GraphEncoder.calls
        launched(forward, batch(count, shard=Shard(index, count, ())), number)
        counts.append(GraphEncoder.calls - before)
    assert counts == [2, 1, 1, 2, 1]


def test_a_cpu_has_the_plain_forward() -> None:
    assert type(open_forward(StubEncoder(SIZE), None)) is Forward


def test_a_job_writes_the_same_rows_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 40, damaged={})
    base = config_for(manifest, tmp_path / "plain", prompts={"labels": []})
    base = base.changed({"model.name": str(DEMO_FOLDER), "backend.streams": 1})
    with stub_backend(GraphEncoder):
        run_job(base)
        monkeypatch.setattr(loop, "open_forward", lambda encoder, labels: StaticForward(encoder, labels, again))
        run_job(base.changed({"output.dir": str(tmp_path / "static")}))
    assert content(tmp_path / "static") == content(tmp_path / "plain")


@pytest.mark.gpu
def test_a_batch_on_a_gpu_is_launched_without_waiting_for_it() -> None:
    class OnCuda(GraphEncoder):
        def __init__(self, batch_size: int) -> None:
            super().__init__(batch_size)
            self.device = torch.device("cuda", 0)

    bank = labelling()
    features = bank.features.cuda()
    forward = open_forward(OnCuda(SIZE), Labelling(bank.bank, features, bank.top_k))
    assert isinstance(forward, StaticForward)
    one = batch(SIZE)
    moved = ImageBatch(one.shard, one.rows, one.pixels.cuda(), slot=0)
    wanted = launched(Forward(StubEncoder(SIZE), bank), one)
    launched(forward, moved).release()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = forward.launch(moved, StageClocks(), number=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pending.wait()
    assert pending.vectors.is_pinned()
    torch.testing.assert_close(pending.vectors, wanted.vectors)
    assert torch.equal(pending.top, wanted.top)
    assert forward.host.made == 1
