"""Labels that are given to ``embed`` and ``Dataset.relabel``: texts, prompts of their own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.api.config import label_settings, prompts_of
from pipeline.api.embed import embed, open_dataset
from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ConfigError, PromptsError
from pipeline.engine.demo.folder import jpeg
from pipeline.engine.demo.scenes import sample
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.text import embed_prompts
from tests.test_api import QUICK

PROMPTS: dict[str, Any] = {"circle": ["a red circle", "a blue circle"], "no": "a {} star", "red star": None}
FILLED = [("a red circle", "a blue circle"), ("a no star",), ("a photo of a red star",)]
PICTURES = [jpeg(sample(5, number), 64, 64) for number in range(3)]


@pytest.mark.parametrize("wrong", [None, float("nan"), b"cat", 1, 1.5, True, ["cat"], np.int64(3), pd.NA, Path("cat")])
@pytest.mark.parametrize("form", [list, tuple, lambda labels: pd.Series(labels, dtype=object), dict.fromkeys])
def test_a_label_that_is_no_text_is_refused_with_its_place(form: Any, wrong: Any) -> None:
    if form == dict.fromkeys and isinstance(wrong, list):
        pytest.skip("no key of a mapping")
    labels = form(["dog", wrong])
    with pytest.raises(ConfigError, match=r"labels\[1\] = .*must be a text"):
        embed(PICTURES, labels=labels, **QUICK)


@pytest.mark.parametrize("labels", [{"cat", "dog"}, frozenset(["cat"]), b"cat", 3, float("nan")])
def test_labels_without_an_order_or_a_list_are_refused(labels: Any) -> None:
    with pytest.raises(ConfigError, match="must be a list of texts"):
        embed(PICTURES, labels=labels, **QUICK)


@pytest.mark.parametrize("form", [list, tuple, np.array, pd.Series, pd.Categorical, iter, dict.fromkeys, pd.Index])
def test_every_sequence_of_texts_is_taken(form: Any) -> None:
    labels = form(["dog", "cat"])
    prompts = prompts_of(labels)
    found = label_settings(labels if prompts is None else [*prompts], None)["prompts.labels"]
    assert found == ["dog", "cat"]
    assert all(type(label) is str for label in found)  # type: ignore[attr-defined]


@pytest.mark.parametrize("prompt", [3, [], [3], ["a cat", None], {"a": "b"}, b"a cat", float("nan"), {"a cat"}])
def test_prompts_that_are_no_texts_are_refused_with_their_label(prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"labels\['cat'\] = .*must be a prompt, a list of prompts, or None"):
        embed(PICTURES, labels={"dog": "a dog", "cat": prompt}, **QUICK)


def expected(embeddings: np.ndarray) -> list[str]:
    features = embed_prompts(open_checkpoint(ModelConfig()), FILLED)
    return [list(PROMPTS)[place] for place in (embeddings.astype(np.float32) @ features.T).argmax(axis=1)]


def test_a_mapping_keeps_its_prompts_in_embed_and_relabel(tmp_path: Path) -> None:
    with embed(PICTURES, labels=PROMPTS, **QUICK) as made:
        frame, wanted = made.frame(), expected(made.embeddings)
        assert frame["label"].tolist() == wanted
    stored = embed(PICTURES, labels=["cat", "dog"], output=tmp_path / "dataset", **QUICK)
    assert stored.relabel(PROMPTS).frame()["label"].tolist() == wanted
    kept = stored.relabel(PROMPTS, output=tmp_path / "new")
    assert kept.frame()["label"].tolist() == wanted


@pytest.mark.slow
def test_a_mapping_is_kept_beside_the_output_and_the_same_call_resumes(tmp_path: Path) -> None:
    for _ in range(2):
        made = embed(PICTURES, labels=PROMPTS, output=tmp_path / "dataset", **QUICK)
        [file] = tmp_path.glob("dataset.*.yaml")
        assert made.frame()["label"].tolist() == expected(made.embeddings)
    assert len(open_dataset(tmp_path / "dataset")) == 3
    with pytest.raises(PromptsError, match="have the same prompts"):
        embed(PICTURES, labels={"a": "x", "b": "x"}, output=tmp_path / "other", **QUICK)
    assert list(tmp_path.glob("*.yaml")) == [file], "nothing is left of a call that was refused"


def test_a_mapping_wants_a_local_output() -> None:
    with pytest.raises(ConfigError, match="must be local"):
        embed(PICTURES, labels=PROMPTS, output="memory://here/dataset", **QUICK)
