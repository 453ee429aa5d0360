"""The artefact store: every artefact is complete and unchanged, and no temporary files stay."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import main
from pipeline.backends.artifacts.store import Artifact, ArtifactStore, Recipe
from pipeline.core.errors import ArtifactError, StorageError

RECIPE = Recipe(
    kind="onnx-image",
    model={"name": "demo", "revision": "main", "fingerprint": {"weights": "aa", "config": "bb"}},
    options={"opset": 18, "precision": "fp32", "shape": (8, 3, 224, 224)},
    versions={"torch": "2.11", "onnx": "1.20"},
)
DAY = timedelta(days=1)
BYTES = bytes(range(256)) * 100


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def build(folder: Path) -> Mapping[str, Any]:
    (folder / "model.onnx").write_bytes(BYTES)
    (folder / "cache").mkdir()
    (folder / "cache" / "engine.bin").write_bytes(b"engine")
    return {"parity": {"lowest": 0.9999}, "facts": {"dim": 512}}


def refuse(folder: Path) -> Mapping[str, Any]:
    raise AssertionError("built again")


def names(store: ArtifactStore) -> list[str]:
    return sorted(os.listdir(store.root))


def edit(artifact: Artifact, change: Callable[[dict[str, Any]], Any]) -> None:
    card = json.loads((artifact.path / "card.json").read_text())
    change(card)
    (artifact.path / "card.json").write_text(json.dumps(card))


def age(artifact: Artifact, days: float) -> None:
    moment = time.time() - days * 86_400
    os.utime(artifact.path / "card.json", (moment, moment))


def test_made_once_then_found(store: ArtifactStore) -> None:
    assert store.find(RECIPE) is None
    made = store.make(RECIPE, build)
    again = store.make(RECIPE, refuse)
    found = ArtifactStore(store.root).find(RECIPE)
    assert made == again == found
    assert made.path.name == made.fingerprint == RECIPE.fingerprint
    assert made.file("cache/engine.bin").read_bytes() == b"engine"
    assert made.size == len(BYTES) + 6
    assert made.card["parity"] == {"lowest": 0.9999}
    assert made.card["model"] == RECIPE.model
    assert made.card["options"]["shape"] == [8, 3, 224, 224]
    assert made.card["created"].endswith("+00:00")
    assert names(store) == [RECIPE.fingerprint]
    assert store.problems(made) == []


@pytest.mark.parametrize(
    "other",
    [
        replace(RECIPE, kind="onnx-text"),
        replace(RECIPE, model={**RECIPE.model, "revision": "v2"}),
        replace(RECIPE, model={**RECIPE.model, "fingerprint": {"weights": "ab", "config": "bb"}}),
        replace(RECIPE, options={**RECIPE.options, "opset": 19}),
        replace(RECIPE, options={**RECIPE.options, "opset": "18"}),
        replace(RECIPE, options={**RECIPE.options, "opset": True}),
        replace(RECIPE, options={**RECIPE.options, "shape": (8, 3, 224, 225)}),
        replace(RECIPE, options={**RECIPE.options, "dynamic": None}),
        replace(RECIPE, versions={**RECIPE.versions, "onnx": "1.21"}),
        replace(RECIPE, options=RECIPE.versions, versions={}),
    ],
)
def test_whatever_counts_makes_another_artefact(store: ArtifactStore, other: Recipe) -> None:
    first = store.make(RECIPE, build)
    assert store.find(other) is None
    assert store.make(other, build).path != first.path


def test_names_and_order_do_not_count() -> None:
    turned = dict(reversed(RECIPE.options.items())) | {"shape": [8, 3, 224, 224]}
    assert replace(RECIPE, model={**RECIPE.model, "name": "copy"}, options=turned).fingerprint == RECIPE.fingerprint


@pytest.mark.parametrize(
    "value", [float("nan"), object(), {1: "a"}, b"bytes", Path("x")], ids=["nan", "object", "int key", "bytes", "path"]
)
def test_a_recipe_that_is_not_plain_json_is_refused(value: object) -> None:
    with pytest.raises(ArtifactError, match="recipe of onnx-image, options, x"):
        _ = replace(RECIPE, options={"x": value}).fingerprint
    with pytest.raises(ArtifactError, match="no model fingerprint"):
        _ = replace(RECIPE, model={"name": "demo", "revision": "main"}).fingerprint


@pytest.mark.parametrize("error", [ValueError("shapes"), KeyboardInterrupt(), OSError(5, "broken")], ids=repr)
def test_a_build_that_fails_leaves_nothing_and_its_error_goes_on(store: ArtifactStore, error: BaseException) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        build(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        store.make(RECIPE, fail)
    assert caught.value is error
    assert names(store) == []
    assert store.make(RECIPE, build).size


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: {}, "wrote no file"),
        (lambda folder: {**build(folder), "size": 1, "kind": 2}, "own kind, size"),
        (lambda folder: {**build(folder), "facts": object()}, "the facts, facts"),
        (lambda folder: ((folder / "card.json").touch(), build(folder))[1], "card itself"),
        (lambda folder: ((folder / "model").symlink_to("/etc/hosts"), build(folder))[1], "link to /etc/hosts"),
    ],
)
def test_what_is_no_artefact_is_not_published(
    store: ArtifactStore, spoil: Callable[[Path], Mapping[str, Any]], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        store.make(RECIPE, spoil)
    assert names(store) == []


def test_full_and_unwritable_disks_are_named(store: ArtifactStore, tmp_path: Path) -> None:
    def fill(folder: Path) -> Mapping[str, Any]:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(BYTES)
        return {}

    if os.path.exists("/dev/full"):
        with pytest.raises(StorageError, match=f"{store.root}: No space left"):
            store.make(RECIPE, fill)
        assert names(store) == []
    (tmp_path / "file").touch()
    for action in (lambda s: s.make(RECIPE, build), lambda s: s.artifacts()):
        with pytest.raises(StorageError, match="file"):
            action(ArtifactStore(tmp_path / "file"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link_away(path: Path, place: Path) -> None:
    path.symlink_to(path.rename(place / "away"))


DAMAGES: list[tuple[str, Callable[[Artifact], Any], str]] = [
    ("one bit", lambda a: flip(a.path / "model.onnx"), "model.onnx: its content changed"),
    ("one bit below", lambda a: flip(a.path / "cache" / "engine.bin"), "cache/engine.bin: its content changed"),
    ("cut", lambda a: os.truncate(a.path / "model.onnx", 5), "model.onnx: 5 bytes, expected 25,600"),
    ("missing", lambda a: (a.path / "model.onnx").unlink(), "model.onnx: missing"),
    ("planted", lambda a: (a.path / "weights.data").touch(), "weights.data: the card names no such file"),
    ("planted below", lambda a: (a.path / "cache" / "x").touch(), "cache/x: the card names no such file"),
    ("link out", lambda a: (a.path / "extra").symlink_to("/etc"), "extra: a link to /etc"),
    ("pipe", lambda a: os.mkfifo(a.path / "pipe"), "pipe: neither"),
    ("parity", lambda a: edit(a, lambda c: c["parity"].update(lowest=1.0)), "card.json: changed since"),
    ("options", lambda a: edit(a, lambda c: c["options"].update(opset=17)), "card.json: another recipe"),
    ("deep", lambda a: edit(a, lambda c: c.update(model={"fingerprint": eval("[" * 90 + "]" * 90)})), "another recipe"),
    ("traversal", lambda a: edit(a, lambda c: c["files"].update({"../x": c["files"]["model.onnx"]})), "../x: a name"),
    ("absolute", lambda a: edit(a, lambda c: c["files"].update({"/x": c["files"]["model.onnx"]})), "/x: a name"),
    ("other type", lambda a: edit(a, lambda c: c.update(files=["model.onnx"])), "card.json: files is"),
    ("other entry", lambda a: edit(a, lambda c: c["files"].update(x=5)), "card.json: the entry of x"),
    ("no key", lambda a: edit(a, lambda c: c.pop("created")), "card.json: no created"),
    ("not an object", lambda a: (a.path / "card.json").write_text("[]"), "card.json: not a JSON object"),
    ("too deep", lambda a: (a.path / "card.json").write_text("[" * 100_000), "card.json: not JSON"),
    ("not JSON", lambda a: (a.path / "card.json").write_bytes(b"\xff{"), "card.json: not JSON"),
    ("card a link", lambda a: link_away(a.path / "card.json", a.path.parents[1]), "card.json: not a plain file"),
    ("no card", lambda a: (a.path / "card.json").unlink(), "card.json: missing"),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_artefact_is_named_removed_and_made_anew(
    store: ArtifactStore,
    damage: Callable[[Artifact], Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = store.make(RECIPE, build)
    store.pin(made)
    damage(made)
    assert any(message in problem for problem in store.problems(made))
    assert main(["--store", str(store.root), "verify"]) == 1
    assert message in capsys.readouterr().out
    store.artifacts(), store.prune(older_than=DAY)
    assert made.path.exists(), "a pinned artefact is never pruned"
    with caplog.at_level(logging.WARNING):
        assert store.find(RECIPE) is None
    assert RECIPE.fingerprint[:12] in caplog.text
    assert message in caplog.text
    assert not made.path.exists()
    again = store.make(RECIPE, build)
    assert store.problems(again) == []
    assert store.pinned(again)
    assert names(store) == [RECIPE.fingerprint, f"{RECIPE.fingerprint}.pin"]


def test_a_folder_that_became_a_link_is_not_used_and_its_target_stays(store: ArtifactStore, tmp_path: Path) -> None:
    link_away(store.make(RECIPE, build).path, tmp_path)
    assert store.find(RECIPE) is None
    assert (tmp_path / "away" / "model.onnx").read_bytes() == BYTES


def test_only_files_that_the_card_names_are_handed_out(store: ArtifactStore, tmp_path: Path) -> None:
    made = store.make(RECIPE, build)
    entry = made.card["files"]["model.onnx"]
    with pytest.raises(ArtifactError, match=r"no file 'x'.*cache/engine.bin, model.onnx"):
        made.file("x")
    (made.path / "out").symlink_to(tmp_path)
    for name in ("../x", "/etc/hosts", "out", "./model.onnx", "card.json"):
        with pytest.raises(ArtifactError, match="leaves the artefact's folder"):
            Artifact(path=made.path, card={"files": {name: entry}}).file(name)


def test_writers_of_other_machines_are_given_up_after_a_day(store: ArtifactStore) -> None:
    made = store.make(RECIPE, build)
    foreign = store.root / f"{RECIPE.fingerprint}.tmp-other-host-0123"
    foreign.mkdir()
    store.prune(older_than=DAY)
    assert foreign.exists()
    os.utime(foreign, (0, time.time() - 90_000))
    store.prune(older_than=DAY)
    assert names(store) == [made.path.name]


def test_prune_takes_the_unused_and_the_damaged_but_nothing_pinned_or_foreign(store: ArtifactStore) -> None:
    old, new, pinned, broken, found = (
        store.make(replace(RECIPE, options={"number": number}), build) for number in range(5)
    )
    assert store.artifacts() == [found, broken, pinned, new, old]
    for artifact in (old, pinned, found):
        age(artifact, days=31)
    store.find(replace(RECIPE, options={"number": 4}))
    store.pin(pinned)
    (broken.path / "card.json").write_text("{")
    for foreign in ("a" * 64, "notes", "README"):
        (store.root / foreign).mkdir()
    before = names(store)
    expected = {old.path, broken.path}
    assert {artifact.path for artifact in store.prune(older_than=30 * DAY, dry=True)} == expected
    assert names(store) == before
    assert {artifact.path for artifact in store.prune(older_than=30 * DAY)} == expected
    assert set(before) - set(names(store)) == {path.name for path in expected}
    store.unpin(pinned)
    assert [artifact.path for artifact in store.prune(older_than=30 * DAY)] == [pinned.path]
    assert {path.name for path in store.root.iterdir()} >= {"a" * 64, "notes", "README"}


def test_notes_replace_their_key_and_the_oldest_go(store: ArtifactStore) -> None:
    made = store.make(RECIPE, build)
    for number in range(24):
        store.note(made, f"job-{number}", {"lowest": 0.99})
    store.note(made, "job-5", {"lowest": 0.5})
    found = store.find(RECIPE)
    assert found is not None
    assert list(found.card["gates"]) == [f"job-{n}" for n in (4, *range(6, 24), 5)]
    assert found.card["gates"]["job-5"] == {"lowest": 0.5}
    assert names(store) == [RECIPE.fingerprint]
    with pytest.raises(ArtifactError, match="'bad'"):
        store.note(made, "bad", {"lowest": float("nan")})
    edit(made, lambda card: card["parity"].update(lowest=1.0))
    with pytest.raises(ArtifactError, match="changed since"):
        store.note(made, "job-1", {})
    assert "changed since" in str(store.problems(made)), "a note does not seal a changed card"


def test_an_artefact_is_chosen_by_the_start_of_its_id(store: ArtifactStore) -> None:
    made = [store.make(replace(RECIPE, options={"number": number}), build) for number in range(17)]
    assert store.choose(made[3].fingerprint[:12].upper()) == made[3]
    starts = [artifact.fingerprint[0] for artifact in made]
    twice = next(digit for digit in starts if starts.count(digit) > 1)
    for prefix, message in ((twice, "several"), ("g", "no artefact"), ("", "no artefact")):
        with pytest.raises(ArtifactError, match=message) as caught:
            store.choose(prefix)
        assert all(a.fingerprint[:12] in str(caught.value) for a in made if a.fingerprint.startswith(prefix))
