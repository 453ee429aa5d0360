"""Every id is there, and there once; the check is exact."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import ManifestError, StorageError
from pipeline.core.failpoints import armed
from pipeline.manifest import hash_files, ids
from pipeline.manifest.manifest import Manifest, open_manifest
from tests.conftest import ROOT
from tests.processes import wait_until


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sort hashes in files of a few rows, which are read in several pieces; nothing of them is left."""
    folder = tmp_path_factory.mktemp("TMPDIR")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(ids, "IN_MEMORY_ROWS", 1)
    monkeypatch.setattr(hash_files, "FILE_ROWS", 2)
    monkeypatch.setattr(hash_files, "READ_ROWS", 100)
    yield folder
    assert not list(folder.iterdir())
    wait_until(lambda: not open_below(folder))


@pytest.fixture(params=["in memory", "in files"])
def both_ways(request: pytest.FixtureRequest) -> None:
    if request.param == "in files":
        request.getfixturevalue("in_files")


def open_below(folder: Path) -> list[str]:
    """Open files of this process that lie, or lay, in a folder."""
    found = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [place for place in found if place.startswith(str(folder))]


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


@pytest.mark.usefixtures("both_ways")
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


@pytest.mark.usefixtures("both_ways")
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


@pytest.mark.usefixtures("both_ways")
def test_an_id_repeated_in_another_file_is_found(tmp_path: Path) -> None:
    message = refusal(manifest_of(tmp_path, pa.array(["a", "b", "c"]), pa.array(["d"]), pa.array(["e", "c"])))
    for part in ("id 'c' stands twice", "0.parquet, row 2 and", "2.parquet, row 1;", "path='2/1.jpg'"):
        assert part in message


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "texts", [["é", "e\u0301"], ["a", "A"], ["a", "a "], ["1", "01"], ["a/b.jpg", "a//b.jpg"], ["x\0", "x"]], ids=repr
)
def test_ids_that_only_look_alike_are_different(tmp_path: Path, texts: list[str]) -> None:
    ids.check_ids(manifest_of(tmp_path, pa.array(texts)))


def same_hash(column: pa.Array) -> np.ndarray[Any, Any]:
    return np.full(len(column), 42, dtype=np.uint64)


def hash_of_the_first_letter(column: pa.Array) -> np.ndarray[Any, Any]:
    return np.array([ord(text[0]) for text in column.to_pylist()], dtype=np.uint64)


@pytest.mark.usefixtures("both_ways")
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


def test_no_two_integers_have_one_hash() -> None:
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
    monkeypatch.setattr(hash_files, "BLOCK", 4)
    numbers = [1, 2, 3, 4, 4, 5, 6, 7, 7, 7, 9, 9]
    assert hash_files.repeated_values(np.array(numbers[::-1], dtype=np.uint64)).tolist() == [4, 7, 9]
    assert hash_files.repeated_values(np.array([3], dtype=np.uint64)).tolist() == []


@pytest.mark.usefixtures("both_ways")
def test_many_ids_are_checked_in_batches(tmp_path: Path) -> None:
    count = 2 * ids.BATCH_ROWS + 10
    numbers = [f"image-{n:08}" for n in range(count)]
    good = manifest_of(tmp_path, pa.array(numbers), row_group_size=50_000)
    ids.check_ids(good)
    numbers[-1] = numbers[ids.BATCH_ROWS - 1]
    message = refusal(manifest_of(tmp_path, pa.array(numbers), row_group_size=50_000))
    assert f"row {ids.BATCH_ROWS - 1} and" in message
    assert f"row {count - 1};" in message


@pytest.mark.usefixtures("both_ways")
def test_ids_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    offsets = np.array([0, 1, 2], dtype=np.int32)
    latin = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xe9")])
    assert "id is not UTF-8" in refusal(manifest_of(tmp_path, latin))


COLUMNS = {
    "text": pa.string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "int8": pa.int8(),
    "uint64": pa.uint64(),
}


def column_of(numbers: list[int], kind: str) -> pa.Array:
    texts = kind in ("text", "dictionary")
    return pa.array([f"id {n}" if texts else n for n in numbers]).cast(COLUMNS[kind])


def first_pair(values: list[object]) -> tuple[int, int]:
    rows = next(row for row, value in enumerate(values) if value in values[:row])
    return values.index(values[rows]), rows


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("compared", [1, 2, 3, 1000])
def test_of_many_repeated_ids_the_first_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compared: int
) -> None:
    monkeypatch.setattr(ids, "COMPARED", compared)
    dice = random.Random(f"{kind} {compared}")
    whole = list(range(60))
    shuffled = dice.sample(whole, 60)
    for number, numbers in enumerate([whole + whole, whole + shuffled, [7] * 50, [*whole, 3], [*whole[::-1], 59, 0]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        column = column_of(numbers, kind)
        first, row = first_pair(column.to_pylist())
        cut = dice.randrange(1, len(column))
        message = refusal(manifest_of(folder, column.slice(0, cut), column.slice(cut), row_group_size=9))
        names = [f"{folder}/{int(at >= cut)}.parquet, row {at - cut * (at >= cut)}" for at in (first, row)]
        assert f"at {names[0]} and at {names[1]};" in message


@pytest.mark.usefixtures("both_ways")
def test_more_equal_hashes_than_are_compared_at_once_hide_no_repeated_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids, "COMPARED", 2)
    monkeypatch.setattr(ids, "_hash", hash_of_the_first_letter)
    texts = [letter + digit for digit in "12" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "good").mkdir()
    ids.check_ids(manifest_of(tmp_path / "good", pa.array(texts)))
    (tmp_path / "bad").mkdir()
    assert "id 'z1' stands twice" in refusal(manifest_of(tmp_path / "bad", pa.array([*texts, "z1"])))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(range(100_000)),
        pa.array(range(-50_000, 50_000)),
        pa.array(range(0, 100_000 << 40, 1 << 40)),
        pa.array([1_700_000_000_000_000_000 + second * 10**9 for second in range(100_000)]),
        pa.array([f"{number:08}" for number in range(100_000)]),
        pa.array([f"photos/{number % 7}/{number}.jpg" for number in range(100_000)]),
    ],
    ids=["integers", "negative", "multiples", "times", "digits", "paths"],
)
def test_the_hashes_of_usual_ids_fill_the_files_evenly(column: pa.Array) -> None:
    counts = np.bincount((ids._hash(column) >> np.uint64(64 - hash_files.BITS)).astype(np.int64), minlength=256)
    assert counts.max() < 1.3 * counts.mean()
    assert counts.min() > 0.7 * counts.mean()


def test_a_file_of_equal_hashes_is_held_in_pieces(in_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def noted(hashes: np.ndarray[Any, Any]) -> Any:
        lengths.append(len(hashes))
        return found_in(hashes)

    found_in = hash_files.repeated_values
    monkeypatch.setattr(hash_files, "repeated_values", noted)
    with hash_files.HashFiles(10_000) as files:
        assert len(open_below(in_files)) == 256
        for _ in range(100):
            files.append(np.repeat(np.array([5, 6, 2**63 + 1], dtype=np.uint64), 100))
        files.append(np.array([7, 2**63 + 2], dtype=np.uint64))
        assert np.concatenate([*files.repeated(1000)]).tolist() == [5, 6, 2**63 + 1]
    assert sum(lengths) > 30_000
    assert max(lengths) <= 102


def test_threads_append_to_the_same_files(in_files: Path) -> None:
    everything = np.random.default_rng(3).integers(0, 2**64, 40_000, dtype=np.uint64)
    with hash_files.HashFiles(len(everything)) as files:
        threads = [threading.Thread(target=files.append, args=(part.copy(),)) for part in np.split(everything, 40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not np.concatenate([*files.repeated(1000)]).size
        files.append(everything[::100].copy())
        assert np.array_equal(np.concatenate([*files.repeated(1000)]), np.sort(everything[::100]))


def check_refused(manifest: Manifest, folder: Path, reason: str) -> None:
    with pytest.raises(StorageError) as caught:
        ids.check_ids(manifest)
    for part in (f"{folder}: {reason}", f"writes {8 * manifest.rows:,} bytes there", "set TMPDIR to a folder on a"):
        assert part in str(caught.value)


def test_a_full_disk_is_named_with_the_bytes_and_tmpdir(in_files: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, pa.array(range(300)), pa.array(range(300, 600)))
    with armed("ids.write=raise:ENOSPC@2"):
        check_refused(manifest, in_files, "No space left on device (failpoint ids.write)")


def test_a_disk_that_is_too_small_is_refused_before_ids_are_read(
    in_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_files, "free_bytes", lambda place: 4799 if place == str(in_files) else 10**12)
    manifest = manifest_of(tmp_path, pa.array(range(600)))
    monkeypatch.setattr(ids, "_batches", None)
    check_refused(manifest, in_files, "No space left on device (4,799 bytes free)")


def test_a_killed_check_leaves_no_file(in_files: Path, tmp_path: Path) -> None:
    manifest_of(tmp_path, pa.array(range(600)))
    code = (
        "from pipeline.config.schema import ManifestConfig; from pipeline.manifest import ids, manifest; "
        f"ids.IN_MEMORY_ROWS = 1; ids.check_ids(manifest.open_manifest(ManifestConfig(path={str(tmp_path)!r})))"
    )
    environment = {**os.environ, "PIPELINE_FAILPOINTS": "ids.write=kill"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False).returncode == -9
