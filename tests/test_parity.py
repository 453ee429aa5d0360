"""Nothing is computed with a backend that is too far from fp32, and the figures are kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.backends.artifacts.metadata import CARD, sealed, write_card
from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.compare import compare, hold, in_words
from pipeline.backends.parity import FILE, embed_reference, embed_sample, measure
from pipeline.backends.torch import reference
from pipeline.config.schema import Config, ModelConfig, ParityConfig
from pipeline.core.errors import ParityError, PlanMismatch
from pipeline.core.records import Parity, Sample, TextBank
from pipeline.core.run_report import RunReport
from pipeline.engine.demo.folder import rendered_sample
from pipeline.job.main import run_job
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.preprocessor import to_spec
from pipeline.storage.base import sha256
from tests.forks import forks
from tests.jobs import StubEncoder, config_for, content, scenes_manifest, stub_backend

pytestmark = pytest.mark.usefixtures("exported_once")
ROWS = 40


def bank(features: list[list[float]]) -> TextBank:
    rows = np.array(features, dtype=np.float32)
    names = tuple(f"label {i}" for i in range(len(rows)))
    return TextBank(names=names, features=rows, scoring="softmax", scale=1.0, bias=0.0, fingerprint="")


def turned(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def test_figures_of_known_vectors() -> None:
    parity = compare(turned(0, 10, 90), turned(0, 0, 30), ids=["a", "b", "c"], bank=bank([[1, 0], [0, 1]]))
    assert parity.images == 3
    assert parity.lowest_cosine == pytest.approx(0.5, abs=1e-6)
    assert parity.mean_cosine == pytest.approx((1 + np.cos(np.deg2rad(10)) + 0.5) / 3, abs=1e-6)
    # The third is turned from the first label to the second.
    assert parity.top1 == pytest.approx(2 / 3)
    assert [id for id, _ in parity.worst] == ["c", "b", "a"]
    assert parity.worst[0][1] == pytest.approx(0.5, abs=1e-6)


def test_without_labels_there_is_no_agreement_and_no_limit_on_it() -> None:
    parity = compare(turned(0), turned(0), ids=["a"], bank=None)
    assert parity.top1 is None
    hold(parity, ParityConfig(), precision="fp32", what="it")


def test_nan_is_worse_than_anything() -> None:
    vectors = turned(0, 0)
    vectors[1] = torch.nan
    parity = compare(vectors, turned(0, 0), ids=["good", "nan"], bank=None)
    assert parity.lowest_cosine == -1
    assert parity.worst[0] == ("nan", -1.0)


def test_the_last_digits_of_a_cosine_are_not_lost_to_rounding() -> None:
    reference = torch.nn.functional.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    # Of length 1 up to float32's rounding only; a plain product would show 1e-4 here.
    parity = compare(reference * 0.9999, reference, ids=list("abcd"), bank=None)
    assert 1 - parity.lowest_cosine < 1e-12


GOOD = Parity(images=8, lowest_cosine=0.999, mean_cosine=0.9999, top1=1.0, worst=(("x.jpg", 0.999),))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lowest_cosine": 0.979}, "parity.lowest_cosine.int8 wants 0.98, measured 0.979000"),
        ({"mean_cosine": 0.98}, "parity.mean_cosine.int8 wants 0.99, measured 0.980000"),
        ({"top1": 0.5}, "parity.top1.int8 wants 0.9, measured 0.500000"),
        ({"lowest_cosine": float("nan")}, "measured nan"),
    ],
)
def test_each_figure_has_its_limit(change: dict[str, Any], words: str) -> None:
    hold(GOOD, ParityConfig(), precision="int8", what="it")
    with pytest.raises(ParityError, match="too far from fp32 over 8 images") as caught:
        hold(replace(GOOD, **change), ParityConfig(), precision="int8", what="it")
    assert words in str(caught.value)
    assert "x.jpg (0.99900)" in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_picture_is_named_once_among_the_worst() -> None:
    parity = compare(turned(5, 30, 20, 10), turned(0, 0, 0, 0), ids=["a", "b", "b", "a"], bank=None)
    assert [id for id, _ in parity.worst] == ["b", "a"]
    assert parity.worst[1][1] == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)


def test_one_picture_alone_may_change_its_label() -> None:
    hold(replace(GOOD, top1=7 / 8), ParityConfig(), precision="int8", what="it")
    with pytest.raises(ParityError, match=r"parity\.top1\.int8 wants 0\.9, measured 0\.75"):
        hold(replace(GOOD, top1=6 / 8), ParityConfig(), precision="int8", what="it")


def test_limits_go_by_precision() -> None:
    hold(GOOD, ParityConfig(), precision="bf16", what="it")
    with pytest.raises(ParityError, match=r"parity\.lowest_cosine\.fp32"):
        hold(GOOD, ParityConfig(), precision="fp32", what="it")


def test_a_sample_is_embedded_whatever_the_batch_size() -> None:
    spec = to_spec(
        {"size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "siglip", "x"
    )
    sample = rendered_sample(spec, 7)
    whole = embed_sample(StubEncoder(7), sample)
    assert whole.shape == (7, 4)
    for size in (1, 3, 16):
        assert torch.equal(embed_sample(StubEncoder(size), sample), whole)


def test_every_place_of_a_batch_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(ModelConfig())
    sample = rendered_sample(checkpoint.spec, 6)
    encoder = reference(checkpoint, torch.device("cpu"), batch_size=20, sample=lambda: sample)
    wanted = embed_reference(encoder, checkpoint, sample)
    good = measure(encoder, wanted, None)
    assert good.images == 6
    assert good.lowest_cosine > 0.999999
    right = encoder.encode

    def wrong_at_the_end(pixels: torch.Tensor) -> torch.Tensor:
        vectors = right(pixels).clone()
        vectors[-1] = -vectors[-1]
        return vectors

    monkeypatch.setattr(encoder, "encode", wrong_at_the_end)
    bad = measure(encoder, wanted, None)
    assert bad.lowest_cosine < -0.999
    # The twentieth place holds the second of six pictures.
    assert bad.worst[0][0] == sample.ids[19 % 6]


def test_a_half_is_every_second_picture() -> None:
    sample = Sample(ids=("a", "b", "c"), pixels=torch.arange(3).view(3, 1, 1, 1).to(torch.uint8))
    assert (sample.half(0).ids, sample.half(1).ids) == (("a", "c"), ("b",))
    assert sample.half(1).pixels.flatten().tolist() == [1]
    one = Sample(ids=("a",), pixels=sample.pixels[:1])
    assert one.half(0) is one.half(1) is one


# Jobs.


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_manifest(tmp_path_factory.mktemp("parity") / "m.parquet", ROWS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, manifest: Path) -> tuple[Config, RunReport]:
    """A finished job of the demo model's int8 graph."""
    folder = tmp_path_factory.mktemp("finished")
    config = job(manifest, folder / "out", "onnx_int8", store=folder / "store")
    return config, run_job(config)


@pytest.fixture(scope="module")
def store(finished: tuple[Config, RunReport]) -> Path:
    """A store with the demo model's int8 graph."""
    return Path(str(finished[0].backend.artifacts))


@pytest.fixture
def copied(finished: tuple[Config, RunReport], tmp_path: Path) -> Config:
    """The job with a copy of its dataset."""
    config, _ = finished
    shutil.copytree(config.output.dir, tmp_path / "out")
    return config.changed({"output.dir": str(tmp_path / "out")})


def job(manifest: Path, output: Path, name: str, *, store: Path | None = None, **groups: dict[str, Any]) -> Config:
    settings = {"name": name, "artifacts": str(store) if store else None, **groups.pop("backend", {})}
    parity = {"images": 24, **groups.pop("parity", {})}
    return config_for(manifest, output, backend=settings, parity=parity, **groups)


def test_the_reference_is_not_compared_with_itself(manifest: Path, tmp_path: Path) -> None:
    report = run_job(job(manifest, tmp_path / "out", "torch"))
    assert report.parity is None
    assert not (tmp_path / "out" / FILE).exists()


def test_the_figures_go_into_the_dataset_the_report_and_the_metadata(
    finished: tuple[Config, RunReport], store: Path
) -> None:
    config, report = finished
    output = Path(config.output.dir)
    assert report.parity is not None
    # Two of the rows are damaged, and rows after them are taken instead.
    assert report.parity.images == 24
    assert 0.99 < report.parity.lowest_cosine < 1
    assert report.parity.top1 is not None
    written = json.loads((output / FILE).read_text())
    assert written["parity"]["lowest_cosine"] == report.parity.lowest_cosine
    assert json.loads((output / "_report.json").read_text())["parity"]["images"] == 24
    [artifact] = ArtifactStore(store).artifacts()
    assert artifact.card["gates"][written["key"]]["lowest_cosine"] == report.parity.lowest_cosine
    assert in_words(report.parity) in (output / "_run.log").read_text()
    assert all(id.startswith("scene/") for id, _ in report.parity.worst)
    assert [c for _, c in report.parity.worst] == sorted(c for _, c in report.parity.worst)


def test_a_second_run_takes_the_figures_from_the_dataset(
    finished: tuple[Config, RunReport], copied: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.backends.parity.measure", lambda *_: pytest.fail("measured again"))
    assert run_job(copied).parity == finished[1].parity
    with pytest.raises(ParityError, match=r"lowest_cosine\.int8 wants 0\.99999"):
        run_job(copied.changed({"parity.lowest_cosine": {"int8": 0.99999}}))


def test_figures_of_other_hardware_do_not_count(
    copied: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = json.loads((tmp_path / "out" / FILE).read_text())["key"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})
    run_job(copied)
    assert json.loads((tmp_path / "out" / FILE).read_text())["key"] != key


@pytest.mark.slow
def test_a_graph_with_fixed_scales_is_judged_on_other_pictures(manifest: Path, tmp_path: Path) -> None:
    quantization = {"quantization": "static"}
    config = job(
        manifest, tmp_path / "out", "onnx_int8", store=tmp_path / "store", backend=quantization, parity={"images": 12}
    )
    report = run_job(config)
    assert report.parity is not None
    assert report.parity.images == 12
    ids = pq.read_table(tmp_path / "out", columns=["id", "status"]).filter(pc.field("status") == "ok")["id"].to_pylist()
    judged = {id for id, _ in report.parity.worst}
    # 24 pictures were drawn from three row groups, eight of each; every second one was for the scales.
    assert judged <= {id for group in (ids[:15], ids[15:30], ids[30:]) for id in group[:8][1::2]}


@pytest.mark.parametrize("spoiled", [b"", b"[1]", b"no json", b'{"key": 3}'])
def test_figures_that_cannot_be_read_are_written_anew(copied: Config, tmp_path: Path, spoiled: bytes) -> None:
    good = content(tmp_path / "out")
    (tmp_path / "out" / FILE).write_bytes(spoiled)
    run_job(copied)
    assert content(tmp_path / "out") == good


def test_a_miss_ends_the_job_before_anything_is_computed(manifest: Path, tmp_path: Path, store: Path) -> None:
    config = job(manifest, tmp_path / "out", "onnx_int8", store=store, parity={"mean_cosine": {"int8": 1.0}})
    with pytest.raises(ParityError, match=r"demo is too far from fp32.*mean_cosine\.int8 wants 1\.0.*scene/") as caught:
        run_job(config)
    assert caught.value.exit_code == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_run.log"}
    # Nothing is left that would be in the way of another backend.
    assert run_job(job(manifest, tmp_path / "out", "torch")).total_rows == ROWS


def test_a_dataset_of_another_backend_keeps_its_files(copied: Config, manifest: Path, tmp_path: Path) -> None:
    before = content(tmp_path / "out")
    with pytest.raises(PlanMismatch, match="backend"):
        run_job(job(manifest, tmp_path / "out", "torch", backend={"precision": "bf16"}))
    assert content(tmp_path / "out") == before


def test_the_command_exits_with_4_and_names_the_worst_images(manifest: Path, tmp_path: Path) -> None:
    child = forks().start(
        "tests.forks:run_command",
        f"manifest.path={manifest}", "manifest.image=image", f"output.dir={tmp_path / 'out'}", "backend.device=cpu",
        "backend.precision=bf16", "parity.lowest_cosine.bf16=1", "parity.images=8",
        "loader.isolation=none", "report.html=false",
    )  # fmt: skip
    code, message = child.wait(), child.said()
    assert code == 4, message
    assert "parity.lowest_cosine.bf16 wants 1" in message
    assert "scene/" in message


def test_a_backend_that_is_another_model_is_refused(manifest: Path, tmp_path: Path) -> None:
    class Stranger(StubEncoder):
        dim = 128
        precision = "int8"

        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(vectors.repeat(1, 32), dim=1)

    with stub_backend(Stranger), pytest.raises(ParityError, match="too far from fp32"):
        run_job(job(manifest, tmp_path / "out", "torch"))


def tampered(store: Path, target: Path, *, seal: bool) -> None:
    """A copy of the store in which one weight of the graph is another; with ``seal``, the card says it is right."""
    import onnx

    shutil.copytree(store, target)
    [artifact] = ArtifactStore(target).artifacts()
    path = artifact.file("model.onnx")
    model = onnx.load(str(path))
    shift = next(t for t in model.graph.initializer if list(t.dims) == [128] and t.data_type == onnx.TensorProto.FLOAT)
    values = np.array(onnx.numpy_helper.to_array(shift))
    values[0] += 100
    shift.CopyFrom(onnx.numpy_helper.from_array(values, shift.name))
    onnx.save(model, str(path))
    if seal:
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)}}
        write_card(artifact.path / CARD, sealed({**artifact.card, "files": files}))


def test_a_graph_that_was_tampered_with_is_built_anew(manifest: Path, tmp_path: Path, store: Path) -> None:
    tampered(store, tmp_path / "store", seal=False)
    report = run_job(job(manifest, tmp_path / "out", "onnx_int8", store=tmp_path / "store"))
    assert report.parity is not None
    assert report.parity.lowest_cosine > 0.99
    assert "model.onnx" in (tmp_path / "out" / "_run.log").read_text()
    assert ArtifactStore(tmp_path / "store").problems(ArtifactStore(tmp_path / "store").artifacts()[0]) == []


def test_a_graph_that_was_tampered_with_on_the_card_too_is_refused_by_the_gate(
    manifest: Path, tmp_path: Path, store: Path
) -> None:
    tampered(store, tmp_path / "store", seal=True)
    with pytest.raises(ParityError, match="too far from fp32"):
        run_job(job(manifest, tmp_path / "out", "onnx_int8", store=tmp_path / "store"))
    assert not list((tmp_path / "out").glob("part-*"))
