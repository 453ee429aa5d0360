"""Heads: small models on embeddings, read from files, as columns of a job and of a relabelled dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pipeline import open_dataset, save_head
from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ConfigError, ModelError, NumericalError, PlanMismatch
from pipeline.dataset import dataset
from pipeline.dataset.commits import SUCCESS
from pipeline.dataset.saved_config import recipe_of
from pipeline.job.main import run_job
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.heads import read_head, read_heads, values_of
from pipeline.verify import main as verify
from tests.jobs import DAMAGED, config_for, scenes_manifest

ROWS, DIM = 60, 128


def head(folder: Path, name: str = "taste", *, tensors: dict[str, torch.Tensor] | None = None, **changed: Any) -> str:
    """A head of one linear layer over the demo's embeddings, with values of its JSON changed."""
    torch.manual_seed(len(name))
    tensors = {"w": torch.randn(1, DIM), "b": torch.randn(1)} if tensors is None else tensors
    content = {"name": name, "layers": [{"weight": "w", "bias": "b"}], **changed}
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder / f"{name}.json")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    found = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(1).normal(size=(5000, DIM))), dim=1)
    return found.numpy()


@pytest.mark.parametrize("activation", ["ReLU", "GELU", "Tanh", "Sigmoid"])
def test_a_saved_perceptron_gives_the_values_of_torch(tmp_path: Path, vectors: np.ndarray, activation: str) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(DIM, 40), getattr(torch.nn, activation)(), torch.nn.Dropout(0.5), torch.nn.Linear(40, 3)]
    module = torch.nn.Sequential(*layers, torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False)))
    found = read_head(str(save_head(tmp_path / "taste.json", module)))
    assert found.columns == ("head_taste",)
    assert module.training
    with torch.inference_mode():
        wanted = module.eval().double()(torch.from_numpy(vectors)).numpy()
    assert np.abs(found(vectors) - wanted).max() < 1e-6
    # A row does not depend on its neighbours, and as stored in half precision it is near.
    assert np.array_equal(found(vectors)[4990:], found(vectors[4990:]))
    assert np.abs(found(vectors.astype(np.float16)) - wanted).max() < 1e-2


def test_outputs_are_taken_as_the_file_says(tmp_path: Path, vectors: np.ndarray) -> None:
    some = {"w": torch.randn(3, DIM) * 50, "b": torch.randn(3)}
    plain = head(tmp_path, "plain", tensors=some, classes=["a", "b", "c"])
    soft = head(tmp_path, "soft", tensors=some, classes=["a", "b", "c"], output="softmax")
    sure = head(tmp_path, "sure", tensors=some, classes=["a", "b", "c"], output="sigmoid")
    heads = tuple(map(read_head, (plain, soft, sure)))
    values = values_of(heads, vectors)
    assert list(values) == [f"head_{name}_{each}" for name in ("plain", "soft", "sure") for each in "abc"]
    raw = torch.from_numpy(heads[0](vectors)).double()
    assert np.abs(heads[1](vectors) - raw.softmax(dim=1).numpy()).max() < 1e-5
    assert np.abs(heads[2](vectors) - raw.sigmoid().numpy()).max() < 1e-5


@pytest.mark.compat("sklearn")
@pytest.mark.parametrize("kind", ["binary", "several", "scaled", "ridge", "perceptron", "regressor"])
def test_an_estimator_of_scikit_learn_is_saved_with_its_values(tmp_path: Path, vectors: np.ndarray, kind: str) -> None:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    some = vectors[:300]
    number = some[:, 0] * 3 + some[:, 1]
    classes = np.digitize(some[:, 2], [-0.05, 0.05])
    estimator, wanted = {
        "binary": (LogisticRegression(), classes > 0),
        "several": (LogisticRegression(), classes),
        "scaled": (make_pipeline(StandardScaler(), LogisticRegression()), np.array(["x", "y", "z"])[classes]),
        "ridge": (Ridge(), number),
        "perceptron": (MLPClassifier((20, 10), max_iter=2000, random_state=0), classes),
        "regressor": (MLPRegressor(hidden_layer_sizes=(20,), activation="tanh", max_iter=2000, random_state=0), number),
    }[kind]
    found = read_head(str(save_head(tmp_path / f"{kind}.json", estimator.fit(some, wanted))))
    given = found(vectors[300:400])
    if kind in ("ridge", "regressor"):
        assert np.abs(given[:, 0] - estimator.predict(vectors[300:400])).max() < 1e-5
        return
    probabilities = estimator.predict_proba(vectors[300:400])
    assert np.abs(given - (probabilities[:, 1:] if kind == "binary" else probabilities)).max() < 1e-5
    if kind == "scaled":
        assert found.columns == ("head_scaled_x", "head_scaled_y", "head_scaled_z")


@pytest.mark.compat("sklearn")
def test_an_estimator_that_is_not_linear_is_not_saved(tmp_path: Path, vectors: np.ndarray) -> None:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import PoissonRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler

    some, wanted = vectors[:100], vectors[:100, 0] > 0
    for estimator in (
        RandomForestClassifier(5).fit(some, wanted),
        make_pipeline(MinMaxScaler(), PoissonRegressor()).fit(some, wanted),
        # It has coefficients, and takes the exponential of what they give.
        PoissonRegressor().fit(some, np.exp(vectors[:100, 0] * 5)),
    ):
        with pytest.raises(ModelError, match="head"):
            save_head(tmp_path / "wrong.json", estimator)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.compat("sklearn")
def test_an_estimator_without_probabilities_or_values_is_refused(tmp_path: Path, vectors: np.ndarray) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    some, words = vectors[:100], np.where(vectors[:100, 0] > 0, "yes", "no")
    with pytest.raises(ModelError, match="no probabilities"):
        save_head(tmp_path / "wrong.json", LinearSVC().fit(some, words))
    with pytest.raises(ModelError, match="not fitted"):
        save_head(tmp_path / "wrong.json", LogisticRegression())
    estimator = LogisticRegression().fit(some, words)
    wanted = estimator.predict_proba(vectors)[:, 1:]
    saved = save_head(tmp_path / "sparse.json", estimator.sparsify())
    assert np.abs(read_head(str(saved))(vectors) - wanted).max() < 1e-5


def test_a_refused_head_leaves_an_earlier_one_as_it_was(tmp_path: Path) -> None:
    saved = save_head(tmp_path / "taste.json", torch.nn.Linear(DIM, 1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = torch.nn.Linear(DIM, 1)
    torch.nn.init.constant_(broken.weight, torch.nan)
    with pytest.raises(ModelError, match=f"{saved}: layers.0.: the tensor 0.weight holds NaN"):
        save_head(saved, broken)
    with pytest.raises(ModelError, match="name is"):
        save_head(saved, torch.nn.Linear(DIM, 1), name="no good")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "folder.json").mkdir()
    for path in (
        *(tmp_path / each for each in ("taste", "taste.safetensors", "folder.json")),
        "s3://bucket/taste.json",
    ):
        with pytest.raises(ModelError, match="local JSON file"):
            save_head(path, torch.nn.Linear(DIM, 1))
    assert {path.name for path in tmp_path.iterdir()} == {*before, "folder.json"}


def test_modules_of_several_values_and_of_half_precision_are_saved(tmp_path: Path, vectors: np.ndarray) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(DIM, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).bfloat16()
    found = read_head(str(save_head(tmp_path / "two.json", module)))
    assert found.columns == ("head_two_0", "head_two_1")
    assert module[0].weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert np.abs(found(vectors) - module.double()(torch.from_numpy(vectors)).numpy()).max() < 1e-6


WRONG: dict[str, dict[str, Any]] = {
    "name": {"name": "no good"},
    "unknown keys": {"layer": []},
    "layers is": {"layers": []},
    "layers\\[0\\] is": {"layers": ["w"]},
    "no tensor 'x'": {"layers": [{"weight": "x"}]},
    "wanted 2 axes": {"layers": [{"weight": "b", "bias": "w"}]},
    "activation": {"layers": [{"weight": "w", "bias": "b", "activation": "swish"}]},
    "no layer uses the tensors b": {"layers": [{"weight": "w"}]},
    "output is": {"output": "exp"},
    "name each of them in classes": {"output": "softmax"},
    "names 2 classes": {"classes": ["a", "b"]},
    "softmax over one class": {"classes": ["a"], "output": "softmax"},
    "classes is": {"classes": ["a/b"]},
    "takes 128 values, and the layer before gives 1": {"layers": [{"weight": "w", "bias": "b"}, {"weight": "w"}]},
    "model is": {"model": {"name": "x"}},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_head_that_is_not_described_right_is_refused(tmp_path: Path, message: str) -> None:
    path = head(tmp_path, **WRONG[message])
    with pytest.raises(ModelError, match=message) as error:
        read_head(path)
    assert path in str(error.value)


def test_files_that_are_no_head_are_refused(tmp_path: Path, vectors: np.ndarray) -> None:
    path = Path(head(tmp_path))
    with pytest.raises(ModelError, match="given by its JSON file"):
        read_head(str(path.with_suffix(".safetensors")))
    with pytest.raises(ModelError, match=r"s3://bucket/taste\.json: a head is read from a local file"):
        read_head("s3://bucket/taste.json")
    unreal = {"w": torch.ones(1, DIM, dtype=torch.complex64), "b": torch.zeros(1)}
    with pytest.raises(ModelError, match="the tensor w holds complex numbers"):
        read_head(head(tmp_path, "unreal", tensors=unreal))
    path.with_suffix(".safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        read_head(str(path))
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(ModelError, match="no such file"):
        read_head(str(path))
    with pytest.raises(ModelError, match="NaN"):
        read_head(head(tmp_path, "nan", tensors={"w": torch.full((1, DIM), torch.nan), "b": torch.zeros(1)}))
    huge = read_head(head(tmp_path, "huge", tensors={"w": torch.full((1, DIM), 3e38), "b": torch.full((1,), 3e38)}))
    with pytest.raises(NumericalError, match="the head huge"):
        huge(np.ones((2, DIM)))


def test_a_head_of_another_model_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fingerprint = open_checkpoint(ModelConfig()).fingerprint
    own = head(tmp_path, "own", model={"name": "demo", "weights": fingerprint["weights"]})
    silent, other = (
        head(tmp_path, "silent"),
        head(tmp_path, "other", model={"name": "B/16", "weights": {"x": "0" * 64}}),
    )
    assert len(read_heads([own, silent], fingerprint, DIM)) == 2
    assert "silent.json does not say which model" in caplog.text
    with pytest.raises(ModelError, match="trained on embeddings of B/16"):
        read_heads([own, other], fingerprint, DIM)
    with pytest.raises(ModelError, match="takes embeddings of 128 numbers, and those of this model have 512"):
        read_heads([silent], fingerprint, 512)
    with pytest.raises(ModelError, match="has the name own"):
        read_heads([own, own], fingerprint, DIM)
    pair = {"w": torch.zeros(2, DIM), "b": torch.zeros(2)}
    one = head(tmp_path, "a", tensors=pair, classes=["b_c", "d"])
    two = head(tmp_path, "a_b", tensors=pair, classes=["C", "d"])
    with pytest.raises(ModelError, match="writes the column head_a_b_C"):
        read_heads([one, two], fingerprint, DIM)


def test_a_job_and_a_relabelling_write_the_same_columns(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "manifest.parquet", ROWS)
    heads = [
        head(tmp_path),
        head(tmp_path, "two", tensors={"w": torch.randn(2, DIM), "b": torch.randn(2)}, classes=["a", "b"]),
    ]
    columns = ["head_taste", "head_two_a", "head_two_b"]
    plain = config_for(manifest, tmp_path / "plain", output={"dtype": "float16"})
    run_job(plain)
    run_job(plain.changed({"output.dir": str(tmp_path / "direct"), "labels.heads": heads}))
    with open_dataset(tmp_path / "plain") as opened:
        opened.relabel(heads=heads, output=tmp_path / "later").close()
    direct, later = (pq.read_table(tmp_path / name) for name in ("direct", "later"))
    assert direct.column_names[-3:] == columns
    assert direct.select(columns).equals(later.select(columns))
    assert direct.drop_columns(columns).equals(pq.read_table(tmp_path / "plain"))
    failed = [row for row, value in enumerate(direct["head_taste"].to_pylist()) if value is None]
    assert failed == list(DAMAGED)
    for name in ("direct", "later"):
        assert verify([str(tmp_path / name)]) == 0
        stored = dataset.open_dataset(str(tmp_path / name))
        assert stored.kept == ["truth", "meta"]
        assert [each["columns"] for each in stored.plan.fingerprints["heads"].values()] == [columns[:1], columns[1:]]
    # Without heads again: the new dataset has the source's without its columns.
    with open_dataset(tmp_path / "direct") as opened:
        opened.relabel(["circle", "star"], heads=[], output=tmp_path / "without").close()
    assert pq.read_table(tmp_path / "without").column_names == pq.read_table(tmp_path / "plain").column_names


def test_a_job_goes_on_with_the_same_heads_alone(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "manifest.parquet", ROWS)
    config = config_for(manifest, tmp_path / "out", labels={"heads": [head(tmp_path)]})
    run_job(config)
    (tmp_path / "out" / SUCCESS).unlink()
    (tmp_path / "out" / "_commits" / "00001.json").unlink()
    before = pq.read_table(tmp_path / "out" / next((tmp_path / "out").glob("part-00000*")).name)
    with pytest.raises(PlanMismatch, match="heads"):
        run_job(config.changed({"labels.heads": [head(tmp_path, "other")]}))
    # The same values from another file of the same content.
    moved = tmp_path / "moved"
    moved.mkdir()
    run_job(config.changed({"labels.heads": [head(moved)]}))
    assert pq.read_table(tmp_path / "out").slice(0, before.num_rows).equals(before)
    assert verify([str(tmp_path / "out")]) == 0


def test_a_kept_column_of_the_same_name_is_refused(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "manifest.parquet", 8)
    table = pq.read_table(manifest)
    for name in ("head_taste", "Head_Taste"):
        pq.write_table(table.rename_columns(["id", "image", name, "meta"]), manifest)
        config = config_for(manifest, tmp_path / "out", labels={"heads": [head(tmp_path)]}, manifest={"keep": [name]})
        with pytest.raises(ConfigError, match=name):
            run_job(config)
        assert not (tmp_path / "out" / "_plan.json").exists()


def test_a_relabelling_takes_no_head_that_changed_since(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "manifest.parquet", 8)
    path = head(tmp_path)
    run_job(config_for(manifest, tmp_path / "out", labels={"heads": [path]}))
    with open_dataset(tmp_path / "out") as opened:
        opened.relabel(["x", "y"], output=tmp_path / "same").close()
        assert pq.read_table(tmp_path / "same")["head_taste"].equals(pq.read_table(tmp_path / "out")["head_taste"])
        head(tmp_path, tensors={"w": torch.zeros(1, DIM), "b": torch.zeros(1)})
        with pytest.raises(ModelError, match=r"taste changed since .* labels.heads=\[\]"):
            opened.relabel(["x", "y"], output=tmp_path / "new")
        Path(path).unlink()
        with pytest.raises(ModelError, match=r"no such file.*is taken where none is given.*labels.heads=\[\]"):
            opened.relabel(["x", "y"], output=tmp_path / "new")
        opened.relabel(["x", "y"], heads=[], output=tmp_path / "new").close()
    assert "head_taste" not in pq.read_table(tmp_path / "new").column_names


def test_a_head_is_found_from_another_folder_and_where_its_project_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "heads").mkdir(parents=True)
    head(tmp_path / "project" / "heads")
    scenes_manifest(tmp_path / "project" / "manifest.parquet", 8)
    monkeypatch.chdir(tmp_path / "project")
    config = config_for(Path("manifest.parquet"), Path("outputs/run"), labels={"heads": ["heads/taste.json"]})
    run_job(config)
    wanted = pq.read_table("outputs/run")["head_taste"]
    monkeypatch.chdir(tmp_path)
    for place in ("project", "moved"):
        if place == "moved":
            (tmp_path / "project").rename(tmp_path / "moved")
        with open_dataset(tmp_path / place / "outputs" / "run") as opened:
            opened.relabel(["x", "y"], output=tmp_path / f"from-{place}").close()
        assert pq.read_table(tmp_path / f"from-{place}")["head_taste"].equals(wanted)
    assert "heads" not in recipe_of(config.changed({"labels.heads": []}))["labels"]


def test_a_head_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "taste.json", Path("/proc/no-such-folder/taste.json")):
        with pytest.raises(ModelError, match=f"{path}: cannot be written"):
            save_head(path, torch.nn.Sequential(torch.nn.Linear(DIM, 1)))
