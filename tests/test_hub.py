"""Where a checkpoint's files come from. The hub itself is out of reach of tests, so its client is replaced."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ModelError
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.hub import DEMO_FOLDER, find_folder

NAME = "someone/clip"


@dataclass
class Discussion:
    num: int
    title: str = "Adding `safetensors` variant of this model"
    status: str = "open"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub where ``main`` has no safetensors and a pull request of the hub's bot has them."""
    main = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "main", ignore=shutil.ignore_patterns("*.safetensors")))
    asked: list[str | None] = []
    state: dict[str, Any] = {"asked": asked, "discussions": [Discussion(3, status="closed"), Discussion(7)]}

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == NAME
        assert "model.safetensors" in allow_patterns
        assert not any("*" in pattern for pattern in allow_patterns), "a second file of weights is not downloaded"
        assert not any(pattern.endswith((".bin", ".py", ".pt", ".pkl")) for pattern in allow_patterns)
        asked.append(revision)
        return str(DEMO_FOLDER if revision in ("refs/pr/7", "v2") else main)

    def get_repo_discussions(name: str, *, author: str, discussion_type: str) -> list[Discussion]:
        assert (name, author, discussion_type) == (NAME, "SFconvertbot", "pull_request")
        return list(state["discussions"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_repo_discussions", get_repo_discussions)
    return state


def test_a_checkpoint_without_safetensors_takes_the_hub_s_conversion(hub: dict[str, Any]) -> None:
    assert find_folder(ModelConfig(name=NAME)) == DEMO_FOLDER
    assert hub["asked"] == [None, "refs/pr/7"]


def test_a_clip_of_sentence_transformers_is_downloaded_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        (tmp_path / "modules.json").write_text("[]")
        if "0_CLIPModel/config.json" in allow_patterns:
            shutil.copytree(DEMO_FOLDER, tmp_path / "0_CLIPModel")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_folder(ModelConfig(name=NAME)) == tmp_path
    assert asked[1] == [f"0_CLIPModel/{name}" for name in asked[0]]
    assert len(asked) == 2


def test_a_pinned_revision_is_taken_as_it_is(hub: dict[str, Any]) -> None:
    assert find_folder(ModelConfig(name=NAME, revision="v2")) == DEMO_FOLDER
    assert hub["asked"] == ["v2"]
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        open_checkpoint(ModelConfig(name=NAME, revision="v1"))


def test_without_a_conversion_the_way_out_is_named(hub: dict[str, Any]) -> None:
    hub["discussions"] = [Discussion(7, title="Please run my code")]
    with pytest.raises(ModelError, match=r"model\.revision=.*save_pretrained"):
        open_checkpoint(ModelConfig(name=NAME))


def test_random_weights_need_no_weights_file(hub: dict[str, Any]) -> None:
    assert open_checkpoint(ModelConfig(name=NAME, weights="random")).dim == 128
    assert hub["asked"] == [None]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", "~/nowhere"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        find_folder(ModelConfig(name=name))


def test_a_name_that_cannot_be_is_explained() -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        find_folder(ModelConfig(name="no spaces allowed"))


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="the Hugging Face hub did not give it") as caught:
        find_folder(ModelConfig(name="openai/clip-vit-base-patch32"))
    assert "model.weights=random" in str(caught.value)
