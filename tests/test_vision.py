"""Image towers alone: embeddings without labels, and one clear message wherever a text is asked for."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.nn.functional import normalize

from pipeline import export, relabel, search
from pipeline.api.embed import embed_texts
from pipeline.config.schema import Config, LoaderConfig, ModelConfig
from pipeline.core.errors import ModelError
from pipeline.job.main import run_job
from tests.families import Case
from tests.image_towers import TOWERS
from tests.jobs import config_for, scene, scenes_manifest

NO_TEXT = "a dinov2 model has no text tower"
WAY_OUT = r"prompts\.labels=\[\] prompts\.path=null.*model=clip_vit_b32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dinov2")


@pytest.fixture(scope="module")
def case(folder: Path) -> Case:
    return TOWERS["dinov2"](folder)


@pytest.fixture(scope="module")
def config(case: Case, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    work = tmp_path_factory.mktemp("job")
    manifest = scenes_manifest(work / "m.parquet", 6, damaged={})
    config = config_for(manifest, work / "out", model={"name": str(folder)}, prompts={"labels": []})
    assert run_job(config).counts == {"ok": 6}
    return config


def test_a_job_embeds_without_labels(case: Case, config: Config) -> None:
    rows = pq.read_table(config.output.dir).to_pydict()
    images = [Image.open(io.BytesIO(data)) for data in pq.read_table(config.manifest.path)["image"].to_pylist()]
    expected = normalize(case.image_features(case.pixels(images)), dim=1).detach()
    np.testing.assert_allclose(rows["embedding"], expected, atol=1e-5)
    assert rows["label"] == rows["score"] == [None] * 6


def test_a_search_takes_a_picture_and_refuses_a_text(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(scene(3)[0])
    assert search.main([config.output.dir, "--image", str(tmp_path / "a.jpg"), "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert (hits[0]["id"], len(hits)) == ("scene/0003.jpg", 6)
    assert search.main([config.output.dir, "a red circle"]) == 2
    error = capsys.readouterr().err
    assert NO_TEXT in error
    assert "search with --image" in error


def test_labels_are_refused_before_any_work(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = config.changed({"prompts.labels": ["a cat", "a dog"], "output.dir": str(tmp_path / "out")})
    with pytest.raises(ModelError, match=f"{NO_TEXT}.*{WAY_OUT}"):
        run_job(labelled)
    assert not list((tmp_path / "out").glob("_plan.json"))
    typed = ["prompts.labels=[a cat,a dog]", "report.progress=none"]
    assert relabel.main([config.output.dir, f"output.dir={tmp_path / 'new'}", *typed]) == 2
    assert NO_TEXT in capsys.readouterr().err
    assert not list((tmp_path / "new").glob("_plan.json"))
    with pytest.raises(ModelError, match=NO_TEXT):
        embed_texts("a cat", model=config.model.name)


def test_a_service_embeds_images_and_refuses_texts(config: Config, tmp_path: Path) -> None:
    for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        pytest.importorskip(package, reason="needs the extra serve")
    from pipeline.serve.errors import Refused
    from pipeline.serve.requests import EncodedImage, PredictRequest
    from pipeline.serve.service import Service

    served = Config(model=ModelConfig(name=config.model.name), loader=LoaderConfig(batch_size=4, isolation="none"))
    service = Service(served.changed({"backend.device": "cpu", "prompts.cache": str(tmp_path / "cache")}))

    async def ask() -> None:
        service.start(lambda error: None)
        assert service._task is not None
        await service._task
        assert service.not_ready_reason is None
        (row,) = await service.rows([EncodedImage(data=base64.b64encode(scene(3)[0]).decode())], None)
        stored = pq.read_table(config.output.dir)["embedding"][3].as_py()
        np.testing.assert_allclose(row.vector, stored, atol=1e-5)  # type: ignore[union-attr]
        request = PredictRequest.model_construct(images=[], labels=["a", "b"], templates=None, top_k=None)
        for asked in (service.texts(["a cat"]), service.labelling(request)):
            with pytest.raises(Refused, match=r"embeds images alone.*dinov2.*send images to /embed") as caught:
                await asked
            assert caught.value.status == 422
        assert service.not_ready_reason is None
        await service.close()

    asyncio.run(ask())


@pytest.mark.slow
def test_an_export_leaves_the_text_tower_out(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    given = [f"model.name={config.model.name}", f"backend.artifacts={tmp_path / 'store'}"]
    assert export.main(["--to", "triton", "--out", str(tmp_path / "models"), *given]) == 0
    card = json.loads((tmp_path / "models" / "card.json").read_text())
    assert list(card["models"]) == ["image"]
    assert not {"texts", "scores"} & card.keys()
    assert "## Scores" not in (tmp_path / "models" / "README.md").read_text()
    capsys.readouterr()
    assert export.main(["--tower", "text", *given]) == 2
    assert NO_TEXT in capsys.readouterr().err
