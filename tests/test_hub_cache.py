"""Checkpoints in the hub's cache run without a network, and with one that is dead, in every way they lie there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from pipeline.config.schema import ModelConfig, conf_dir
from pipeline.core.errors import ModelError
from pipeline.models import hub
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.files import INDEX, OPEN_CLIP_CONFIG, WEIGHTS, is_open_clip
from pipeline.models.hub import DEMO_FOLDER, find_cached, find_folder, find_weights
from tests.forks import forks
from tests.processes import run_python
from tests.test_malformed_checkpoints import shards

NAME = "someone/clip"
PUBLISHED = sorted(
    name
    for path in (conf_dir() / "model").glob("*.yaml")
    if "/" in (name := str(yaml.safe_load(path.read_text()).get("name")))
)
OTHERS = [path.name for path in sorted(DEMO_FOLDER.iterdir()) if path.name != WEIGHTS]


class Cache:
    """The hub's cache as its client lays it out: blobs by digest, links to them by commit, commits by revision."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, name: str, revision: str, *paths: Path, tree: tuple[str, ...] = ()) -> Path:
        """Put files into a revision; ``tree`` are further files that the hub lists."""
        place = self.root / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(f"{name}{revision}".encode()).hexdigest()
        snapshot, ref = place / "snapshots" / commit, place / "refs" / revision
        for folder in (snapshot, ref.parent, place / "blobs"):
            folder.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        for path in paths:
            blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
        if tree:
            listed = [*(path.name for path in paths), *tree]
            entry = {"size": 1, "blob_id": "0" * 40, "lfs_sha256": None, "lfs_size": None, "xet_hash": None}
            (place / "trees").mkdir(exist_ok=True)
            (place / "trees" / f"{commit}.json").write_text(json.dumps({name: entry for name in listed}))
        return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Cache(tmp_path / "hub")


@pytest.fixture(params=["offline", "refused", pytest.param("silent", marks=pytest.mark.slow)])
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """HF_HUB_OFFLINE, a port where nobody listens, and one that takes a request and never answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if request.param == "silent" else 9
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{port}")
        yield


def files(*names: str) -> list[Path]:
    return [DEMO_FOLDER / name for name in names]


def whole(cache: Cache, name: str, folder: Path) -> None:
    cache.add(name, "main", *files(*OTHERS, WEIGHTS))


def listed(cache: Cache, name: str, folder: Path) -> None:
    """As the client of today, which knows that the hub has more files."""
    more = ("pytorch_model.bin", "onnx/config.json", "open_clip_config.json", "model.fp16.safetensors")
    cache.add(name, "main", *files(*OTHERS, WEIGHTS), tree=more)


def conversion(cache: Cache, name: str, folder: Path) -> None:
    cache.add(name, "main", *files(*OTHERS))
    cache.add(name, "refs/pr/19", *files(*OTHERS, WEIGHTS))


def in_the_form_of_open_clip(cache: Cache, name: str, folder: Path) -> None:
    made = [folder / OPEN_CLIP_CONFIG, folder / hub.OPEN_CLIP_WEIGHTS[0]]
    for path in made:
        path.write_text("{}")
    cache.add(name, "main", *made)


def conversion_beside_a_pickle(cache: Cache, name: str, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    cache.add(name, "main", *files(*OTHERS), folder / "pytorch_model.bin", tree=("flax_model.msgpack",))
    cache.add(name, "refs/pr/3", *files("config.json"))
    cache.add(name, "refs/pr/19", *files(*OTHERS, WEIGHTS), tree=("pytorch_model.bin",))


def weights_alone(cache: Cache, name: str, folder: Path) -> None:
    """As transformers' own client leaves them: of the conversion, it takes the weights only."""
    cache.add(name, "main", *files(*OTHERS))
    cache.add(name, "refs/pr/19", *files(WEIGHTS))


def in_shards(cache: Cache, name: str, folder: Path) -> None:
    copy = Path(shutil.copytree(DEMO_FOLDER, folder / "copy"))
    shards(copy)
    cache.add(name, "main", *files(*OTHERS), *copy.glob("model*"))


def shards_alone(cache: Cache, name: str, folder: Path) -> None:
    copy = Path(shutil.copytree(DEMO_FOLDER, folder / "copy"))
    shards(copy)
    cache.add(name, "main", *files(*OTHERS))
    cache.add(name, "refs/pr/2", *copy.glob("model*"))


def of_sentence_transformers(cache: Cache, name: str, folder: Path) -> None:
    (folder / "modules.json").write_text('[{"path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]')
    place = cache.add(name, "main", folder / "modules.json")
    shutil.copytree(DEMO_FOLDER, place / "0_CLIPModel")


WAYS = (
    *(whole, listed, conversion, conversion_beside_a_pickle, weights_alone, in_shards, shards_alone),
    of_sentence_transformers,
)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_is_in_the_cache_opens_without_a_network(cache: Cache, tmp_path: Path, way: Any) -> None:
    way(cache, NAME, tmp_path)
    began = time.monotonic()
    checkpoint = open_checkpoint(ModelConfig(name=NAME))
    assert checkpoint.dim == 128
    demo = open_checkpoint(ModelConfig())
    assert {**checkpoint.fingerprint, "weights": None} == {**demo.fingerprint, "weights": None}
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_checkpoint_is_found_in_the_cache(cache: Cache, tmp_path: Path, name: str) -> None:
    config, theirs = ModelConfig(name=name), name.startswith(hub.OPEN_CLIP_PREFIX)
    (in_the_form_of_open_clip if theirs else conversion)(cache, hub.hub_id(config), tmp_path)
    weights = hub.OPEN_CLIP_WEIGHTS[0] if theirs else WEIGHTS
    assert (find_weights(config, find_folder(config)) / weights).is_file()


@pytest.mark.usefixtures("_no_network")
def test_of_two_forms_in_one_repository_the_prefix_of_open_clip_wants_its_own(cache: Cache, tmp_path: Path) -> None:
    whole(cache, NAME, tmp_path)
    plain, theirs = ModelConfig(name=NAME), ModelConfig(name=f"hf-hub:{NAME}")
    assert find_cached(plain) is not None
    assert find_cached(theirs) is None
    in_the_form_of_open_clip(cache, NAME, tmp_path)
    folder = find_folder(theirs)
    assert find_folder(plain) == folder
    assert not is_open_clip(folder)
    assert {WEIGHTS, INDEX} & {*hub.wanted_files(theirs)} == set()
    assert {*hub.wanted_files(theirs)} & {*hub.OPEN_CLIP_WEIGHTS} == {*hub.OPEN_CLIP_WEIGHTS[:2]}
    (folder / "config.json").unlink()
    assert is_open_clip(folder), "a config of transformers would be beside weights of it"


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    ("main", "pull_requests"),
    [
        ((), {}),
        (("config.json",), {}),
        (OTHERS, {}),
        (OTHERS, {"refs/pr/4": ("config.json",)}),
        ((), {"refs/pr/4": (WEIGHTS,)}),
    ],
)
def test_what_is_not_whole_in_the_cache_is_one_message(
    cache: Cache, main: tuple[str, ...], pull_requests: dict[str, tuple[str, ...]]
) -> None:
    for revision, names in {"main": main, **pull_requests}.items():
        if names:
            cache.add(NAME, revision, *files(*names))
    with pytest.raises(ModelError) as caught:
        open_checkpoint(ModelConfig(name=NAME))
    assert "\n" not in str(caught.value)
    assert NAME in str(caught.value)
    assert "copy the checkpoint's folder there" in str(caught.value)


@pytest.mark.usefixtures("_no_network")
def test_weights_of_several_pull_requests_are_a_choice(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache.add(NAME, "main", *files(*OTHERS))
    for number in (3, 19):
        cache.add(NAME, f"refs/pr/{number}", *files(*OTHERS, WEIGHTS))
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError):
        open_checkpoint(ModelConfig(name=NAME))
    assert "model.revision=refs/pr/19 or refs/pr/3" in caplog.text
    assert open_checkpoint(ModelConfig(name=NAME, revision="refs/pr/3")).dim == 128


@pytest.mark.usefixtures("_no_network")
def test_a_pull_request_of_another_config_is_no_conversion(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    cache.add(NAME, "main", *files(*OTHERS))
    cache.add(NAME, "refs/pr/3", *files(WEIGHTS), tmp_path / "config.json")
    assert find_cached(ModelConfig(name=NAME)) is None


@pytest.mark.usefixtures("_no_network")
def test_random_weights_need_the_config_alone(cache: Cache) -> None:
    cache.add(NAME, "main", *files(*OTHERS))
    assert open_checkpoint(ModelConfig(name=NAME, weights="random")).dim == 128


def test_a_missing_shard_in_the_cache_is_not_whole(cache: Cache, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))
    shards(copy)
    cache.add(NAME, "main", *files(*OTHERS), copy / INDEX, copy / "model-00001-of-00003.safetensors")
    assert find_cached(ModelConfig(name=NAME)) is None


NETWORKS: dict[str, dict[str, str]] = {
    "offline": {"HF_HUB_OFFLINE": "1"},
    "refused": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    "dead proxy": {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
}


def command(tmp_path: Path, network: str, *arguments: str) -> tuple[int, str]:
    """The exit code of ``python -m pipeline.run`` over a few scenes, and what it says."""
    overrides = (*arguments, "manifest.demo_scenes=8", f"output.dir={tmp_path / 'out'}", "report.html=false")
    environment = {"HF_HOME": str(tmp_path / "home"), **NETWORKS[network]}
    child = forks().start("tests.forks:run_command", *overrides, environment=environment)
    return child.wait(), child.said()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "network"), [(conversion, "offline"), (conversion, "dead proxy"), (weights_alone, "refused")]
)
def test_a_command_runs_from_the_cache(tmp_path: Path, way: Any, network: str) -> None:
    way(Cache(tmp_path / "home" / "hub"), "openai/clip-vit-base-patch32", tmp_path)
    labels = "prompts.labels=[red circle,blue star]"
    code, said = command(tmp_path, network, "model=clip_vit_b32", labels, "backend.device=cpu")
    assert code == 0, said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_a_command_whose_model_is_not_in_the_cache_ends_with_one_message(tmp_path: Path, network: str) -> None:
    code, said = command(tmp_path, network, "model=siglip_base")
    assert code == 2, said
    assert "Traceback" not in said
    assert "copy the checkpoint's folder there" in said


@pytest.mark.slow
def test_a_process_reads_where_the_cache_is_when_it_begins(tmp_path: Path) -> None:
    conversion(Cache(tmp_path / "home" / "hub"), "openai/clip-vit-base-patch32", tmp_path)
    code = (
        "from pipeline.config.schema import ModelConfig; from pipeline.models.hub import find_folder, find_weights; "
        "config = ModelConfig(name='openai/clip-vit-base-patch32'); print(find_weights(config, find_folder(config)))"
    )
    done = run_python("-c", code, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / WEIGHTS).is_file()
