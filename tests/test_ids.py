"""Every id is there, and there once; the check is exact."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import ManifestError
from pipeline.manifest import ids
from pipeline.manifest.manifest import Manifest, open_manifest


def manifest_of(folder: Path, *files: pa.Array, row_group_size: int = 2) -> Manifest:
    for number, column in enumerate(files):
        paths = [f"{number}/{row}.jpg" for row in range(len(column))]
        table = pa.table({"id": column, "path": paths, "image": [b"x"] * len(column)})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=row_group_size)
    return open_manifest(ManifestConfig(path=str(folder)))


def refusal(manifest: Manifest) -> str:
    with pytest.raises(ManifestError) as caught:
        ids.check_ids(manifest)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", "c", None, "d"]),
        pa.array(["a", "b", "c", None, "d"], pa.large_string()),
        pa.array(["a", "b", "c", None, "d"], pa.string_view()),
        pa.array(["a", "b", "c", None, "d"]).dictionary_encode(),
        pa.array([1, 2, 3, None, 5], pa.int16()),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_a_null_id_is_refused_with_its_row(tmp_path: Path, column: pa.Array) -> None:
    message = refusal(manifest_of(tmp_path, column))
    for part in (f"{tmp_path}/0.parquet, row 3: id is null", "the row: id=None, path='0/3.jpg'"):
        assert part in message
    assert "image" not in message


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (pa.array(["a", "b", "c", "d", "b"]), "'b'"),
        (pa.array(["a", "b", "c", "d", "b"], pa.string_view()), "'b'"),
        (pa.array(["a", "b", "c", "d", "b"]).dictionary_encode(), "'b'"),
        (pa.array(["a", "", "c", "d", ""]), "''"),
        (pa.array([7, -1, 9, 10, -1], pa.int8()), "-1"),
        (pa.array([7, 2**64 - 1, 9, 10, 2**64 - 1], pa.uint64()), str(2**64 - 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.type)[:20],
)
def test_a_repeated_id_is_refused_with_both_rows(tmp_path: Path, column: pa.Array, shown: str) -> None:
    message = refusal(manifest_of(tmp_path, column))
    for part in (f"id {shown} stands twice", "0.parquet, row 1 and", "0.parquet, row 4;", "path='0/4.jpg'"):
        assert part in message


def test_an_id_repeated_in_another_file_is_found(tmp_path: Path) -> None:
    message = refusal(manifest_of(tmp_path, pa.array(["a", "b", "c"]), pa.array(["d"]), pa.array(["e", "c"])))
    for part in ("id 'c' stands twice", "0.parquet, row 2 and", "2.parquet, row 1;", "path='2/1.jpg'"):
        assert part in message


@pytest.mark.parametrize(
    "texts", [["é", "e\u0301"], ["a", "A"], ["a", "a "], ["1", "01"], ["a/b.jpg", "a//b.jpg"], ["x\0", "x"]], ids=repr
)
def test_ids_that_only_look_alike_are_different(tmp_path: Path, texts: list[str]) -> None:
    ids.check_ids(manifest_of(tmp_path, pa.array(texts)))


def same_hash(column: pa.Array) -> np.ndarray[Any, Any]:
    return np.full(len(column), 42, dtype=np.uint64)


def hash_of_the_first_letter(column: pa.Array) -> np.ndarray[Any, Any]:
    return np.array([ord(text[0]) for text in column.to_pylist()], dtype=np.uint64)


@pytest.mark.parametrize("collide", [same_hash, hash_of_the_first_letter])
def test_ids_whose_hashes_meet_are_compared_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collide: Any
) -> None:
    monkeypatch.setattr(ids, "_hash", collide)
    (tmp_path / "good").mkdir()
    ids.check_ids(manifest_of(tmp_path / "good", pa.array(["a1", "a2", "b1"]), pa.array(["b2", "a3"])))
    (tmp_path / "bad").mkdir()
    message = refusal(manifest_of(tmp_path / "bad", pa.array(["a1", "a2", "b1"]), pa.array(["b2", "a2"])))
    assert "id 'a2' stands twice" in message
    assert "0.parquet, row 1 and" in message


def test_integers_are_their_own_hash_so_that_none_meet() -> None:
    column = pa.array([-(2**63), -1, 0, 1, 2**63 - 1], pa.int64())
    assert len(np.unique(ids._hash(column))) == len(column)


def test_different_texts_have_different_hashes_whatever_array_they_are_in() -> None:
    dice = random.Random(4)
    texts = {
        "",
        "\0",
        "\0\0",
        "a",
        "a\0",
        *(f"{n}" for n in range(5000)),
        *(f"photos/{n:040}.jpg" for n in range(5000)),
    }
    texts |= {"x" * n for n in range(70)} | {"é" * n + "!" for n in range(20)}
    texts |= {"".join(dice.choices("ab/é0\0", k=dice.randint(0, 30))) for _ in range(5000)}
    column = pa.array(sorted(texts, key=lambda text: hash(text)))
    hashes = ids._hash(column)
    assert len(np.unique(hashes)) == len(texts)
    for other in (
        column.cast(pa.large_string()),
        column.cast(pa.string_view()),
        column.dictionary_encode(),
        pa.concat_arrays([pa.array(["before"]), column]).slice(1),
        pa.chunked_array([column.slice(0, 10), column.slice(10)]).combine_chunks(),
    ):
        assert np.array_equal(ids._hash(other), hashes)
    assert np.array_equal(ids._hash(column.slice(7, 900)), hashes[7:907])
    assert len(ids._hash(column.slice(0, 0))) == 0


def test_a_pair_of_equal_hashes_is_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "BLOCK", 4)
    numbers = [1, 2, 3, 4, 4, 5, 6, 7, 7, 7, 9, 9]
    assert ids._repeated(np.array(numbers[::-1], dtype=np.uint64)).tolist() == [4, 7, 9]
    assert ids._repeated(np.array([3], dtype=np.uint64)).tolist() == []


def test_many_ids_are_checked_in_batches(tmp_path: Path) -> None:
    count = 2 * ids.BATCH_ROWS + 10
    numbers = [f"image-{n:08}" for n in range(count)]
    good = manifest_of(tmp_path, pa.array(numbers), row_group_size=50_000)
    ids.check_ids(good)
    numbers[-1] = numbers[ids.BATCH_ROWS - 1]
    message = refusal(manifest_of(tmp_path, pa.array(numbers), row_group_size=50_000))
    assert f"row {ids.BATCH_ROWS - 1} and" in message
    assert f"row {count - 1};" in message


def test_ids_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    offsets = np.array([0, 1, 2], dtype=np.int32)
    latin = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xe9")])
    assert "id is not UTF-8" in refusal(manifest_of(tmp_path, latin))
