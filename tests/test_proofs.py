"""Gates in proportion to the job: small samples, proofs of earlier jobs, and broken backends that neither lets pass."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backends import decoder_parity
from pipeline.backends.artifacts.store import PROOFS
from pipeline.backends.base import ImageEncoder
from pipeline.backends.compare import from_json, in_words, to_json
from pipeline.backends.parity import AGAIN, FILE, Gate, pass_gate, record
from pipeline.backends.proofs import Proof, Proofs
from pipeline.backends.proportion import Costs, Extent, affordable, extents
from pipeline.backends.torch import open_encoder
from pipeline.config.schema import BackendConfig, ModelConfig, ParityConfig
from pipeline.core.errors import ParityError
from pipeline.core.records import Parity, Sample
from pipeline.job.main import run_job
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.storage.factory import open_storage
from tests.jobs import StubEncoder, config_for, scenes_manifest, stub_backend

LIMITS = ParityConfig()
BATCH, ROWS = 32, 372


@pytest.fixture(scope="module")
def healthy(demo: Checkpoint, pictures: Sample) -> ImageEncoder:
    return opened(demo, pictures)


def opened(checkpoint: Checkpoint, pictures: Sample) -> ImageEncoder:
    # Nothing is faster than fp32 here; the widest limits are those of int8.
    config = BackendConfig(precision="fp32", device="cpu")
    return open_encoder(checkpoint, config, batch_size=BATCH, sample=lambda: pictures, limits=LIMITS)


class Wrapped(ImageEncoder):
    """An encoder with the facts of another one; ``images`` counts what it encoded, in ``batches``."""

    def __init__(self, inner: ImageEncoder, encode: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.name, self.precision, self.device, self.dim = inner.name, "int8", inner.device, inner.dim
        self.batch_size, self.streams, self.flexible = inner.batch_size, inner.streams, inner.flexible
        self.batches: list[int] = []
        self._print, self._encode = inner.fingerprint, encode or inner.encode

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        return self._encode(pixels)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._print


@pytest.fixture(autouse=True)
def _no_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still, so that every extent is affordable, except where a test says what a comparison takes."""
    monkeypatch.setattr("pipeline.backends.parity.time.perf_counter", lambda: 0.0)


class Gates:
    """Passes of the gate with one store; each has an output of its own."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, pictures: Sample) -> None:
        self.folder, self.checkpoint, self.pictures = folder, checkpoint, pictures
        self.drawn: list[int] = []
        self.passed = 0

    def gate(self, limits: ParityConfig = LIMITS, *, job: str = "", rows: int = ROWS) -> Gate:
        self.passed += 1
        storage = open_storage(str(self.folder / f"out-{self.passed}"))
        prints = {"manifest": job or str(self.passed)}
        return Gate(limits, prints, storage, rows=rows, store=str(self.folder / "store"))

    def draw(self, count: int) -> Sample:
        self.drawn.append(count)
        return self.pictures.spread(count)

    def __call__(self, encoder: ImageEncoder, limits: ParityConfig = LIMITS, **job: Any) -> Parity:
        found = pass_gate(encoder, self.checkpoint, self.draw, self.gate(limits, **job))
        assert found is not None
        return found


@pytest.fixture
def gates(tmp_path: Path, demo: Checkpoint, pictures: Sample) -> Gates:
    return Gates(tmp_path, demo, pictures)


# Backends that are broken


def wrong_normalisation(demo: Checkpoint, pictures: Sample) -> Wrapped:
    spec = replace(demo.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Wrapped(opened(replace(demo, spec=spec), pictures))


def swapped_channels(demo: Checkpoint, pictures: Sample) -> Wrapped:
    inner = opened(demo, pictures)
    return Wrapped(inner, lambda pixels: inner.encode(pixels[:, [2, 1, 0]]))


def with_weights(demo: Checkpoint, pictures: Sample, change: Callable[[torch.nn.Linear], object]) -> Wrapped:
    """One product of the last layer but one has other weights."""
    tower = copy.deepcopy(demo.image)
    layer = tower.model.vision_model.encoder.layers[-2]
    with torch.no_grad():
        change(layer.mlp.fc2)
    return Wrapped(opened(replace(demo, image=tower), pictures))


def one_wrong_layer(demo: Checkpoint, pictures: Sample) -> Wrapped:
    return with_weights(demo, pictures, lambda product: product.weight.copy_(product.weight.flip(0)))


def bad_int8_scale(demo: Checkpoint, pictures: Sample) -> Wrapped:
    def quantize(product: torch.nn.Linear) -> None:
        # The scale of one output for all of them, so that most weights are cut off.
        scale = product.weight.abs().amax(dim=1).min() / 127 / 4
        product.weight.copy_((product.weight / scale).round().clamp(-128, 127) * scale)

    return with_weights(demo, pictures, quantize)


def nan_for_some(demo: Checkpoint, pictures: Sample) -> Wrapped:
    inner = opened(demo, pictures)
    # Three in ten of the pictures.
    bright = pictures.pixels.float().mean(dim=(1, 2, 3)).quantile(0.7)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        vectors = inner.encode(pixels).clone()
        vectors[pixels.float().mean(dim=(1, 2, 3)) > bright] = torch.nan
        return vectors

    return Wrapped(inner, encode)


def wrong_row_order(demo: Checkpoint, pictures: Sample) -> Wrapped:
    inner = opened(demo, pictures)
    return Wrapped(inner, lambda pixels: inner.encode(pixels).roll(1, dims=0))


BROKEN = [wrong_normalisation, swapped_channels, one_wrong_layer, bad_int8_scale, nan_for_some, wrong_row_order]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("images", [LIMITS.fewest, AGAIN])
def test_a_broken_backend_misses_with_the_smallest_samples(
    gates: Gates, demo: Checkpoint, pictures: Sample, broken: Callable[..., Wrapped], images: int
) -> None:
    encoder = broken(demo, pictures)
    with pytest.raises(ParityError, match=rf"over {images} images.*The worst by cosine: \S+ \(") as caught:
        # No more than these.
        gates(encoder, replace(LIMITS, images=images))
    assert caught.value.exit_code == 4
    assert gates.drawn[0] == images
    assert set(encoder.batches) == {-(-images // encoder.streams), BATCH} if encoder.flexible else {BATCH}
    assert not (gates.folder / "store").exists()


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_backend_misses_although_an_earlier_job_proved_it(
    gates: Gates, demo: Checkpoint, pictures: Sample, healthy: ImageEncoder, broken: Callable[..., Wrapped],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    gates(Wrapped(healthy))
    gates.drawn.clear()
    with pytest.raises(ParityError, match="over 64 images"):
        gates(broken(demo, pictures))
    assert gates.drawn == [AGAIN, 64]
    assert "this is further than what an earlier job proved" in caplog.text
    # The next job does not rely on it either.
    assert list((gates.folder / "store" / PROOFS).iterdir()) == []


def test_a_healthy_backend_passes_with_the_smallest_samples(gates: Gates, healthy: ImageEncoder) -> None:
    for images in (LIMITS.fewest, AGAIN):
        assert gates(Wrapped(healthy), replace(LIMITS, images=images)).lowest_cosine > 0.999


class Healthy(StubEncoder):
    precision, dim = "int8", 128

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        demo = open_checkpoint(ModelConfig())
        self.inner = open_encoder(
            demo, BackendConfig(device="cpu", precision="fp32"), batch_size=batch_size,
            sample=lambda: pytest.fail("drawn"), limits=LIMITS,
        )  # fmt: skip

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.spoil(self.inner.encode(pixels))


class Reversed(Healthy):
    def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.flip(0)


def test_a_broken_backend_leaves_nothing_in_the_output_of_a_job(tmp_path: Path) -> None:
    store = {"artifacts": str(tmp_path / "store")}
    manifest = scenes_manifest(tmp_path / "m.parquet", 40)
    with stub_backend(Healthy):
        run_job(config_for(manifest, tmp_path / "healthy", backend=store))
    assert len(list((tmp_path / "store" / PROOFS).iterdir())) == 1
    with stub_backend(Reversed), pytest.raises(ParityError, match="too far from fp32 over 38 images"):
        run_job(config_for(manifest, tmp_path / "broken", backend=store))
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {"_run.log"}


# Proofs


def test_what_an_earlier_job_proved_is_compared_again_on_a_few_images(gates: Gates, healthy: ImageEncoder) -> None:
    first, encoder = gates(Wrapped(healthy)), Wrapped(healthy)
    assert (first.images, first.remembered) == (64, None)
    gates.drawn.clear()
    second = gates(encoder)
    assert gates.drawn == [second.images] == [AGAIN]
    # In small batches, one for each stream.
    assert encoder.batches == [AGAIN]
    assert second.remembered is not None
    assert second.remembered.parity == first
    assert "; an earlier job compared 64: lowest cosine 1.0" in in_words(second)
    assert from_json(json.loads(json.dumps(to_json(second)))) == second


def test_the_output_of_a_job_that_is_run_anew_has_the_figures_of_the_first_time(
    gates: Gates, healthy: ImageEncoder
) -> None:
    written = []
    for _ in range(2):
        gate, encoder = gates.gate(job="the same"), Wrapped(healthy)
        found = pass_gate(encoder, gates.checkpoint, gates.draw, gate)
        assert found is not None
        record(found, encoder, gate)
        written.append(gate.storage.read(FILE))
    assert gates.drawn[-1] == AGAIN
    assert written[0] == written[1]
    assert written[0] is not None
    assert "remembered" not in json.loads(written[0])["parity"]


def other_batch(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    encoder.batch_size = 16
    return proofs


def other_streams(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    encoder.streams = 7
    return proofs


def other_backend(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    encoder._print = {**encoder.fingerprint, "attention": "flash"}
    return proofs


def halved(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setattr(encoder, "batch_sizes", [BATCH, BATCH // 2], raising=False)
    return proofs


def other_cores(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setattr("pipeline.backends.proofs.cores", lambda: 99)
    return proofs


def other_instructions(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})
    return proofs


def other_processor(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setattr("pipeline.backends.proofs.machine", lambda *_: {"processor": "Another CPU"})
    return proofs


def other_version(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setattr("pipeline.backends.artifacts.exports._version", lambda package: "99")
    return proofs


def other_build(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setattr(torch.__config__, "show", lambda: "another")
    return proofs


def other_environment(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    return proofs


def other_code(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    patch.setattr("pipeline.backends.proofs._code", lambda: "another")
    return proofs


def other_weights(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    prints = {**proofs.checkpoint.fingerprint, "weights": {"model.safetensors": "0" * 64}}
    return replace(proofs, checkpoint=replace(proofs.checkpoint, fingerprint=prints))


def other_limits(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    return replace(proofs, limits=replace(LIMITS, top1={**LIMITS.top1, "int8": 0.8}))


def other_labels(proofs: Proofs, encoder: Wrapped, patch: pytest.MonkeyPatch) -> Proofs:
    from tests.test_parity import bank

    return replace(proofs, bank=bank([[1, 0]]))


CHANGES = [
    other_batch, other_streams, other_backend, halved, other_cores, other_instructions, other_processor, other_version,
    other_build, other_environment, other_code, other_weights, other_limits, other_labels,
]  # fmt: skip
FOUND = Parity(images=64, lowest_cosine=0.9999, mean_cosine=0.99999, top1=None, worst=(("a", 0.9999),))


@pytest.mark.parametrize("change", CHANGES)
def test_a_proof_of_other_arithmetic_does_not_count(
    tmp_path: Path,
    demo: Checkpoint,
    healthy: ImageEncoder,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., Proofs],
) -> None:
    kept, encoder = Proofs(str(tmp_path), demo, LIMITS, None), Wrapped(healthy)
    choices = extents(LIMITS, encoder)
    proof = Proof(FOUND, "a job", choices[-1], Costs(0.1, 0.2))
    kept.keep(encoder, proof)
    assert kept.find(encoder, choices) == proof
    assert change(kept, encoder, monkeypatch).find(encoder, choices) is None


@pytest.mark.parametrize("options", [{"kernels": "chosen by timing"}, {"name": "tensorrt"}], ids=str)
def test_kernels_that_are_chosen_by_timing_are_never_proved(
    tmp_path: Path, demo: Checkpoint, healthy: ImageEncoder, options: dict[str, str]
) -> None:
    kept, encoder = Proofs(str(tmp_path), demo, LIMITS, None), Wrapped(healthy)
    encoder._print = {**encoder.fingerprint, **options}
    encoder.name = options.get("name", encoder.name)
    choices = extents(LIMITS, encoder)
    kept.keep(encoder, Proof(FOUND, "a job", choices[-1], Costs(0.1, 0.2)))
    assert kept.find(encoder, choices) is None
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_costs_the_memory_alone(
    gates: Gates, healthy: ImageEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (gates.folder / "store").write_text("a file")
    assert gates(Wrapped(healthy)).images == 64
    assert "are not remembered for other jobs" in caplog.text


def test_figures_far_from_the_proof_lead_to_the_whole_comparison(
    gates: Gates, demo: Checkpoint, healthy: ImageEncoder
) -> None:
    """Within the limits, but not what was proved: something changed that the key does not hold."""
    gates(Wrapped(healthy))
    inner = opened(demo, gates.pictures)

    def worse(pixels: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(len(pixels), inner.dim, generator=torch.Generator().manual_seed(0)) / inner.dim**0.5
        return torch.nn.functional.normalize(inner.encode(pixels) + 0.05 * noise, dim=1)

    gates.drawn.clear()
    found = gates(Wrapped(inner, worse))
    assert gates.drawn == [AGAIN, 64]
    assert (found.images, found.remembered) == (64, None)


# Proportion


def test_the_smallest_comparison_of_a_flexible_encoder_is_in_small_batches() -> None:
    encoder = StubEncoder(64)
    whole = [Extent(16, True), Extent(32, True), Extent(64, True)]
    assert extents(LIMITS, encoder) == whole
    encoder.flexible = True
    assert extents(LIMITS, encoder) == [Extent(16, False), *whole]
    assert extents(replace(LIMITS, images=8), encoder) == [Extent(8, False), Extent(8, True)]
    assert [each.images for each in extents(replace(LIMITS, images=24), StubEncoder(64))] == [16, 24]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [(1, Extent(16, False)), (372, Extent(16, False)), (8_000, Extent(16, True)), (10**6, Extent(64, True))],
)
def test_a_comparison_is_in_proportion_to_the_job(rows: int, wanted: Extent) -> None:
    encoder = StubEncoder(64)
    encoder.flexible, encoder.streams = True, 2
    # A ViT-B/32 in bf16 on two cores.
    costs = Costs(backend=1 / 36, fp32=1 / 17, drawing=0.001)
    choices = extents(LIMITS, encoder)
    found = affordable(choices, costs, encoder, rows=rows)
    assert found == wanted
    if found != choices[0]:
        job = rows * costs.backend
        assert costs.seconds(choices[0], encoder) + costs.seconds(found, encoder) <= 0.03 * job


def test_all_is_affordable_where_a_forward_takes_a_millisecond() -> None:
    encoder = StubEncoder(64)
    assert affordable(extents(LIMITS, encoder), Costs(0.001, 0.002), encoder, rows=1) == Extent(64, True)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every reading of the clock is a second after the one before."""
    readings = iter(range(10**6))
    monkeypatch.setattr("pipeline.backends.parity.time.perf_counter", lambda: float(next(readings)))
    return iter(())


@pytest.mark.usefixtures("slow")
def test_a_larger_job_asks_for_more_than_a_small_one_proved(gates: Gates, healthy: ImageEncoder) -> None:
    assert gates(Wrapped(healthy)).images == 16
    assert gates.drawn == [16]
    assert gates(Wrapped(healthy)).images == AGAIN
    gates.drawn.clear()
    assert gates(Wrapped(healthy), rows=10**6).images == 64
    assert gates.drawn == [16, 64]
    # And what that one proved is enough for both.
    assert gates(Wrapped(healthy), rows=10**6).images == AGAIN
    assert gates(Wrapped(healthy)).images == AGAIN


@pytest.mark.usefixtures("slow")
def test_a_few_images_that_miss_lead_to_as_many_as_the_limits_say(
    gates: Gates, healthy: ImageEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ParityError, match="over 64 images"):
        gates(Wrapped(healthy), replace(LIMITS, lowest_cosine={"int8": 1.0}))
    assert gates.drawn == [16, 64]
    assert "on 16 images" in caplog.text


def test_a_job_of_few_rows_leaves_no_proof(gates: Gates, healthy: ImageEncoder) -> None:
    gates.pictures = gates.pictures.spread(5)
    assert gates(Wrapped(healthy), rows=5).images == 5
    assert not (gates.folder / "store").exists()


# Decoders


class Rough(StubEncoder):
    """Embeds the first pixels, so that every difference shows; ``batches`` are those that it encoded."""

    flexible = True

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.batches: list[int] = []

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        return torch.nn.functional.normalize(pixels[:, :, 5, 5:8].flatten(1)[:, :4].float() + 1, dim=1)


def decoded(count: int, *, differ: int) -> tuple[Sample, Sample]:
    dice = torch.Generator().manual_seed(1)
    exact = torch.randint(1, 255, (count, 3, 32, 32), dtype=torch.uint8, generator=dice)
    ours = exact.clone()
    ours[:differ] += torch.randint(0, 2, (differ, 3, 32, 32), dtype=torch.uint8, generator=dice)
    ids = tuple(str(number) for number in range(count))
    return Sample(ids, ours), Sample(ids, exact)


def test_pictures_with_equal_pixels_are_not_embedded() -> None:
    encoder = Rough(64)
    found = decoder_parity.measure(encoder, *decoded(32, differ=0), None)
    assert found is not None
    assert (found.images, found.lowest_cosine, found.screened) == (32, 1.0, None)
    assert encoder.batches == []


def test_only_the_pictures_that_are_furthest_apart_are_embedded() -> None:
    encoder = Rough(64)
    ours, exact = decoded(32, differ=24)
    ours.pixels[5, :, 4:9] = 255 - ours.pixels[5, :, 4:9]
    found = decoder_parity.measure(encoder, ours, exact, None)
    assert found is not None
    # Eight in both ways, and eight that are equal.
    assert encoder.batches == [16]
    assert (found.images, found.screened) == (16, 32)
    assert found.worst[0][0] == "5"
    assert found.lowest_cosine < 0.9
    assert "on 16 images, the furthest of 32 by their pixels" in in_words(found, than="exact")


def test_a_flat_picture_counts_as_further_than_one_of_contrast() -> None:
    exact = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    exact[1] = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flat, rich = decoder_parity.distances(exact ^ 1, exact).tolist()
    assert flat > rich > 0


def test_the_gate_of_the_decoder_takes_no_full_batch_of_an_encoder_of_one_shape(tmp_path: Path) -> None:
    class Counted(Healthy):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            batches[-1] += 1
            return super().encode(pixels)

    batches: list[int] = []
    manifest = scenes_manifest(tmp_path / "m.parquet", 24)
    for decoder in ("exact", "fast"):
        batches.append(0)
        groups: dict[str, dict[str, Any]] = {
            "backend": {"artifacts": str(tmp_path / decoder), "streams": 2},
            "images": {"decoder": decoder},
        }
        with stub_backend(Counted):
            report = run_job(config_for(manifest, tmp_path / f"out-{decoder}", loader={"batch_size": 24}, **groups))
    assert batches[0] == batches[1]
    assert report.decoder_parity is not None
    assert 0.99 < report.decoder_parity.lowest_cosine < 1


# Reports


def test_the_report_says_what_was_compared_now_and_what_before(tmp_path: Path) -> None:
    groups = {"backend": {"artifacts": str(tmp_path / "store")}, "images": {"decoder": "fast"}}
    for rows in (40, 36):
        manifest = scenes_manifest(tmp_path / f"{rows}.parquet", rows)
        with stub_backend(Healthy):
            run_job(config_for(manifest, tmp_path / str(rows), **groups))
    first, second = (json.loads((tmp_path / str(rows) / "_report.json").read_text()) for rows in (40, 36))
    assert first["parity"]["images"] == 38
    assert first["parity"]["remembered"] is None
    assert second["parity"]["images"] == AGAIN
    assert second["parity"]["remembered"]["parity"]["images"] == 38
    assert second["decoder_parity"]["images"] == 8 < second["decoder_parity"]["screened"]
    # A run that resumes has the same figures.
    with stub_backend(Healthy):
        again = run_job(config_for(tmp_path / "36.parquet", tmp_path / "36", **groups))
    assert again.to_dict()["parity"] == second["parity"]
