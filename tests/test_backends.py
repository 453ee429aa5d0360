"""The contract that every backend keeps; a backend that this machine cannot run skips with its reason."""

from __future__ import annotations

import ctypes
import functools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.base import ImageEncoder, factory
from pipeline.backends.devices import choose_device, choose_precision
from pipeline.backends.onnx_session import PROVIDERS, Provider, normalise, open_session
from pipeline.backends.tensorrt import engine_options, find_library, version_text
from pipeline.backends.torch_int8 import multiplies_int8
from pipeline.backends.torch_module import compiled
from pipeline.bench.selection import ROWS
from pipeline.config.choices import BACKENDS
from pipeline.config.schema import BackendConfig, ModelConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable, StorageError
from pipeline.core.records import Sample
from pipeline.engine.demo.folder import rendered_sample
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.towers import Normaliser
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("exported_once")
BATCH = 8
_ONNX = ("onnxruntime", "onnx", "onnxscript")
PACKAGES = {
    **dict.fromkeys(("onnx", "onnx_int8", "tensorrt"), _ONNX),
    **dict.fromkeys(("torch_int8", "torch_fp8"), ("torchao",)),
}
# Lowest cosine to fp32 that a precision must keep on the demo model.
COSINE = {"fp32": 0.99999, "bf16": 0.995, "fp16": 0.999, "int8": 0.99, "fp8": 0.98}


def _case(name: str, precision: str, device: str, **options: str) -> Any:
    words = [name, precision, device, *options.values()]
    marks: list[pytest.MarkDecorator] = [pytest.mark.gpu] if device == "cuda" else []
    marks += [pytest.mark.needs(*PACKAGES[name])] if name in PACKAGES else []
    marks += [pytest.mark.slow] if "compile" in options and device == "cpu" else []
    if device == "cuda" and ("compile" in options or PACKAGES.get(name) == ("torchao",)):
        marks.append(pytest.mark.compiler)
    if name == "tensorrt":
        marks.append(pytest.mark.tensorrt)
    if name == "torch_fp8":
        old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)
        marks.append(pytest.mark.skipif(old, reason="a GPU before Hopper"))
    config = BackendConfig(name=name, precision=precision, device=device, **options)
    return pytest.param(config, id="-".join(words), marks=marks)


CASES = [
    _case("torch", "fp32", "cpu"),
    _case("torch", "bf16", "cpu"),
    _case("torch", "fp32", "cpu", compile="default"),
    _case("torchscript", "fp32", "cpu"),
    _case("torchscript", "bf16", "cpu"),
    _case("torch_int8", "int8", "cpu"),
    _case("onnx", "fp32", "cpu"),
    _case("onnx_int8", "int8", "cpu", quantization="dynamic"),
    _case("onnx_int8", "int8", "cpu", quantization="static"),
    _case("torch", "fp32", "cuda"),
    _case("torch", "bf16", "cuda"),
    _case("torch", "fp16", "cuda"),
    _case("torch", "fp16", "cuda", compile="reduce-overhead"),
    _case("torchscript", "fp16", "cuda"),
    _case("torch_int8", "int8", "cuda"),
    _case("torch_fp8", "fp8", "cuda"),
    _case("onnx", "fp32", "cuda"),
    _case("onnx", "fp16", "cuda"),
    _case("tensorrt", "fp16", "cuda"),
]


@functools.cache
def demo() -> Checkpoint:
    return open_checkpoint(ModelConfig())


@functools.cache
def sample() -> Sample:
    return rendered_sample(demo().spec, 32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("artifacts"))


def opened(config: BackendConfig, store: str) -> ImageEncoder:
    """The backend, opened once for all tests of this file: compiling takes its time."""
    return _opened(replace(config, artifacts=store))


@functools.cache
def _opened(config: BackendConfig) -> ImageEncoder:
    return open_anew(config)


def open_anew(config: BackendConfig, *, batch_size: int = BATCH) -> ImageEncoder:
    return factory(config.name)(demo(), config, batch_size=batch_size, sample=sample, limits=ParityConfig())


def scenes(count: int = BATCH) -> torch.Tensor:
    """Pixels as the loader lays them out: a view of [B, H, W, 3] memory."""
    from pipeline.engine.demo.scenes import render, sample

    stack = np.stack([np.asarray(render(sample(77, i), 48, 48)) for i in range(count)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """What transformers itself gives, in fp32, from pixels that were normalised by its own processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    checkpoint = demo()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    images = [image.permute(1, 2, 0).numpy() for image in scenes()]
    values = processor(images, return_tensors="pt", input_data_format="channels_last").pixel_values
    features = checkpoint.image.model.get_image_features(pixel_values=values).pooler_output
    return torch.nn.functional.normalize(features, dim=1)


@pytest.mark.parametrize("config", CASES)
def test_embeddings_keep_the_contract(config: BackendConfig, reference: torch.Tensor, store: str) -> None:
    encoder = opened(config, store)
    assert encoder.precision == config.precision
    assert encoder.device.type == config.device
    pixels = scenes().to(encoder.device)
    before = pixels.clone()
    vectors = encoder.encode(pixels)
    assert vectors.shape == (BATCH, encoder.dim)
    assert vectors.dtype == torch.float32
    assert vectors.device.type == config.device
    assert torch.equal(pixels, before), "the pixels belong to the loader"
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(BATCH, device=vectors.device))
    cosine = (vectors.cpu() * reference).sum(dim=1)
    assert cosine.min() >= COSINE[config.precision]


@pytest.mark.parametrize("config", CASES)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(config: BackendConfig, store: str) -> None:
    encoder = opened(config, store)
    pixels = scenes().to(encoder.device)
    vectors = encoder.encode(pixels)
    shuffled = pixels.clone()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    shuffled[:] = pixels[order]
    shuffled[-2:] = 0
    again = encoder.encode(shuffled)
    tolerance = {"fp32": 1e-6, "int8": 2e-3}.get(config.precision, 5e-3)
    if config.name == "onnx_int8" and config.quantization == "dynamic":
        # Scaled batch by batch: near to itself, not equal.
        assert torch.nn.functional.cosine_similarity(again[:-2], vectors[order][:-2]).min() > 0.999
        return
    torch.testing.assert_close(again[:-2], vectors[order][:-2], atol=tolerance, rtol=0)


@pytest.mark.parametrize("config", CASES)
def test_the_same_batch_gives_the_same_bits(config: BackendConfig, store: str) -> None:
    encoder = opened(config, store)
    pixels = scenes().to(encoder.device)
    first = encoder.encode(pixels)
    kept = first.clone()
    assert torch.equal(kept, encoder.encode(pixels))
    encoder.encode(torch.zeros_like(pixels))
    assert torch.equal(kept, first), "a result is not written over by the next"


@pytest.mark.parametrize("config", CASES)
def test_a_second_encoder_gives_the_same_bits(config: BackendConfig, store: str) -> None:
    encoder, other = opened(config, store), open_anew(replace(config, artifacts=store))
    pixels = scenes().to(encoder.device)
    assert torch.equal(encoder.encode(pixels), other.encode(pixels))
    assert encoder.fingerprint == other.fingerprint


@pytest.mark.parametrize("config", CASES)
def test_the_fingerprint_tells_precision_device_and_version(config: BackendConfig, store: str) -> None:
    encoder = opened(config, store)
    prints = encoder.fingerprint
    assert (prints["name"], prints["precision"], prints["device"]) == (config.name, config.precision, config.device)
    assert prints["runtime"].split()[0] in ("torch", "onnxruntime")
    assert prints["runtime"].split()[1][0].isdigit()
    if encoder.artifact is not None:
        assert prints["artifact"] == encoder.artifact.fingerprint


@pytest.mark.slow
def test_no_two_backends_have_one_fingerprint(store: str) -> None:
    configs = [case.values[0] for case in CASES if case.values[0].device == "cpu"]
    prints = [tuple(sorted(opened(config, store).fingerprint.items())) for config in configs]
    assert len(set(prints)) == len(configs)


@pytest.mark.slow
def test_opening_a_backend_leaves_the_checkpoint_as_it_is(store: str) -> None:
    before = {name: value.clone() for name, value in demo().image.model.state_dict().items()}
    attention = demo().image.model.config.vision_config._attn_implementation
    for case in CASES:
        if case.values[0].device == "cpu":
            opened(case.values[0], store)
    after = demo().image.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert demo().image.model.config.vision_config._attn_implementation == attention


def test_int8_and_half_precision_weigh_less(store: str) -> None:
    def weight(config: BackendConfig) -> float:
        return opened(config, store).weight_bytes / full

    full = opened(BackendConfig(precision="fp32", device="cpu"), store).weight_bytes
    assert full == pytest.approx(4 * sum(p.numel() for p in demo().image.model.vision_model.parameters()), rel=0.05)
    assert weight(BackendConfig(precision="bf16", device="cpu")) == pytest.approx(0.5, abs=0.01)
    for name in ("torch_int8", "onnx_int8"):
        assert weight(BackendConfig(name=name, precision="int8", device="cpu")) < 0.4


def test_every_backend_has_a_module_a_config_contract_tests_and_rows_of_the_benchmark() -> None:
    for name in BACKENDS:
        assert callable(factory(name))
        assert (ROOT / "conf" / "backend" / f"{name}.yaml").is_file()
    assert {case.values[0].name for case in CASES} == {row.backend for row in ROWS} == {*BACKENDS}


def test_auto_takes_what_the_device_is_good_at() -> None:
    cpu = torch.device("cpu")
    assert choose_precision(BackendConfig(), cpu) == "fp32"
    assert choose_precision(BackendConfig(name="onnx"), cpu) == "fp32"
    assert choose_precision(BackendConfig(name="onnx_int8"), cpu) == "int8"
    assert choose_precision(BackendConfig(name="tensorrt"), cpu) == "fp16"


@pytest.mark.parametrize(("real", "wanted"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_cuda_takes_bf16_unless_it_is_emulated(
    real: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or real)
    assert choose_precision(BackendConfig(), torch.device("cuda")) == wanted
    assert choose_precision(BackendConfig(name="onnx"), torch.device("cuda")) == "fp16"


@pytest.mark.parametrize("name", ["torch", "torchscript", "onnx"])
def test_fp16_on_the_cpu_is_refused(name: str, store: str) -> None:
    with pytest.raises(BackendUnavailable, match="fp16 needs CUDA"):
        open_anew(BackendConfig(name=name, precision="fp16", device="cpu", artifacts=store))


def test_a_precision_of_another_backend_is_refused(store: str) -> None:
    with pytest.raises(BackendUnavailable, match="onnx computes in fp32, fp16, not in bf16"):
        open_anew(BackendConfig(name="onnx", precision="bf16", device="cpu", artifacts=store))


@pytest.mark.parametrize("name", ["torch_fp8", "tensorrt"])
def test_what_needs_a_gpu_says_so(name: str, store: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"backend={name} needs an NVIDIA GPU.*take backend="):
        open_anew(BackendConfig(name=name, device="cpu", artifacts=store))


def test_a_machine_without_tensorrt_is_told_the_version() -> None:
    try:
        ctypes.CDLL("libnvinfer.so.10")
    except OSError:
        with pytest.raises(BackendUnavailable, match=r"libnvinfer\.so\.10.*TensorRT 10, not 11.*pip install"):
            find_library()
    else:
        assert find_library().startswith("10.")
    assert version_text(101303) == "10.13.3"


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        compiled(torch.nn.Identity(), mode="default", pixels=torch.zeros(1))


def test_a_module_that_does_not_compile_is_explained() -> None:
    class Broken(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels @ torch.zeros(3, 5)

    with pytest.raises(BackendUnavailable, match=r"torch\.compile failed"):
        compiled(Broken(), mode="default", pixels=torch.zeros(2, 2))


@pytest.mark.parametrize(("able", "answer"), [({"avx512_vnni": True}, True), ({"avx2": True}, False), ({}, False)])
def test_int8_activations_need_the_instruction(
    able: dict[str, bool], answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert multiplies_int8(torch.device("cpu")) is answer


def test_weights_alone_are_int8_where_the_instruction_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not the answer of torch, by which the compiler chooses instructions.
    monkeypatch.setattr("pipeline.backends.torch_int8.multiplies_int8", lambda device: False)
    # Without a store it is not compiled ahead of time too.
    (tmp_path / "file").write_text("no folder")
    encoder = open_anew(BackendConfig(name="torch_int8", device="cpu", artifacts=str(tmp_path / "file")))
    assert encoder.fingerprint["activations"] == "torch.float32"
    exact = open_anew(BackendConfig(precision="fp32", device="cpu")).encode(scenes())
    assert (encoder.encode(scenes()) * exact).sum(dim=1).min() > 0.999


def test_pixels_are_normalised_bit_for_bit_with_and_without_torch() -> None:
    pixels = scenes()
    with_torch = Normaliser(demo().spec, torch.device("cpu"))(pixels)
    assert np.array_equal(with_torch.numpy(), normalise(pixels.numpy(), demo().spec))


def test_a_graph_for_other_operators_is_refused_by_name(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherProvider"])
    with pytest.raises(BackendUnavailable, match="kept OtherProvider and would not go on with CPUExecutionProvider"):
        open_anew(BackendConfig(name="onnx", device="cpu", artifacts=store))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_without_its_libraries_is_told_by_its_own_name(
    provider: str, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = opened(BackendConfig(name="onnx", precision="fp32", device="cpu"), store).artifact
    assert artifact is not None
    stream: Any = SimpleNamespace(cuda_stream=1)
    with pytest.raises(BackendUnavailable, match=rf"could not open .* with {PROVIDERS[provider]}.*pip install"):
        open_session(
            artifact.file("model.onnx"),
            Provider(provider),
            device=torch.device("cuda"),
            batch_size=BATCH,
            stream=stream,
        )
    assert "EP Error" not in capfd.readouterr().out, "ONNX Runtime tried something else in its place"


def test_an_engine_has_one_shape_and_a_folder_of_its_own(store: str) -> None:
    artifact = opened(BackendConfig(name="onnx", precision="fp32", device="cpu"), store).artifact
    assert artifact is not None

    def options(batch_size: int, library: str) -> dict[str, str]:
        return engine_options(demo(), artifact, batch_size=batch_size, gpu="NVIDIA H100 80GB", library=library)

    found = options(8, "10.13.3")
    shapes = {found[f"trt_profile_{kind}_shapes"] for kind in ("min", "opt", "max")}
    assert shapes == {"pixel_values:8x3x48x48"}
    # ONNX Runtime takes these words and no numbers.
    assert {value for key, value in found.items() if key.endswith(("_enable", "_fallback"))} == {"True"}
    folder = Path(found["trt_engine_cache_path"])
    assert folder.is_dir()
    assert "NVIDIA-H100" in folder.name
    others = {options(size, library)["trt_engine_cache_path"] for size, library in ((16, "10.13.3"), (8, "10.14.0"))}
    assert len({*others, str(folder)}) == 3
    # The store does not take engines for artefacts.
    assert ArtifactStore(store).problems(artifact) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision", "mode"), [("torch", "fp32", "default"), ("torch_int8", "int8", "none")])
def test_a_compiled_tower_is_compiled_once(name: str, precision: str, mode: str, store: str) -> None:
    from torch._dynamo.utils import counters

    encoder = opened(BackendConfig(name=name, precision=precision, device="cpu", compile=mode), store)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    encoder.encode(scenes())
    encoder.encode(scenes())
    assert counters["stats"]["unique_graphs"] == before


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=str(tmp_path / "file")):
        open_anew(BackendConfig(name="onnx", device="cpu", artifacts=str(tmp_path / "file")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_never_replaced_in_silence(device: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"backend\.device=cuda"):
        choose_device(device)
