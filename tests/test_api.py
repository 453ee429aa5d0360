"""The Python API: rows and errors are those of the command, and no temporary file is left."""

from __future__ import annotations

import _thread
import asyncio
import gc
import inspect
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

import pipeline
from pipeline import Dataset, PipelineError, embed, embed_texts, open_dataset
from pipeline.api.config import config_from, model_settings
from pipeline.api.encode import encode
from pipeline.api.inputs import Columns, manifest_of
from pipeline.api.scratch import Scratch
from pipeline.config.compose import compose_config, groups, register, to_config
from pipeline.config.schema import Config, conf_dir, value_of
from pipeline.core.errors import ConfigError, ManifestError, NoDataset, PlanMismatch, PromptsError, UnfinishedDataset
from pipeline.engine.demo.folder import jpeg, render_folder
from pipeline.engine.demo.scenes import render, sample
from pipeline.job.main import RunOptions
from tests.forks import forks
from tests.jobs import config_for, content, overrides_of, scenes_manifest
from tests.processes import loads, run_python

SETTINGS = {"loader.isolation": "none", "report.html": False}
QUICK: dict[str, Any] = {"settings": SETTINGS, "progress": False, "device": "cpu"}
# A batch of another size is computed in another order.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, to check that they are removed."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve scenes as JPEG files."""
    folder = tmp_path_factory.mktemp("photos")
    render_folder(folder, 12, width=64, height=64)
    return sorted(folder.rglob("*.jpg"))


@pytest.fixture(scope="module")
def whole(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return embed(photos, output=tmp_path_factory.mktemp("whole") / "dataset", **QUICK)


@pytest.mark.slow
def test_the_rows_are_those_of_the_command_byte_for_byte(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 60)
    config = config_for(manifest, tmp_path / "command")
    assert forks().start("tests.forks:run_command", *overrides_of(config)).wait() == 0
    settings = {"manifest.shard_rows": 24, "loader.workers": 2, "errors.max_fraction": 0.5}
    made = embed(manifest, image="image", keep=["truth", "meta"], batch_size=8, device="cpu", progress=False,
                 output=tmp_path / "called", settings=settings)  # fmt: skip
    assert content(tmp_path / "called") == content(tmp_path / "command")
    assert made.counts == {"ok": 58, "not_an_image": 1, "empty": 1}
    assert "60 rows" in (tmp_path / "called" / "_run.log").read_text()


def outcome(compose: Callable[[], Config]) -> Config | set[str]:
    """The config, or what is wrong with it."""
    try:
        return compose()
    except ConfigError as error:
        return {str(problem) for problem in error.problems}


@pytest.mark.slow
def test_every_option_composes_as_the_command_composes_it() -> None:
    known = groups(conf_dir())
    register()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        for turn in range(max(map(len, known.values()))):
            chosen = {group: options[turn % len(options)] for group, options in known.items()}
            typed = [f"{group}={option}" for group, option in chosen.items()]
            theirs = outcome(lambda typed=typed: to_config(compose("config", overrides=typed)))  # type: ignore[misc]
            assert outcome(lambda chosen=chosen: config_from(chosen)) == theirs, chosen  # type: ignore[misc]
    assert config_from({}) == Config()


def test_defaults_are_those_of_conf() -> None:
    defaults = {name: each.default for name, each in inspect.signature(embed).parameters.items()}
    config = compose_config([])
    keys = {"model": "model.name", "backend": "backend.name", "precision": "backend.precision"}
    keys |= {"device": "backend.device", "decoder": "images.decoder", "batch_size": "loader.batch_size"}
    assert {name: defaults[name] for name in keys} == {name: value_of(config, key) for name, key in keys.items()}


def test_all_mistakes_are_reported_at_once_as_by_the_command(photos: list[Path], scratch: Path) -> None:
    wrong = {
        "loader.batch_siz": 8,
        "labels.top_k": 0,
        "loader.workers": "many",
        "output.dir": "x",
        "run.dry": True,
        "model.name": "y",
    }
    with pytest.raises(ConfigError) as caught:
        embed(photos, model="clip_vit_b23", backend="onxx", settings=wrong)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"model", "backend", *wrong}
    text = str(caught.value)
    assert "did you mean clip_vit_b32?" in text
    assert "did you mean loader.batch_size?" in text
    with pytest.raises(ConfigError) as typed:
        compose_config(["backend=onxx", "loader.batch_siz=8", "loader.workers=many", "labels.top_k=0"])
    assert {str(problem) for problem in typed.value.problems if problem.key in ("backend", "labels.top_k")} <= {
        str(problem) for problem in caught.value.problems
    }
    assert not [*scratch.iterdir()]


def test_a_model_is_a_name_an_id_of_the_hub_or_a_folder(tmp_path: Path) -> None:
    assert config_from(model_settings("clip_vit_b32")).model.name == "openai/clip-vit-base-patch32"
    assert config_from(model_settings("a/b")).model.name == "a/b"
    assert config_from(model_settings(tmp_path)).model.name == str(tmp_path)
    assert config_from(model_settings("demo")) == Config()


def test_rows_are_in_the_order_given_and_failures_are_nan(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    given = [photos[2], tmp_path / "bad.jpg", photos[0], tmp_path / "gone.jpg"]
    made = embed(given, **QUICK)
    assert made.ids == [str(path) for path in given]
    assert np.isnan(made.embeddings).all(axis=1).tolist() == [False, True, False, True]
    assert np.linalg.norm(made.embeddings[[0, 2]], axis=1) == pytest.approx(1)
    assert made.failures["status"].tolist() == ["not_an_image", "not_found"]
    ids, matrix = made.matrix()
    assert ids == [str(photos[2]), str(photos[0])]
    assert np.array_equal(matrix, made.embeddings[[0, 2]])
    assert len(made) == 4
    assert made.report["counts"] == made.counts
    assert "embedding" not in made.frame()


@pytest.mark.slow
def test_the_same_images_in_any_form_have_the_same_embeddings(photos: list[Path], whole: Dataset) -> None:
    few = photos[:3]
    wanted = whole.embeddings[:3]
    pictures = [Image.open(path) for path in few]
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    data = [path.read_bytes() for path in few]
    frame = pd.DataFrame({"path": [str(path) for path in few], "n": [7, 8, 9]}, index=["a", "b", "c"])
    forms: list[tuple[Any, dict[str, Any], list[Any]]] = [
        (pictures, {}, [0, 1, 2]),
        (np.stack(arrays), {}, [0, 1, 2]),
        (iter(data), {"ids": ["x", "y", "z"]}, ["x", "y", "z"]),
        (frame, {"keep": ["n"]}, ["a", "b", "c"]),
        (frame.assign(id=[5, 6, 7]), {}, [5, 6, 7]),
        (pd.DataFrame({"image": [{"bytes": cell, "path": None} for cell in data]}), {}, [0, 1, 2]),
        (pd.DataFrame({"picture": pictures}), {"image": "picture"}, [0, 1, 2]),
        (pa.table({"path": frame["path"].to_list(), "sku": ["p", "q", "r"]}), {"id": "sku"}, ["p", "q", "r"]),
        (pa.table({"image": data}), {}, [0, 1, 2]),
        ([path.name for path in few], {"root": few[0].parent}, [path.name for path in few]),
    ]
    for images, arguments, ids in forms:
        with embed(images, **arguments, **QUICK) as made:
            assert made.ids == ids
            assert np.abs(made.embeddings - wanted).max() < ROUNDING, arguments
            if "keep" in arguments:
                assert made.frame(["n"])["n"].tolist() == [7, 8, 9]


def test_a_folder_of_images_needs_no_manifest(photos: list[Path], whole: Dataset) -> None:
    with embed(photos[0].parent, **QUICK) as made:
        assert made.ids == [path.name for path in photos]
        assert np.abs(made.embeddings - whole.embeddings).max() < ROUNDING
    assert embed(str(photos[1]), **QUICK).ids == [str(photos[1])]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "F", "LAB"])
def test_a_picture_in_memory_keeps_its_mode_and_pixels(mode: str) -> None:
    source = Image.new("F", (6, 4), 3.5) if mode == "F" else Image.new(mode, (6, 4))
    again = Image.open(io.BytesIO(encode(source, "x")))
    assert again.mode == mode
    assert again.tobytes() == source.tobytes()


def test_damage_that_pillow_finds_late_is_an_error() -> None:
    picture = Image.new("RGB", (4, 4))
    picture.info["exif"] = b"Exif\0\0nothing of the kind"
    with pytest.raises(ManifestError, match=r"images\[3\]"):
        encode(picture, "images[3]")


def test_a_picture_in_memory_is_turned_as_its_file_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    render(sample(11, 1), 64, 48).save(file, "PNG", exif=exif)
    with embed([file.getvalue(), Image.open(file)], **QUICK) as made:
        assert np.array_equal(made.embeddings[0], made.embeddings[1])


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([], {}, "empty"),
        ([1, 2], {}, "int is not an image"),
        ([np.zeros((4, 4, 3))], {}, "wanted uint8"),
        ([np.zeros((3, 8, 8), np.uint8)], {}, "the colours last"),
        (["a.jpg", "a.jpg"], {}, "twice"),
        (["a.jpg", b"x"], {}, "bytes among paths"),
        (["a.jpg"], {"ids": ["a", "b"]}, "2 of them for 1 images"),
        ([b"x"], {"ids": ["a", "b"]}, "2 of them for 1 images"),
        ([b"x"], {"ids": "ab"}, "one id for each image"),
        ([b"x"], {"image": "path"}, "has no columns"),
        (pd.DataFrame({"file": ["a.jpg"]}), {}, "no column 'path'; its columns are: file"),
        (pd.DataFrame({"path": ["a.jpg"]}), {"keep": ["x"]}, "no column 'x'"),
        (b"\x89PNG", {}, "a single bytes"),
        ({"path": ["a.jpg"]}, {}, "a dict"),
        ("nowhere.parquet", {}, "no such file"),
        (["s3://a/x.jpg", "s3://b/y.jpg"], {}, "several stores"),
        (np.zeros((4, 4, 3), np.uint8), {}, "a single image"),
        (np.zeros((4, 4), np.uint8), {}, "a single image"),
        (["a.jpg", "b\udcff.jpg"], {}, r"images\[1\]"),
        (["a.jpg", "b\udcff.jpg"], {"ids": [1, 2]}, r"path\[1\].*not UTF-8"),
        (["a.jpg"], {"root": "/b\udcff"}, "root: .*not UTF-8"),
        (["a.jpg", None], {}, r"images\[1\].*ids=\[...\]"),
        (["a.jpg", "b.jpg"], {"ids": [1, 2**63]}, r"ids\[1\]"),
        (["a.jpg", "b.jpg"], {"ids": [1, "2"]}, "all texts or all whole numbers"),
        ([b"x", b"y"], {"ids": [1, 1]}, r"ids\[1\]: 1 occurs twice"),
        ([b"x", b"y"], {"ids": [1]}, "1 of them for more images"),
        (pd.DataFrame({"path": ["a.jpg", "b.jpg"]}, index=[7, 7]), {}, r"index\[1\].*reset_index"),
        (pd.DataFrame([["a.jpg", 1, 2]], columns=["path", "n", "n"]), {"keep": ["n"]}, "two columns 'n'"),
        (pa.table([["a.jpg"], ["b.jpg"]], names=["path", "path"]), {}, "two columns 'path'"),
        (pd.DataFrame({"path": ["a.jpg"]}), {"image": 0}, "no column 0"),
    ],
)
def test_an_input_that_is_not_an_image_is_refused(
    images: Any, arguments: dict[str, Any], message: str, scratch: Path
) -> None:
    with pytest.raises((ManifestError, ConfigError), match=message):
        embed(images, **arguments, **QUICK)
    assert not [*scratch.iterdir()]


def test_a_dataset_without_output_is_removed_with_the_object(photos: list[Path], scratch: Path) -> None:
    made = embed(photos[:2], **QUICK)
    assert Path(made.url).parent.parent == scratch
    other = made.relabel(["a", "b"])
    other.close()
    assert len([*scratch.iterdir()]) == 1
    del made
    gc.collect()
    assert not [*scratch.iterdir()]


def test_a_dataset_with_output_stays_and_the_same_call_resumes_it(
    photos: list[Path], tmp_path: Path, scratch: Path
) -> None:
    place = tmp_path / "out" / "photos"
    first = embed(photos, output=place, **QUICK)
    before = {path: path.stat().st_mtime_ns for path in place.parent.rglob("*.parquet")}
    assert [path.name.partition(".")[0] for path in before if path.parent == place.parent] == ["photos"]
    again = embed(photos, output=place, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in place.parent.rglob("*.parquet")} == before
    assert np.array_equal(again.embeddings, first.embeddings)
    with pytest.raises(PlanMismatch):
        embed(photos[1:], output=place, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in place.parent.rglob("*.parquet")} == before
    assert np.array_equal(open_dataset(place).embeddings, first.embeddings)
    assert not [*scratch.iterdir()]
    with pytest.raises(NoDataset):
        open_dataset(tmp_path)


@pytest.mark.slow
def test_an_interrupted_call_is_resumed(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 160, damaged={})
    arguments: dict[str, Any] = {**QUICK, "image": "image", "batch_size": 8}
    arguments["settings"] = {**SETTINGS, "manifest.shard_rows": 8}
    place, stopped = tmp_path / "out", threading.Event()

    def interrupt() -> None:
        while not (place / "_commits" / "00000.json").exists() and not stopped.is_set():
            time.sleep(0.001)
        _thread.interrupt_main()

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            embed(manifest, output=place, **arguments)
    finally:
        stopped.set()
        watcher.join()
    with pytest.raises(UnfinishedDataset):
        open_dataset(place)
    embed(manifest, output=place, **arguments)
    embed(manifest, output=tmp_path / "unbroken", **arguments)
    assert content(place) == content(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_thread_and_a_running_event_loop_may_call(photos: list[Path], whole: Dataset) -> None:
    arguments = {**QUICK, "settings": {}}

    async def call() -> Dataset:
        return embed(photos[:2], **arguments)

    async def call_aside() -> Dataset:
        return await asyncio.to_thread(embed, photos[:2], **arguments)

    for made in (asyncio.run(call()), asyncio.run(call_aside())):
        assert np.abs(made.embeddings - whole.embeddings[:2]).max() < ROUNDING


def test_settings_of_the_process_are_restored(photos: list[Path]) -> None:
    def now() -> tuple[int, str, bool, int | None]:
        return (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                Image.MAX_IMAGE_PIXELS)  # fmt: skip

    began = now()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    before = now()
    try:
        with embed(photos[:2], **QUICK) as made:
            made.search(image=photos[0])
            made.relabel(["a"]).close()
        assert now() == before
    finally:
        torch.set_num_threads(began[0])
        torch.set_float32_matmul_precision(began[1])


def test_search_finds_by_text_image_id_and_vector(photos: list[Path], whole: Dataset) -> None:
    label = whole.frame()["label"][4]
    hits = whole.search(f"a photo of a {label}", top=3)
    assert hits[0].label == label
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert hits.frame()["id"].tolist() == [hit.id for hit in hits]
    for image in (photos[5], Image.open(photos[5]), photos[5].read_bytes()):
        assert whole.search(image=image, top=1)[0].id == str(photos[5])
    assert str(photos[5]) not in [hit.id for hit in whole.search(id=str(photos[5]), top=11)]
    assert whole.search(vector=3 * whole.embeddings[6], top=1)[0].score == pytest.approx(1)
    wrongs: list[dict[str, Any]] = [{}, {"text": "a", "id": "b"}, {"text": "a", "top": 0}, {"id": "nobody"}]
    for wrong in (*wrongs, {"vector": [0.0]}, {"vector": ["a"]}):
        with pytest.raises(ConfigError):
            whole.search(**wrong)
    with pytest.raises(ConfigError, match="\n  - id = 'nobody': no row of"):
        whole.search(id="nobody")


def test_texts_and_images_share_one_space(whole: Dataset) -> None:
    frame = whole.frame()
    texts = embed_texts(frame["label"].to_list(), templates="a photo of a {}")
    assert texts.dtype == np.float32
    best = (whole.embeddings @ texts.T).argmax(axis=1)
    assert (frame["label"][best].to_numpy() == frame["label"].to_numpy()).all()
    assert np.array_equal(embed_texts("a cat"), embed_texts(["a cat"]))
    for wrong in ([], ["a", " "]):
        with pytest.raises(PromptsError):
            embed_texts(wrong)
    with pytest.raises(ConfigError, match=r"prompts\.templates"):
        embed_texts(["a"], templates="no place")


def test_other_labels_need_no_images(whole: Dataset, tmp_path: Path) -> None:
    made = whole.relabel(["circle", "square"], templates=["a {}"], top_k=1, output=tmp_path / "shapes")
    frame = made.frame()
    assert set(frame["label"]) <= {"circle", "square"}
    assert all(len(each) == 1 for each in frame["top_labels"])
    assert np.array_equal(made.embeddings, whole.embeddings)
    assert open_dataset(tmp_path / "shapes").ids == whole.ids
    with pytest.raises(ConfigError):
        whole.relabel(["a"], output=Path(whole.url) / "inside")


def test_a_notebook_shows_thumbnails_and_escapes_texts(tmp_path: Path) -> None:
    scene = jpeg(sample(11, 0), 64, 64)
    with embed([scene, b"bad"], ids=["<script>alert(1)</script>", "b'\""], labels=["<b>x"], **QUICK) as made:
        page, found = made._repr_html_(), made.search("x")._repr_html_()
        assert page.count("data:image/jpeg;base64,") == found.count("data:image/jpeg;base64,") == 1
        for html in (page, found):
            assert "<script" not in html
            assert "<b>x" not in html
            assert len(html) < 20_000
        assert "not_an_image" in page
        assert "2 rows" in repr(made)
        Path(tmp_path / "page.html").write_text(page)


def test_the_bar_is_shown_and_nothing_else(photos: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    embed(photos[:2], **{**QUICK, "progress": True})
    bar = capfd.readouterr()
    assert "2/2" in bar.err
    assert "\n" not in bar.err.strip()
    embed(photos[:2], **QUICK)
    quiet = capfd.readouterr()
    assert (bar.out, quiet.out, quiet.err) == ("", "", "")


def test_web_addresses_that_are_handed_over_are_fetched_and_private_hosts_are_not() -> None:
    with embed(["http://127.0.0.1:9/x.jpg"], **QUICK) as made:
        assert made.failures["status"].tolist() == ["address_not_allowed"]


def test_importing_the_package_imports_nothing_yet() -> None:
    imported = "import sys, pipeline; print([name for name in sys.modules if name.startswith('pipeline')])"
    assert run_python("-c", imported).stdout == "['pipeline']\n"
    assert loads("import pipeline; pipeline.embed", "torch", "hydra", "pandas") == []


def test_the_package_exports_the_names_it_lists() -> None:
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    assert {*pipeline.__all__} <= {*dir(pipeline)}
    assert issubclass(ConfigError, PipelineError)
    assert all(getattr(pipeline, name).__doc__ for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'embeds'"):
        _ = pipeline.embeds


def test_a_manifest_that_was_written_is_sound(photos: list[Path], tmp_path: Path) -> None:
    embed([*photos[:3]], ids=[3, 1, 2], output=tmp_path / "out", **QUICK)
    [written] = tmp_path.glob("out.*.parquet")
    table = pq.read_table(written)
    assert table["id"].to_pylist() == [3, 1, 2]
    assert table["path"].to_pylist() == [str(path) for path in photos[:3]]


def test_a_column_by_itself_is_a_list(photos: list[Path], tmp_path: Path) -> None:
    paths = [str(path) for path in photos[:2]]
    wanted = [*paths, None]
    for images in (pd.Series(wanted), pd.Series([*paths, np.nan]), pa.array(wanted), pa.chunked_array([wanted])):
        given = manifest_of(images, Columns(None, None, (), ["a", "b", "c"], None), tmp_path / "m.parquet")
        assert pq.read_table(given.written)["path"].to_pylist() == wanted
    with embed(pd.Series(paths), ids=pa.array([4, 2]), **QUICK) as made:
        assert made.ids == [4, 2]


def test_columns_may_have_numbers_for_names(photos: list[Path]) -> None:
    frame = pd.DataFrame([["x", str(photos[0]), 5], ["y", str(photos[1]), 6]])
    with embed(frame, id=0, image=1, keep=[2], **QUICK) as made:  # type: ignore[arg-type, list-item]
        assert made.ids == ["x", "y"]
        assert made.counts == {"ok": 2}
        assert made.frame(["2"])["2"].tolist() == [5, 6]


def test_a_relative_output_is_resolved_once(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made, opened = embed(photos[:2], output="out", **QUICK), open_dataset("out")
    other = made.relabel(["a", "b"], output="other")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for dataset, name in ((made, "out"), (opened, "out"), (other, "other")):
        assert dataset.url == str(tmp_path / name)
        assert len(dataset.embeddings) == 2
    number: Any = np.int64(1)
    assert other.search(id=str(photos[0]), top=number)[0].id == str(photos[1])


def test_an_output_lies_beside_the_images(photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "ph"
    folder.mkdir()
    for photo in photos[:2]:
        (folder / photo.name).write_bytes(photo.read_bytes())
    for output in (folder / "out", folder):
        with pytest.raises(ConfigError, match="lies in the folder of images"):
            embed(folder, output=output, **QUICK)
    # A list names its images.
    embed([folder / photos[0].name], output=folder / "out", **QUICK)
    assert len([*folder.glob("out.*.parquet")]) == 1
    with embed(folder, **QUICK) as made:
        assert made.ids == [photo.name for photo in photos[:2]]


def test_a_manifest_beside_an_output_is_removed_if_no_dataset_was_begun(photos: list[Path], tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = [
        {"ids": [1, 1]},
        {"model": tmp_path},
        {"keep": ["status"]},
        {"settings": {"prompts.path": str(tmp_path / "gone.csv")}},
    ]
    for arguments in calls:
        images: Any = pd.DataFrame({"path": photos[:2], "status": [1, 2]}) if "keep" in arguments else photos[:2]
        with pytest.raises(PipelineError):
            embed(images, output=tmp_path / "out", **{**QUICK, **arguments})
        assert not [*tmp_path.glob("*.parquet")], arguments


def test_an_output_in_memory_writes_no_file(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = embed(photos[:2], output="memory://ds1", **QUICK)
    assert made.counts == {"ok": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    for bucket in ("s3://bucket", "s3://bucket/"):
        with pytest.raises(ConfigError, match="s3://bucket/dataset"):
            embed(photos[:2], output=bucket, **QUICK)


def test_a_child_that_was_forked_leaves_the_folder(tmp_path: Path) -> None:
    place = Scratch()
    code = os.fork()
    if not code:
        place.close()
        os._exit(0)
    os.waitpid(code, 0)
    assert place.path.is_dir()
    place.close()
    assert not place.path.exists()


def test_texts_of_settings_are_not_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    labels = ["${oc.env:SECRET}", "???", "${", "\\${a}"]
    config = config_from({"prompts.labels": labels, "prompts.templates": ["${a} {}"], "model.name": "a/${b}"})
    assert config.prompts.labels == labels
    assert config.prompts.templates == ["${a} {}"]
    assert config.model.name == "a/${b}"
    assert config_from({"model.name": "???"}).model.name == "???"
    assert config_from({"loader.batch_size": np.int64(8), "labels.threshold": np.float32(0.5)}).loader.batch_size == 8
    for key in ("labels.top_k", "loader.batch_size", "backend.name", "prompts.templates"):
        with pytest.raises(ConfigError) as caught:
            config_from({key: "${oc.env:SECRET}"})
        assert [(each.key, each.value) for each in caught.value.problems] == [(key, "${oc.env:SECRET}")]


def test_text_that_is_no_utf_8_is_refused_everywhere(photos: list[Path], tmp_path: Path) -> None:
    settings: dict[str, object] = {"metrics.job": "a\udcff", "prompts.labels": ["b", "c\udcff"]}
    with pytest.raises(ConfigError) as caught:
        config_from({**settings, "model.name": "d\udcff"})
    assert [each.key for each in caught.value.problems] == ["model.name", "prompts.labels", "metrics.job"]
    assert str(caught.value).encode()
    with pytest.raises(ConfigError, match=r"output\.dir.*no UTF-8"):
        embed(photos[:1], output=tmp_path / "o\udcff", **QUICK)


def test_an_error_of_the_callers_iterator_is_raised_unchanged(tmp_path: Path) -> None:
    def images() -> Iterator[bytes]:
        yield b"x"
        raise FileNotFoundError("mine")

    with pytest.raises(FileNotFoundError, match="mine"):
        embed(images(), **QUICK)
    for place in range(70):
        (tmp_path / f"{place}.txt").touch()

    def files() -> Iterator[bytes]:
        yield from (path.read_bytes() for path in [*sorted(tmp_path.glob("*.txt")), tmp_path / "gone"])

    with pytest.raises(FileNotFoundError, match="gone"):
        embed(files(), **QUICK)


def test_images_of_a_folder_that_is_not_there_are_rows() -> None:
    with embed(["/gone-away/x.png"], **QUICK) as made:
        assert made.counts == {"ok": 0, "not_found": 1}


def test_a_closed_dataset_raises(photos: list[Path]) -> None:
    made = embed(photos[:1], **QUICK)
    assert len(made.embeddings) == 1
    made.close()
    calls: list[Callable[[], object]] = [
        *(partial(getattr, made, name) for name in ("url", "embeddings", "ids", "counts", "report", "failures")),
        *(made.matrix, made.frame, lambda: len(made), lambda: made.search("a"), lambda: made.relabel(["a"])),
    ]
    for call in calls:
        with pytest.raises(NoDataset, match="was closed"):
            call()
    assert "closed" in repr(made)
    assert "closed" in made._repr_html_()


def test_calls_in_several_threads_run_one_after_another(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    def job(config: Config, options: RunOptions) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        raise NoDataset("enough")

    monkeypatch.setattr("pipeline.job.main.run_job", job)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(embed, photos[:1], **QUICK) for _ in range(4)]
    assert {str(each.exception()) for each in done} == {"enough"}
    assert most == 1
