"""Shards cover every row once, and reading them gives the rows whatever the order and the row groups."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import ManifestError
from pipeline.core.records import ImageRef, Piece, Shard
from pipeline.dataset.dataset import _table
from pipeline.dataset.plan import count_shards
from pipeline.manifest.manifest import Manifest, ManifestFile, open_manifest
from pipeline.manifest.shards import BYTES_ROWS, PATH_ROWS, ShardReader, cut, refs
from pipeline.nightly.rows import copy_rows
from pipeline.storage.factory import open_storage

MEGABYTE = 1 << 20


def write_groups(path: Path, groups: list[int], first: int = 0) -> None:
    """A file with row groups of these sizes; ids count up from ``first``."""
    schema = pa.schema([("id", pa.int64()), ("path", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in groups:
            ids = list(range(first, first + rows))
            table = pa.table({"id": ids, "path": [f"{i}.jpg" for i in ids]}, schema=schema)
            # write_table leaves out a group without rows.
            writer.write_table(table, row_group_size=max(1, rows))
            first += rows


def manifest_of(folder: Path, files: list[list[int]]) -> Manifest:
    folder.mkdir(exist_ok=True)
    first = 0
    for number, groups in enumerate(files):
        write_groups(folder / f"{number:03}.parquet", groups, first)
        first += sum(groups)
    return open_manifest(ManifestConfig(path=str(folder)))


def imagined(files: list[list[int]]) -> Manifest:
    """A manifest of which only the row counts exist."""
    made = [ManifestFile(url=str(n), row_groups=tuple(groups), size=0, digest="") for n, groups in enumerate(files)]
    return Manifest(tuple(made), pa.schema([("id", pa.int64())]), id="id", image="path", image_kind="path", root="")


def read_refs(reader: ShardReader, shard: Shard) -> list[ImageRef]:
    return [ref for batch in reader.read(shard) for ref in refs(reader.manifest, batch)]


def read_ids(reader: ShardReader, shard: Shard) -> list[str | int]:
    return [ref.id for ref in read_refs(reader, shard)]


def random_files(dice: random.Random, largest: int) -> list[list[int]]:
    return [[dice.randint(0, largest) for _ in range(dice.randint(0, 6))] for _ in range(dice.randint(1, 4))]


def test_a_cut_covers_every_row_once_and_in_order() -> None:
    dice = random.Random(1)
    for _ in range(400):
        files, shard_rows = random_files(dice, 60), dice.choice([1, 2, 7, 20, 59, 60, 61, 500])
        manifest = imagined(files)
        shards = list(cut(manifest, shard_rows))
        wanted = [(f, g, row) for f, groups in enumerate(files) for g, rows in enumerate(groups) for row in range(rows)]
        pieces = [piece for shard in shards for piece in shard.pieces]
        assert [(p.file, p.row_group, row) for p in pieces for row in range(p.start, p.stop)] == wanted
        assert [shard.index for shard in shards] == list(range(count_shards(len(wanted), shard_rows)))
        assert all(shard.rows == sum(p.stop - p.start for p in shard.pieces) for shard in shards)
        assert all(shard.rows == shard_rows for shard in shards[:-1])
        assert all(0 < shard.rows <= shard_rows for shard in shards)
        assert list(cut(manifest, shard_rows)) == shards


@pytest.mark.parametrize(
    ("rows", "shard_rows", "shards"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (10**12, 4096, 244140625)]
)
def test_shards_are_counted_without_cutting(rows: int, shard_rows: int, shards: int) -> None:
    assert count_shards(rows, shard_rows) == shards


def test_a_cut_is_lazy_so_that_a_billion_rows_cost_nothing() -> None:
    shards = cut(imagined([[10**9]]), 100)
    assert next(shards) == Shard(index=0, rows=100, pieces=(Piece(file=0, row_group=0, start=0, stop=100),))


@pytest.mark.parametrize("order", ["in order", "in reverse", "at random"])
def test_shards_read_in_any_order_give_the_same_rows(tmp_path: Path, order: str) -> None:
    dice = random.Random(2)
    for trial in range(12):
        manifest = manifest_of(tmp_path / str(trial), [[1], *random_files(dice, 1500)])
        # Shards that are smaller and larger than row groups and than the batches of a read.
        shards = list(cut(manifest, dice.choice([17, PATH_ROWS - 1, PATH_ROWS, PATH_ROWS + 1, 4000])))
        indices = list(range(len(shards)))
        if order == "in reverse":
            indices.reverse()
        elif order == "at random":
            dice.shuffle(indices)
        with ShardReader(manifest) as reader:
            found = {index: read_ids(reader, shards[index]) for index in indices}
        assert [i for index in sorted(found) for i in found[index]] == list(range(manifest.rows))


def test_a_shard_can_be_read_again_and_after_a_read_that_was_given_up(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [[100, 900], [700]])
    first, second, *_ = cut(manifest, 600)
    with ShardReader(manifest) as reader:
        next(reader.read(second))
        assert read_ids(reader, second) == list(range(600, 1200))
        next(reader.read(first))
        assert read_ids(reader, second) == list(range(600, 1200))
        assert read_ids(reader, first) == read_ids(reader, first) == list(range(600))


def test_a_reader_that_was_closed_opens_the_file_again(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [[10]])
    first, second = cut(manifest, 5)
    reader = ShardReader(manifest)
    assert read_ids(reader, first) == list(range(5))
    reader.close()
    reader.close()
    assert read_ids(reader, second) == list(range(5, 10))
    reader.close()


def test_consecutive_shards_of_a_row_group_go_on_where_the_last_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, **options: object) -> Iterator[pa.RecordBatch]:
        opened.append(options["row_groups"])
        return iter_batches(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    manifest = manifest_of(tmp_path, [[1000, 300]])
    with ShardReader(manifest) as reader:
        assert [i for shard in cut(manifest, 70) for i in read_ids(reader, shard)] == list(range(1300))
    assert opened == [[0], [1]]


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [[600]])
    shards = list(cut(manifest, 300))
    write_groups(tmp_path / "000.parquet", [400])
    with ShardReader(manifest) as reader:
        assert read_ids(reader, shards[0]) == list(range(300))
        with pytest.raises(ManifestError, match=r"000\.parquet: row group 0 .*end early.*did the file change"):
            read_ids(reader, shards[1])


def write_images(path: Path, count: int, size: int, page_rows: int) -> None:
    """One row group of incompressible cells, each of which begins with its number."""
    noise = random.Random(3).randbytes(size)
    table = pa.table({"id": list(range(count)), "image": [n.to_bytes(4, "big") + noise for n in range(count)]})
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": page_rows}
    pq.write_table(table, path, row_group_size=count, **options)


# A page is read whole. Arrow ends one after a multiple of write_batch_size rows, 1024 unless told.
@pytest.mark.parametrize(("page_rows", "most"), [(16, 8 * MEGABYTE), (1024, 40 * MEGABYTE)])
def test_one_shard_of_a_huge_row_group_does_not_load_the_row_group(tmp_path: Path, page_rows: int, most: int) -> None:
    path = tmp_path / "images.parquet"
    count, size = 3072, 32 * 1024
    write_images(path, count, size, page_rows)
    manifest = open_manifest(ManifestConfig(path=str(path), image="image"))
    assert manifest.files[0].row_groups == (count,)
    assert manifest.files[0].size > 96 * MEGABYTE
    shards = list(cut(manifest, 64))
    before, peak, seen = pa.total_allocated_bytes(), 0, []
    with ShardReader(manifest) as reader:
        for shard in (shards[0], shards[1], shards[40]):
            for batch in reader.read(shard):
                peak = max(peak, pa.total_allocated_bytes() - before)
                assert batch.num_rows <= BYTES_ROWS
                seen += [(ref.id, int.from_bytes((ref.data or b"")[:4], "big")) for ref in refs(manifest, batch)]
    del batch
    assert seen == [(n, n) for n in [*range(128), *range(40 * 64, 41 * 64)]]
    assert peak < most
    assert pa.total_allocated_bytes() - before < MEGABYTE


ASKED: list[tuple[int, int]] = []


class CountedFile(AbstractBufferedFile):
    """A file of a store, which notes the ranges that are asked for."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        ASKED.append((start, min(end, self.size)))
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class CountedStore(AbstractFileSystem):
    """The local disk as a store."""

    protocol, cachable = "counted", False

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        name = str(self._strip_protocol(path))
        return {"name": name, "size": Path(name).stat().st_size, "type": "file", "ETag": "same"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> CountedFile:
        return CountedFile(self, path, mode, **options)


@pytest.mark.parametrize("order", [["id", "image", "caption"], ["caption", "image", "id"]])
def test_a_store_is_asked_once_for_each_byte_in_large_requests(tmp_path: Path, order: list[str]) -> None:
    fsspec.register_implementation("counted", CountedStore, clobber=True)
    noise, count = random.Random(3), 3000
    cells = {
        "id": [f"{row}.jpg" for row in range(count)],
        "image": [noise.randbytes(20_000) for _ in range(count)],
        "caption": [noise.randbytes(1000).hex() for _ in range(count)],
    }
    path = tmp_path / "m.parquet"
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 2000}
    pq.write_table(pa.table(cells).select(order), path, **options)
    footer = path.stat().st_size - pq.read_metadata(path).serialized_size - 8
    manifest = open_manifest(ManifestConfig(path=f"counted://{path}", image="image", keep=["caption"]))
    ASKED.clear()
    with ShardReader(manifest) as reader:
        assert read_ids(reader, next(cut(manifest, count))) == cells["id"]
    asked = sorted(one for one in ASKED if one[1] < footer)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(asked))
    sizes = [stop - start for start, stop in asked]
    assert sum(sizes) > 60 * MEGABYTE
    # Three columns in two row groups, and a request for every 16 MiB of the images; some are of a page that is longer.
    assert len(sizes) <= 2 * 3 + 4 + 2
    assert max(sizes) < 24 * MEGABYTE


BIG = 100 * MEGABYTE


def big_images(path: Path, kind: str, rows: int) -> None:
    """Rows of which 22 neighbours hold 100 MiB each, in a small file."""
    large = pa.array([bytes(BIG), b"small"])
    codes = pa.array([0 if 5 <= row < 27 else None if row % 3 == 0 else 1 for row in range(rows)], pa.int32())
    column = pa.DictionaryArray.from_arrays(codes, large)
    if kind != "flat":
        struct = pa.StructArray.from_arrays(
            [column, pa.array([f"{row}.jpg" for row in range(rows)])], ["bytes", "path"]
        )
        column = struct
    # With its own schema, Arrow would read the dictionary instead of the bytes.
    options = {"compression": "zstd", "store_schema": kind == "dictionary"}
    pq.write_table(pa.table({"id": range(rows), "image": column}), path, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "struct", "dictionary"])
def test_rows_that_hold_more_than_two_gibibytes_are_read(tmp_path: Path, kind: str) -> None:
    big_images(tmp_path / "m.parquet", kind, 80)
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet"), image="image"))
    assert manifest.image_kind == ("bytes" if kind == "flat" else "struct")
    sizes = dict[str | int, int]()
    with ShardReader(manifest) as reader:
        for shard in cut(manifest, 50):
            for batch in reader.read(shard):
                sizes |= {ref.id: -1 if ref.data is None else len(ref.data) for ref in refs(manifest, batch)}
    assert sizes == {row: BIG if 5 <= row < 27 else -1 if row % 3 == 0 else 5 for row in range(80)}
    positions = np.array([4, 26, 79])
    copy_rows(manifest, positions, ["id", "image"], open_storage(str(tmp_path)), "copy.parquet")
    copied = pq.read_table(tmp_path / "copy.parquet")
    assert copied["id"].to_pylist() == positions.tolist()
    first = copied["image"][1].as_py()
    assert len(first if kind == "flat" else first["bytes"]) == BIG


@pytest.mark.slow
def test_a_part_with_a_kept_column_of_more_than_two_gibibytes_is_read(tmp_path: Path) -> None:
    big_images(tmp_path / "part.parquet", "struct", 40)
    schema = pq.read_schema(tmp_path / "part.parquet")
    table = _table(pa.OSFile(str(tmp_path / "part.parquet")), ["image", "id"], schema)
    assert table.column_names == ["image", "id"]
    assert table["id"].to_pylist() == [*range(40)]
    sizes = [size for chunk in table["image"].chunks for size in pc.binary_length(chunk.field("bytes")).to_pylist()]
    assert sizes == [BIG if 5 <= row < 27 else None if row % 3 == 0 else 5 for row in range(40)]
