"""A device without memory for a batch gets smaller ones, and the job goes on with the same embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.backends.devices import out_of_memory
from pipeline.backends.oom import HalvingEncoder
from pipeline.backends.torch_module import compiled
from pipeline.core.errors import BackendUnavailable, ParityError
from pipeline.job.main import run_job
from pipeline.models.hub import DEMO_FOLDER
from tests.jobs import StubEncoder, config_for, scenes_manifest, stub_backend


class Small(StubEncoder):
    """Has memory for three pictures."""

    room = 3

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        assert len(pixels) == self.batch_size, "the shape is static"
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().encode(pixels)


def pictures(count: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=dice).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("size", "sizes"), [(3, [3]), (4, [4, 2]), (7, [7, 4, 2]), (16, [16, 8, 4, 2])])
def test_a_batch_is_encoded_in_parts_that_fit(size: int, sizes: list[int]) -> None:
    checked: list[int] = []
    encoder = HalvingEncoder(Small, lambda reopened: checked.append(reopened.batch_size), batch_size=size)
    pixels = pictures(size)
    assert torch.equal(encoder.encode(pixels), StubEncoder(size).encode(pixels))
    assert torch.equal(encoder.encode(pixels.flip(0)), StubEncoder(size).encode(pixels.flip(0)))
    assert encoder.batch_sizes == sizes
    assert encoder.batch_size == size
    assert checked == sizes[1:]


def test_parts_lie_in_memory_as_batches_do() -> None:
    seen: list[tuple[int, ...]] = []

    class Strict(Small):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            seen.append(pixels.stride())
            return super().encode(pixels)

    HalvingEncoder(Strict, lambda reopened: None, batch_size=7).encode(pictures(7))
    assert len(set(seen)) == 1


def test_no_memory_for_a_single_picture_is_an_error() -> None:
    class Full(Small):
        room = 0

    with pytest.raises(BackendUnavailable, match=r"no memory to embed a single picture.*20\.00 MiB"):
        HalvingEncoder(Full, lambda reopened: None, batch_size=8).encode(pictures(8))


def test_memory_that_is_short_while_reopening_counts_too() -> None:
    def reopen(size: int) -> Small:
        if size == 4:
            raise torch.OutOfMemoryError("no room for the weights beside somebody else's")
        return Small(size)

    encoder = HalvingEncoder(reopen, lambda reopened: None, batch_size=8)
    assert len(encoder.encode(pictures(8))) == 8
    assert encoder.batch_sizes == [8, 4, 2]


def test_a_reopened_backend_that_is_too_far_from_fp32_ends_the_job() -> None:
    def check(reopened: StubEncoder) -> None:
        raise ParityError("too far")

    with pytest.raises(ParityError):
        HalvingEncoder(Small, check, batch_size=8).encode(pictures(8))  # type: ignore[arg-type]


def test_no_batch_gets_through_a_reopened_backend_that_did_not_pass() -> None:
    def check(reopened: StubEncoder) -> None:
        raise ParityError("too far")

    encoder = HalvingEncoder(Small, check, batch_size=4)  # type: ignore[arg-type]
    # As of several batches side by side: each meets it, not the first alone.
    for _ in range(2):
        with pytest.raises(ParityError):
            encoder.encode(pictures(4))


def test_the_memory_of_the_last_encoder_is_given_back_before_the_next_is_opened() -> None:
    import weakref

    opened: list[weakref.ref[Small]] = []
    alive: list[int] = []

    def reopen(size: int) -> Small:
        alive.append(sum(one() is not None for one in opened))
        encoder = Small(size)
        opened.append(weakref.ref(encoder))
        return encoder

    HalvingEncoder(reopen, lambda reopened: None, batch_size=8).encode(pictures(8))
    assert alive == [0, 0, 0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError(
            "The following operation failed in the TorchScript interpreter.\nRuntimeError: CUDA out of memory."
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_every_runtime_is_understood(error: Exception) -> None:
    class Full(StubEncoder):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            if len(pixels) > 2:
                raise error
            return super().encode(pixels)

    encoder = HalvingEncoder(Full, lambda reopened: None, batch_size=4)
    assert len(encoder.encode(pictures(4))) == 4
    assert encoder.batch_sizes == [4, 2]


def test_other_errors_are_no_want_of_memory() -> None:
    class Broken(StubEncoder):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        HalvingEncoder(Broken, lambda reopened: None, batch_size=4).encode(pictures(4))


@pytest.mark.slow
def test_a_compiler_without_memory_is_no_broken_compiler() -> None:
    class Full(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Exception, match="out of memory") as caught:
        compiled(Full(), mode="default", pixels=torch.zeros(2, 2))
    assert out_of_memory(caught.value)


def test_numbers_that_depend_on_the_batch_are_not_mixed() -> None:
    class Dynamic(Small):
        name = "onnx_int8"

        @property
        def fingerprint(self) -> dict[str, str]:
            return {**super().fingerprint, "quantization": "dynamic"}

    encoder = HalvingEncoder(Dynamic, lambda reopened: None, batch_size=8)
    with pytest.raises(BackendUnavailable, match=r"would give other numbers: lower loader\.batch_size"):
        encoder.encode(pictures(8))


def test_a_job_goes_on_with_smaller_batches_and_says_so(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 40)
    unlabelled: dict[str, dict[str, Any]] = {"model": {"name": str(DEMO_FOLDER)}, "prompts": {"labels": []}}
    outputs = {}
    for kind in (StubEncoder, Small):
        config = config_for(manifest, tmp_path / kind.__name__, report={"html": kind is Small}, **unlabelled)
        with stub_backend(kind):
            report = run_job(config)
        outputs[kind] = np.stack(pq.read_table(config.output.dir)["embedding"].drop_null().to_numpy())
        assert report.batch_sizes == ((8,) if kind is StubEncoder else (8, 4, 2))
    assert np.array_equal(outputs[StubEncoder], outputs[Small])
    assert json.loads((tmp_path / "Small" / "_report.json").read_text())["batch_sizes"] == [8, 4, 2]
    assert (
        "too small for batches of 8 images; continued with 4, then 2"
        in (tmp_path / "Small" / "_report.html").read_text()
    )
    assert "no memory for batches of 8 pictures; going on with 4" in (tmp_path / "Small" / "_run.log").read_text()
