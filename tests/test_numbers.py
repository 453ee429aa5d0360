"""Numbers are proved where they are made: features, scale, bias and scores; labels with the same features are named."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_safetensors
from safetensors.torch import load_file, save_file

from pipeline.api.embed import embed_texts
from pipeline.config.schema import Config, LabelsConfig, LoaderConfig, ModelConfig, PromptsConfig
from pipeline.core.errors import ModelError, NumericalError
from pipeline.engine.demo.scenes import render, sample
from pipeline.engine.query import embed_image, embed_text
from pipeline.job.main import run_job
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from pipeline.models.label_files import read_labels
from pipeline.models.numbers import SAME_COSINE, alike, are_unit, check_scores
from pipeline.models.text import build_bank
from pipeline.serve.errors import Refused
from tests.jobs import config_for, scenes_manifest

if TYPE_CHECKING:
    from pipeline.serve.service import Service

LABELS = PromptsConfig(labels=["red circle", "blue star"])


def spoiled(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> str:
    """A copy of the demo's model in which one tensor was changed."""
    shutil.copytree(DEMO_FOLDER, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def first(value: float) -> Callable[[torch.Tensor], Any]:
    return lambda tensor: tensor.view(-1)[:1].fill_(value)


NAN, INF = float("nan"), float("inf")
TEXT = {
    "NaN in a layer": ("text_model.encoder.layers.0.mlp.fc1.weight", first(NAN)),
    "infinity in a layer": ("text_model.encoder.layers.1.mlp.fc2.bias", first(INF)),
    "NaN in the projection": ("text_projection.weight", first(NAN)),
    "a projection of zeros": ("text_projection.weight", lambda tensor: tensor.zero_()),
    "NaN in the last norm": ("text_model.final_layer_norm.weight", first(-NAN)),
    "an overflow": ("text_projection.weight", lambda tensor: tensor.fill_(3e38)),
}


@pytest.fixture(params=TEXT)
def broken_text(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return spoiled(tmp_path / "model", *TEXT[request.param])


def test_a_text_tower_that_gives_no_features_is_named(broken_text: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ModelConfig(name=broken_text))
    config = PromptsConfig(labels=LABELS.labels, cache=str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"the text tower.* gives NaN, infinity or zeros for 2 of 2 texts.*red circle"):
        build_bank(checkpoint, read_labels(config), config, LabelsConfig())
    assert not list((tmp_path / "cache").glob("*")), "nothing of it is cached"
    with pytest.raises(ModelError, match="the text tower"):
        embed_text(checkpoint, ["a red circle"])
    with pytest.raises(ModelError, match="the text tower"):
        embed_texts("a red circle", model=broken_text)


def test_the_tensor_of_a_broken_text_tower_is_named(tmp_path: Path) -> None:
    name = spoiled(tmp_path / "model", *TEXT["NaN in a layer"])
    with pytest.raises(ModelError, match=r"its tensor text_model\.encoder\.layers\.0\.mlp\.fc1\.weight holds NaN"):
        embed_texts("a red circle", model=name)


def test_a_token_without_numbers_is_named_by_its_text(tmp_path: Path) -> None:
    demo = open_checkpoint(ModelConfig())
    token = demo.tokenizer.own("star", add_special_tokens=False)["input_ids"][0]
    name = spoiled(
        tmp_path / "model", "text_model.embeddings.token_embedding.weight", lambda tensor: tensor[token].fill_(NAN)
    )
    assert len(embed_texts(["red circle"], model=name)) == 1
    with pytest.raises(ModelError, match="for 1 of 2 texts, for example 'blue star'"):
        embed_texts(["red circle", "blue star"], model=name)


def test_a_job_with_a_broken_text_tower_writes_nothing(tmp_path: Path) -> None:
    name = spoiled(tmp_path / "model", *TEXT["NaN in a layer"])
    manifest = scenes_manifest(tmp_path / "m.parquet", 4)
    with pytest.raises(ModelError, match="the text tower"):
        run_job(config_for(manifest, tmp_path / "out", model={"name": name}, prompts={"labels": LABELS.labels}))
    assert not list((tmp_path / "out").glob("_plan.json"))
    # Embeddings alone need no text tower.
    run_job(config_for(manifest, tmp_path / "bare", model={"name": name}, prompts={"labels": []}))
    assert (tmp_path / "bare" / "_SUCCESS").exists()


SCALES = [
    ("logit_scale", NAN, "logit_scale is nan"),
    ("logit_scale", INF, "logit_scale is inf"),
    ("logit_scale", -INF, "logit_scale is -inf.*, 0;"),
    ("logit_scale", 100.0, "logit_scale is 100.*its exponential, inf"),
    ("logit_scale", 88.5, "logit_scale is 88.5"),
    ("logit_scale", -200.0, "logit_scale is -200.*its exponential, 0;"),
]


@pytest.mark.parametrize(("tensor", "value", "message"), SCALES)
def test_a_scale_with_which_no_score_is_a_number_is_refused(
    tensor: str, value: float, message: str, tmp_path: Path
) -> None:
    name = spoiled(tmp_path / "model", tensor, first(value))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(ModelConfig(name=name))


@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])
def test_a_bias_with_which_no_score_is_a_number_is_refused(value: float, tmp_path: Path) -> None:
    from tests.test_checkpoint import small_siglip

    small_siglip(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["logit_bias"].fill_(value)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="logit_bias is"):
        open_checkpoint(ModelConfig(name=str(tmp_path)))


def test_an_image_tower_that_gives_no_embedding_answers_no_query(tmp_path: Path) -> None:
    name = spoiled(tmp_path / "model", "visual_projection.weight", first(NAN))
    render(sample(5, 0), 64, 64).save(tmp_path / "a.png")
    config = config_for(tmp_path / "m.parquet", tmp_path / "out", model={"name": name})
    with pytest.raises(ModelError, match=r"the image tower.*visual_projection\.weight"):
        embed_image(open_checkpoint(config.model), config, tmp_path / "a.png")


@pytest.mark.parametrize("damage", [NAN, INF, 0.0, 0.5])
def test_cached_features_that_are_none_are_not_used(damage: float, tmp_path: Path) -> None:
    demo, config = open_checkpoint(ModelConfig()), PromptsConfig(labels=LABELS.labels, cache=str(tmp_path))
    wanted = build_bank(demo, read_labels(config), config, LabelsConfig())
    file = next(tmp_path.glob("*.safetensors"))
    features = wanted.features.copy()
    features[1] = damage
    file.write_bytes(save_safetensors({"features": features}))
    again = build_bank(demo, read_labels(config), config, LabelsConfig())
    assert not again.cached
    np.testing.assert_array_equal(again.features, wanted.features)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_score_that_is_no_number_ends_what_made_it(kind: str, value: float) -> None:
    scores = torch.full((3, 2), 0.5)
    check_scores(scores, "here")
    check_scores(scores[:0], "here")
    scores[2, 1] = value
    with pytest.raises(NumericalError, match="here: a score is NaN or infinite"):
        check_scores(scores if kind == "torch" else scores.numpy(), "here")


def test_scores_of_a_job_are_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_checkpoint(ModelConfig())
    assert are_unit(build_bank(real, read_labels(LABELS), LABELS, LabelsConfig()).features).all()
    monkeypatch.setattr("pipeline.models.dual.scale_and_bias", lambda name, model: (NAN, 0.0))
    manifest = scenes_manifest(tmp_path / "m.parquet", 4)
    with pytest.raises(NumericalError, match="shard 0, batch 0: a score is NaN"):
        run_job(config_for(manifest, tmp_path / "out"))
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def service_of(name: str, tmp_path: Path) -> Service:
    for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        pytest.importorskip(package, reason="needs the extra serve")
    from pipeline.serve.service import Service

    config = Config(model=ModelConfig(name=name), loader=LoaderConfig(batch_size=4, isolation="none"))
    return Service(config.changed({"backend.device": "cpu", "prompts.cache": str(tmp_path / "cache")}))


@pytest.mark.parametrize("kind", ["NaN in a layer", "a projection of zeros"])
def test_a_service_with_a_broken_text_tower_is_never_ready(kind: str, tmp_path: Path) -> None:
    service, failures = service_of(spoiled(tmp_path / "model", *TEXT[kind]), tmp_path), list[BaseException]()

    async def start() -> None:
        service.start(failures.append)
        assert service._task is not None
        await service._task
        await service.close()

    asyncio.run(start())
    assert "the text tower" in str(failures[0])
    assert "the text tower" in (service.not_ready_reason or "")


def test_a_service_whose_text_tower_gives_nan_for_a_request_is_ready_no_more(tmp_path: Path) -> None:
    token = open_checkpoint(ModelConfig()).tokenizer.own("star", add_special_tokens=False)["input_ids"][0]
    tensor = "text_model.embeddings.token_embedding.weight"
    service = service_of(spoiled(tmp_path / "model", tensor, lambda each: each[token].fill_(NAN)), tmp_path)

    async def ask() -> None:
        service.start(lambda error: None)
        assert service._task is not None
        await service._task
        try:
            assert service.not_ready_reason is None
            assert len(await service.texts(["red circle"])) == 1
            with pytest.raises(Refused, match="text tower") as caught:
                await service.texts(["blue star"])
            assert caught.value.status == 503
            assert "'blue star'" in (service.not_ready_reason or "")
        finally:
            await service.close()

    asyncio.run(ask())


# Labels with the same features.


def unit(rows: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 1e-5, 5e-5, 1e-3])
def test_rows_alike_are_those_of_all_pairs(noise: float, seed: int) -> None:
    vectors = unit(300, 32, seed)
    vectors[100:110] = vectors[:10] + noise * unit(10, 32, seed + 9)
    vectors[200] = vectors[100]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    pairs = np.argwhere(np.triu(cosines > SAME_COSINE, 1))
    assert alike(vectors) == [tuple(pair) for pair in pairs.tolist()]
    assert len(pairs) >= 1


@pytest.mark.parametrize("count", [1, 2, 2000])
def test_rows_that_are_all_alike_take_no_time(count: int) -> None:
    found = alike(np.repeat(unit(1, 64, 0), count, axis=0))
    assert (len(found) > 0) == (count > 1)
    assert len(found) < 2 * count + 100


@pytest.mark.parametrize(
    ("labels", "same"),
    [
        (["red circle", "blue star", "Red  Circle"], ("red circle", "Red  Circle")),
        (["red circle", "blue star", "RED CIRCLE"], ("red circle", "RED CIRCLE")),
        (["red circle", "blue star", "red star"], None),
    ],
)
def test_labels_with_the_same_features_are_named_before_the_job(
    labels: list[str], same: tuple[str, str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PromptsConfig(labels=labels, cache=str(tmp_path))
    demo = open_checkpoint(ModelConfig())
    for _ in ("embedded", "from the cache"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build_bank(demo, read_labels(config), config, LabelsConfig())
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (same is not None)
        assert all(repr(name) in told[0] for name in same or ())
