"""Attention kernels, versions and compile modes of the backends that run a torch module."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.backends import torch as torch_backend
from pipeline.backends import torch_module
from pipeline.backends.torch_attention import AMPERE, HOPPER, kernels, preference, preferred, prove
from pipeline.backends.torch_module import QuickNormaliser, blank, need_torchao, note_timed, tower_on
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import Normaliser

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pixels(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return blank(checkpoint, batch_size=3, device=device, dtype=dtype)


def test_the_kernels_are_those_that_the_tower_calls(demo: Checkpoint) -> None:
    tower = demo.image
    assert kernels(tower, pixels(demo, CPU, torch.float32)) == ["cpu"]
    with sdpa_kernel(SDPBackend.MATH):
        assert kernels(tower, pixels(demo, CPU, torch.float32)) == []
    with torch.inference_mode():
        assert kernels(tower, pixels(demo, CPU, torch.float32)) == ["cpu"]


def test_cudnn_comes_first_where_it_is_faster_and_no_kernel_is_switched_off() -> None:
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    assert preference(HOPPER, 91900)[:2] == [cudnn, flash]
    assert preference(HOPPER, 91500)[:2] == preference(HOPPER, 0)[:2] == [flash, cudnn]
    assert preference(AMPERE, 91900)[:2] == preference((8, 9), 91900)[:2] == [flash, cudnn]
    for capability in ((7, 5), AMPERE, (8, 9), HOPPER, (12, 0)):
        assert len(set(preference(capability, 91900))) == 4


def test_prompts_that_are_embedded_meanwhile_have_their_kernels(
    demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    before = torch._C._get_sdp_priority_order()
    with preferred(CUDA, torch.bfloat16):
        assert torch._C._get_sdp_priority_order() != before
        assert kernels(demo.image, pixels(demo, CPU, torch.float32)) == ["cpu"]
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize(
    ("capability", "found", "passes"),
    [
        (HOPPER, ["cudnn"], True),
        (HOPPER, ["flash"], True),
        (AMPERE, ["flash"], True),
        (AMPERE, ["efficient"], False),
        (HOPPER, ["efficient", "flash"], False),
        (HOPPER, [], False),
        ((7, 5), ["efficient"], True),
        ((7, 5), [], True),
    ],
)
def test_a_slow_kernel_is_refused_by_name(
    capability: tuple[int, int], found: list[str], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    names = ", ".join(found) or "none"
    if passes:
        assert prove(found, CUDA, torch.bfloat16) == names
        return
    with pytest.raises(BackendUnavailable, match=rf"A card: .*in the kernel {names}, .*backend\.precision=fp32"):
        prove(found, CUDA, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tower_is_copied_in_its_dtype_and_the_checkpoint_stays(demo: Checkpoint, dtype: torch.dtype) -> None:
    own = demo.image
    before = {name: value.clone() for name, value in own.state_dict().items()}
    copied = tower_on(demo, CPU, dtype)
    assert {value.dtype for value in copied.state_dict().values() if value.is_floating_point()} == {dtype}
    assert copied.state_dict().keys() == before.keys()
    for name, value in copied.state_dict().items():
        assert torch.equal(value, before[name].to(value.dtype))
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_pixels_for_half_precision_are_those_of_the_reference_but_for_rounding(demo: Checkpoint) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    pixels = every.contiguous(memory_format=torch.channels_last)
    wanted, found = Normaliser(demo.spec, CPU)(pixels), QuickNormaliser(demo.spec, CPU)(pixels)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, atol=5e-7, rtol=1e-6)


@pytest.mark.parametrize(("found", "passes"), [("0.15.0", False), ("0.17.1", False), ("0.18.0", True), ("1.0", True)])
@pytest.mark.needs("torchao")
def test_a_torchao_that_changes_fp32_products_is_refused(
    found: str, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_module, "version", lambda name: found)
    if passes:
        assert need_torchao() == found
        return
    with pytest.raises(BackendUnavailable, match=rf"torchao {found} makes .*0\.18 or newer is needed; pip install"):
        need_torchao()


@pytest.mark.needs("torchao")
def test_int8_leaves_the_precision_of_fp32_products_as_it_is(demo: Checkpoint) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(torch.nn.Linear(4, 4), Int8WeightOnlyConfig())
    assert torch.get_float32_matmul_precision() == "highest"


def test_kernels_that_are_timed_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        note_timed("backend=torch_fp8")
    assert "backend=torch_fp8: kernels are chosen by timing them" in caplog.text
    assert "TORCHINDUCTOR_CACHE_DIR" in caplog.text


def test_the_graphs_of_the_compiler_are_not_used_on_cuda() -> None:
    modes = {
        mode: torch_backend.WITHOUT_GRAPHS.get(mode, mode) for mode in ("default", "reduce-overhead", "max-autotune")
    }
    from torch._inductor import list_mode_options

    assert not any(list_mode_options(mode).get("triton.cudagraphs") for mode in modes.values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_tower_runs_in_a_fast_kernel_on_the_card(demo: Checkpoint, precision: str) -> None:
    if torch.cuda.get_device_capability() < AMPERE:
        pytest.skip("a GPU before Ampere")
    config: Any = BackendConfig(precision=precision, device="cuda")
    encoder = torch_backend.open_encoder(demo, config, batch_size=4, sample=lambda: None, limits=ParityConfig())  # type: ignore[arg-type,return-value]
    assert encoder.fingerprint["attention"] in ("cudnn", "flash")
