"""Smaller embeddings: bytes, bits, the first numbers alone and plain lists, through a job and all that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import convert, open_dataset, verify
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, NumericalError, StorageError
from pipeline.dataset.dataset import open_dataset as opened
from pipeline.dataset.search import nearest
from pipeline.dataset.vectors import VectorFormat, cut, form_fingerprint, vectors_of
from pipeline.engine.recall import RecallSample, recall
from pipeline.job.main import run_job
from tests.jobs import DAMAGED, config_for, content, scenes_manifest
from tests.nights import Collection, healthy, night
from tests.test_heads import head

ROWS, DIM = 60, 128
GOOD = [row for row in range(ROWS) if row not in DAMAGED]
# Each with the type of a stored element, and the length of a list.
VARIANTS: dict[str, tuple[dict[str, Any], pa.DataType, int]] = {
    "int8": ({"dtype": "int8"}, pa.int8(), DIM),
    "binary": ({"dtype": "binary"}, pa.uint8(), DIM // 8),
    "dims": ({"dims": 48}, pa.float32(), 48),
    "int8_dims_list": ({"dtype": "int8", "dims": 48, "vector": "list"}, pa.int8(), 48),
    "float16_list": ({"dtype": "float16", "vector": "list"}, pa.float16(), DIM),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``full``, in float32."""
    made = tmp_path_factory.mktemp("vectors")
    run_job(config_of(scenes_manifest(made / "m.parquet", ROWS), made / "full", {}))
    return made


def config_of(manifest: Path, output: Path, stored: dict[str, Any]) -> Config:
    return config_for(manifest, output, output=stored, labels={"top_k": 3})


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, folder: Path) -> str:
    name: str = request.param
    run_job(config_of(folder / "m.parquet", folder / name, VARIANTS[name][0]))
    return name


@pytest.fixture(scope="module")
def full(folder: Path) -> np.ndarray:
    """The model's embeddings of the good rows."""
    with open_dataset(folder / "full") as found:
        return found.embeddings[GOOD]


@pytest.fixture(scope="module")
def clusters() -> np.ndarray:
    """Embeddings with neighbours, and with a large number at one place, as those of CLIP have."""
    dice = np.random.default_rng(0)
    near = dice.normal(size=(100, 256))[dice.integers(0, 100, 1500)] + 0.7 * dice.normal(size=(1500, 256))
    near[:, 7] += 10
    return (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)


def test_the_job_stores_each_form_with_the_labels_of_float32(folder: Path, variant: str, full: np.ndarray) -> None:
    table, wanted = (pq.read_table(folder / name) for name in (variant, "full"))
    _, element, width = VARIANTS[variant]
    column = table["embedding"]
    assert column.type.value_type == element
    assert pa.types.is_list(column.type) == ("list" in variant)
    assert [row for row, valid in enumerate(column.is_valid().to_pylist()) if not valid] == list(DAMAGED)
    assert {len(row) for row in column.to_pylist() if row is not None} == {width}
    # To the last bit.
    assert table.drop_columns("embedding").equals(wanted.drop_columns("embedding"))
    with open_dataset(folder / variant) as found:
        vectors = found.embeddings[GOOD]
        assert (found.dim, vectors.dtype) == (found.matrix()[1].shape[1], np.float32)
        assert np.isnan(found.embeddings[list(DAMAGED)]).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    cosines = (vectors * cut(full, vectors.shape[1])).sum(axis=1)
    assert cosines.min() > (0.7 if variant == "binary" else 0.9995)


def test_a_job_goes_on_to_the_same_bytes_and_is_verified(folder: Path, variant: str, tmp_path: Path) -> None:
    place, config = folder / variant, config_of(folder / "m.parquet", folder / variant, VARIANTS[variant][0])
    before = content(place)
    for name in ("_SUCCESS", "_commits/00001.json", next(name for name in before if name.startswith("part-00001"))):
        (place / name).unlink()
    report = run_job(config)
    assert (report.rows, content(place)) == (24, before)
    assert verify.main([str(place)]) == 0
    # As another form it is another dataset.
    with pytest.raises(Exception, match=r"output\.(dtype|dim|vector)"):
        run_job(config.changed({"output.dtype": "float32", "output.dims": None, "output.vector": "fixed"}))


def test_rows_and_texts_are_searched(folder: Path, variant: str) -> None:
    stored = opened(str(folder / variant))
    with open_dataset(folder / variant) as found, open_dataset(folder / "full") as exact:
        vectors = found.embeddings[GOOD]
        hits = nearest(stored, vectors[:1], 5)[0]
        assert hits.rows[0] == GOOD[0]
        assert hits.scores[0] == pytest.approx(1, abs=1e-3)
        order = np.argsort(-(vectors @ vectors[0]), kind="stable")[:5]
        assert hits.scores.tolist() == pytest.approx((vectors @ vectors[0])[order].tolist(), abs=1e-5)
        mine, theirs = ([hit.id for hit in each.search("a red circle", top=10)] for each in (found, exact))
        assert len({*mine} & {*theirs}) >= (4 if variant == "binary" else 7)
        assert len(found.search(vector=vectors[3], top=3)) == 3
        assert len(found.search(id=found.ids[5], top=3)) == 3


def test_new_labels_come_from_what_is_stored(folder: Path, variant: str, tmp_path: Path) -> None:
    with open_dataset(folder / variant) as found, found.relabel(top_k=2, output=tmp_path / "out") as ours:
        # The job labelled float32.
        labels = [each.table(["label"])["label"].to_pylist() for each in (ours, found)]
        same = np.mean([one == two for one, two in zip(*labels, strict=True)])
    assert same >= (0.9 if "dims" in variant or variant == "binary" else 1)
    assert pq.read_table(tmp_path / "out")["embedding"].equals(pq.read_table(folder / variant)["embedding"])
    assert verify.main([str(tmp_path / "out")]) == 0


def test_heads_give_the_same_in_a_job_and_afterwards_and_are_refused_on_signs(folder: Path, tmp_path: Path) -> None:
    path, config = head(tmp_path), config_of(folder / "m.parquet", tmp_path / "direct", {"dtype": "int8"})
    run_job(config.changed({"labels.heads": [path]}))
    run_job(config.changed({"output.dir": str(tmp_path / "plain")}))
    with open_dataset(tmp_path / "plain") as found:
        found.relabel(heads=[path], output=tmp_path / "later").close()
    direct, later = (pq.read_table(tmp_path / name)["head_taste"] for name in ("direct", "later"))
    assert direct.equals(later)
    signs = {"output.dir": str(tmp_path / "bits"), "output.dtype": "binary"}
    with pytest.raises(ConfigError, match="stores the signs alone"):
        run_job(config.changed({"labels.heads": [path], **signs}))
    run_job(config.changed(signs))
    with open_dataset(tmp_path / "bits") as found, pytest.raises(ConfigError, match="stores the signs alone"):
        found.relabel(heads=[path], output=tmp_path / "none")


def test_texts_beside_images_are_stored_in_the_same_form(folder: Path, tmp_path: Path) -> None:
    stored = {"dtype": "int8", "vector": "list", "dims": 64}
    texts = {"text": "truth", "keep": ["meta"]}
    run_job(config_for(folder / "m.parquet", tmp_path / "out", output=stored, manifest=texts))
    table, found = pq.read_table(tmp_path / "out"), opened(str(tmp_path / "out"))
    assert table["text_embedding"].type == table["embedding"].type == found.form.type
    images, there = found.form.load(table["embedding"])
    words, all_rows = found.form.load(table["text_embedding"])
    assert (there.tolist(), len(all_rows)) == (GOOD, ROWS)
    cosines = table["similarity"].to_numpy()[GOOD]
    assert np.allclose(cosines, (images * words[GOOD]).sum(axis=1), atol=1e-6)
    with open_dataset(tmp_path / "out") as source:
        source.relabel(["a star"], output=tmp_path / "new").close()
    columns = ["embedding", "text_embedding", "similarity"]
    assert pq.read_table(tmp_path / "new").select(columns).equals(table.select(columns))
    assert verify.main([str(tmp_path / "out")]) == verify.main([str(tmp_path / "new")]) == 0
    assert convert.main([str(tmp_path / "out"), "--to", "numpy", "--out", str(tmp_path / "numpy")]) == 0
    assert np.load(tmp_path / "numpy/text_embeddings.npy").dtype == np.int8


def test_arrays_hold_what_is_stored(folder: Path, variant: str, tmp_path: Path) -> None:
    assert convert.main([str(folder / variant), "--to", "numpy", "--out", str(tmp_path / "out")]) == 0
    matrix, note = np.load(tmp_path / "out/embeddings.npy"), json.loads((tmp_path / "out/conversion.json").read_text())
    stored = opened(str(folder / variant))
    assert (matrix.shape, matrix.dtype) == ((len(GOOD), VARIANTS[variant][2]), stored.dtype)
    assert (note["dim"], note["dtype"]) == (stored.dim, stored.form.dtype)
    with open_dataset(folder / variant) as found:
        assert np.array_equal(stored.form.decode(matrix), found.embeddings[GOOD])


def test_the_report_compares_neighbours_with_float32(folder: Path, variant: str) -> None:
    report = json.loads((folder / variant / "_report.json").read_text())
    assert json.loads((folder / "full" / "_report.json").read_text())["stored"] == {}
    if variant == "float16_list":
        assert report["stored"] == {}
        return
    assert report["stored"]["dim"] == opened(str(folder / variant)).dim
    assert report["stored"]["bytes"] == VARIANTS[variant][2] * (4 if variant == "dims" else 1)
    assert report["stored"]["recall_at_10"] > 0.5


def test_plans_without_these_settings_are_as_before(folder: Path) -> None:
    plan = json.loads((folder / "full" / "_plan.json").read_text())
    assert plan["fingerprints"]["output"] == {"dtype": "float32", "compression": "zstd", "layout": 2}
    assert plan["config"]["output"] == {"dtype": "float32", "compression": "zstd"}
    assert form_fingerprint(Config().changed({"output.dims": DIM}).output, DIM) == {"dtype": "float32"}


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_a_row_is_stored_by_itself(clusters: np.ndarray, dtype: str) -> None:
    form = VectorFormat(dtype, 256)
    stored = form.encode(clusters)
    assert np.array_equal(form.encode(clusters[7:8])[0], stored[7])
    # Decoded and stored again, a row is the same.
    assert np.array_equal(form.encode(form.decode(stored)), stored)
    assert np.allclose(np.linalg.norm(form.decode(stored), axis=1), 1, atol=1e-6)
    assert form.decode(np.zeros_like(stored)).dtype == np.float32


def test_bits_are_those_of_packbits_and_their_cosine_is_the_hamming_distance(clusters: np.ndarray) -> None:
    form = VectorFormat("binary", 256)
    stored = form.encode(clusters)
    assert np.array_equal(stored, np.packbits(clusters > 0, axis=1))
    distance = np.unpackbits(stored[0] ^ stored[1]).sum()
    assert form.decode(stored[:2])[0] @ form.decode(stored[:2])[1] == pytest.approx(1 - 2 * distance / 256, abs=1e-6)


def test_bytes_keep_the_neighbours(clusters: np.ndarray) -> None:
    sample = RecallSample(VectorFormat("int8", 256))
    assert sample.measure() == {}
    for start in range(0, 1500, 64):
        sample.add(clusters[start : start + 64])
    measured = sample.measure()
    assert measured["rows"] == 1500
    assert measured["at_10"] > 0.95
    # By another way.
    stored = sample._form.decode(sample._form.encode(clusters))
    true, rough = (np.argsort(-(each @ each.T - 3 * np.eye(1500)), axis=1)[:, :10] for each in (clusters, stored))
    shared = [len({*one} & {*two}) / 10 for one, two in zip(true.tolist(), rough.tolist(), strict=True)]
    assert measured["at_10"] == pytest.approx(np.mean(shared), abs=1e-3)
    assert recall(clusters, clusters) == 1


def test_what_cannot_be_stored_is_refused() -> None:
    output = Config().output
    with pytest.raises(ConfigError, match=r"output\.dims = 192: must be at most 128, the length of this model's"):
        form_fingerprint(Config().changed({"output.dims": 192}).output, DIM)
    with pytest.raises(ConfigError, match="fills whole bytes; 100 numbers do not"):
        form_fingerprint(Config().changed({"output.dims": 100, "output.dtype": "binary"}).output, DIM)
    with pytest.raises(NumericalError, match="the first 2 numbers of an embedding are 0"):
        cut(np.array([[0, 0, 1]], dtype=np.float32), 2)
    assert form_fingerprint(output, DIM) == {"dtype": "float32"}


def test_a_list_of_another_length_is_damage(folder: Path, tmp_path: Path) -> None:
    form = VectorFormat("int8", 3, fixed=False)
    column = pa.chunked_array([pa.array([[1, 2, 3], None, [1, 2]], form.type)])
    with pytest.raises(StorageError, match="has 2 elements, not 3"):
        form.load(column)
    vectors, rows = form.load(column.slice(0, 2))
    assert (vectors.shape, rows.tolist()) == ((1, 3), [0])
    assert form.load(column.slice(1, 1))[0].shape == (0, 3)


@pytest.mark.compat("faiss")
def test_faiss_gets_the_bits(folder: Path, tmp_path: Path) -> None:
    import faiss

    run_job(config_of(folder / "m.parquet", tmp_path / "bits", {"dtype": "binary"}))
    assert convert.main([str(tmp_path / "bits"), "--to", "faiss", "--out", str(tmp_path / "out")]) == 0
    index = faiss.read_index_binary(str(tmp_path / "out/vectors.faiss"))
    stored = opened(str(tmp_path / "bits"))
    bits = vectors_of(pq.read_table(tmp_path / "bits")["embedding"])[0]
    distances, rows = index.search(np.ascontiguousarray(bits[:1]), 5)
    assert (index.ntotal, rows[0][0], distances[0][0]) == (len(GOOD), 0, 0)
    scores = nearest(stored, stored.form.decode(bits[:1]), 5)[0].scores
    assert np.allclose(scores, 1 - 2 * distances[0] / DIM, atol=1e-6)
    # There is no index of lists for bits.
    typed = [str(tmp_path / "bits"), "--to", "faiss", "--ivf", "--out", str(tmp_path / "lists")]
    assert convert.main(typed) == 2


def test_nights_carry_rows_as_they_are_stored(tmp_path: Path) -> None:
    photos = Collection(tmp_path / "images")
    photos.folder.mkdir()
    for number in range(6):
        photos.draw(number, damaged=number == 3)
    photos.write()
    config = photos.config(output={"dtype": "int8", "dims": 40, "vector": "list"}, manifest={"shard_rows": 4})
    first = night(config, tmp_path / "nights", "2026-11-01")
    photos.draw(1, version=1)
    photos.write()
    second = night(config, tmp_path / "nights", "2026-11-02")
    assert (first.embedded, second.anew, second.kinds["carried"], second.embedded) == (6, "", 5, 1)
    places = [tmp_path / "nights" / f"date=2026-11-0{day}" for day in (1, 2)]
    one, two = (pq.ParquetFile(next(place.glob("part-00001-*"))).read(columns=["id", "embedding"]) for place in places)
    assert one.equals(two)
    assert opened(str(places[1])).dim == 40
    assert healthy(places[1])


def test_answers_of_the_service_are_floats() -> None:
    vector = np.array([0.6, 0.0, 0.8, 0.0] * 4, dtype=np.float32) / 2
    assert np.allclose(VectorFormat("binary", 16).floats(vector), vector)
    assert VectorFormat("float16", 16).floats(vector).tolist() == vector.astype(np.float16).tolist()
    assert np.allclose(VectorFormat("int8", 2).floats(vector), [1, 0])
