from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.schema import FORMATS, ModelConfig
from pipeline.core.records import Failure
from pipeline.engine.demo import folder, scenes
from pipeline.images.decode import Decoder
from pipeline.images.preprocess import preprocess
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from pipeline.models.text import embed_prompts
from tests.demo_training import UNSEEN_SEED

DECODER = Decoder(formats=FORMATS, max_pixels=10_000_000)


def top1(chosen: list[scenes.Scene], side: int) -> float:
    """Accuracy through the job's own path: JPEG bytes, decode, preprocess, encode, nearest label."""
    from pipeline.backends.torch import reference

    checkpoint = open_checkpoint(ModelConfig())
    names = folder.label_names()
    features = torch.from_numpy(embed_prompts(checkpoint, [[f"a photo of a {name}"] for name in names]))
    encoder = reference(
        checkpoint, torch.device("cpu"), batch_size=100, sample=lambda: folder.rendered_sample(checkpoint.spec, 1)
    )
    hits = 0
    for start in range(0, len(chosen), 100):
        batch = []
        for scene in chosen[start : start + 100]:
            image = DECODER.decode(folder.jpeg(scene, side, side))
            assert not isinstance(image, Failure)
            batch.append(preprocess(image, checkpoint.spec).rgb)
        vectors = encoder.encode(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2))
        best = (vectors @ features.T).argmax(dim=1).tolist()
        hits += sum(names[i] == s.label for i, s in zip(best, chosen[start : start + 100], strict=True))
    return hits / len(chosen)


@pytest.mark.slow
def test_the_demo_model_labels_unseen_scenes() -> None:
    assert top1(list(scenes.scenes(UNSEEN_SEED, 1000)), side=128) >= 0.95


@pytest.mark.slow
def test_the_demo_model_composes_what_it_never_saw_together() -> None:
    assert top1(list(scenes.scenes(UNSEEN_SEED + 1, 1000, only=scenes.HELD_OUT)), side=128) >= 0.70


def test_one_combination_is_kept_out_for_each_colour_and_each_shape() -> None:
    assert {colour for colour, _ in scenes.HELD_OUT} == set(scenes.COLOURS)
    assert {shape for _, shape in scenes.HELD_OUT} == set(scenes.SHAPES)
    assert len(scenes.HELD_OUT) == 10


def test_a_scene_follows_from_seed_and_index() -> None:
    first, again = (list(scenes.scenes(5, 30)) for _ in range(2))
    assert first == again
    assert first != list(scenes.scenes(6, 30))
    assert scenes.render(first[0], 64, 48).tobytes() == scenes.render(again[0], 64, 48).tobytes()
    assert all(s.held_out for s in scenes.scenes(5, 30, only=scenes.HELD_OUT))


@pytest.mark.parametrize("size", [(48, 48), (640, 480), (300, 900), (1200, 1000)])
def test_a_scene_looks_the_same_at_any_size(size: tuple[int, int]) -> None:
    scene = scenes.sample(9, 4)
    picture = scenes.render(scene, *size)
    assert picture.size == size
    small = scenes.render(scene, 64, 64)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((64, 64))
    difference = np.abs(np.asarray(square, dtype=float) - np.asarray(small, dtype=float)).mean()
    assert difference < 12


def test_every_shape_and_texture_can_be_drawn() -> None:
    drawn = {(s.shape, s.texture, s.background) for s in scenes.scenes(1, 3000)}
    assert len(drawn) == len(scenes.SHAPES) * len(scenes.TEXTURES) * len(scenes.BACKGROUNDS)
    with pytest.raises(ValueError, match="unknown shape"):
        scenes.render(scenes.Scene(**{**scenes_as_dict(scenes.sample(1, 1)), "shape": "blob"}), 64, 64)


def scenes_as_dict(scene: scenes.Scene) -> dict[str, object]:
    return {name: getattr(scene, name) for name in scene.__slots__}


def test_captions_name_what_they_are_asked_to() -> None:
    scene = next(s for s in scenes.scenes(1, 500) if s.colour == "orange")
    assert scenes.caption(scene, ["colour", "shape"]) == f"an orange {scene.shape}"
    assert scenes.caption(scene, ["colour"]) == "an orange shape"
    everything = scenes.caption(scene, ["size", "texture", "colour", "shape", "background"])
    assert everything == (f"a {scene.size} {scene.texture} orange {scene.shape} on a {scene.background} background")


def test_the_demo_folder_is_rendered_once(tmp_path: Path) -> None:
    manifest = folder.render_folder(tmp_path, 7)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert folder.render_folder(tmp_path, 7) == manifest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    table = pq.read_table(manifest)
    assert table.column_names == ["id", "path", "truth"]
    assert all((tmp_path / path).is_file() for path in table["path"].to_pylist())


@pytest.mark.slow
def test_training_repeats(tmp_path: Path) -> None:
    from tests.demo_training import train

    figures = [train(tmp_path / name, count=64, steps=2, batch_size=16, seed=0, checked=10) for name in "ab"]
    assert figures[0] == figures[1]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]
    assert set(files[0]) == {path.name for path in DEMO_FOLDER.iterdir()}
