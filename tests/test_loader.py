"""The loader: what the batches hold, in which order, and how it stops."""

from __future__ import annotations

import io
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import FORMATS, ManifestConfig
from pipeline.core.errors import ManifestError, StorageError
from pipeline.core.failpoints import armed
from pipeline.core.records import Failure, ImageBatch, ImageRef, PreprocessSpec, Shard, ShardRows, Stage
from pipeline.engine.duplicates import Repeats
from pipeline.engine.loader import Loader, LoaderSpec
from pipeline.engine.padding import repeats
from pipeline.images.decode import Decoder
from pipeline.images.reader import PixelReader
from pipeline.images.sources import beneath, spans
from pipeline.images.sources.source import Source
from pipeline.manifest.build import from_tars
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.shards import ShardReader, cut
from tests.pictures import saved

SIZE = 8
SPEC = PreprocessSpec(resize=SIZE, crop=(SIZE, SIZE), resample=3, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture(autouse=True)
def _no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    yield
    assert threads() == []


def threads() -> list[str]:
    own = ("loader", "decode", "rows", "spans")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(own)]


def colour(row: int) -> tuple[int, int, int]:
    return row % 256, row // 256, 200


def encoded(row: int) -> bytes:
    return saved(Image.new("RGB", (SIZE, SIZE), colour(row)), "PNG")


def write(
    folder: Path, rows: range, *, kind: str = "path", bad: tuple[int, ...] = (), group: int = 16, name: str = "a"
) -> None:
    """A Parquet file of ``rows``, each an image of its own colour; those in ``bad`` cannot be decoded."""
    images = [encoded(row)[:40] if row in bad else encoded(row) for row in rows]
    paths = [f"{row}.png" for row in rows]
    if kind == "path":
        for path, data in zip(paths, images, strict=True):
            (folder / path).write_bytes(data)
    cells: dict[str, Any] = {
        "path": pa.array(paths),
        "bytes": pa.array(images, pa.binary()),
        "struct": pa.array([{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]),
    }
    table = pa.table({"id": [f"row-{row}" for row in rows], "image": cells[kind], "kept": list(rows)})
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=group)


def opened(folder: Path) -> Manifest:
    return open_manifest(ManifestConfig(path=str(folder), image="image", keep=["kept"], root=str(folder)))


@dataclass
class Timer:
    """Adds up what the loader reports."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def make_loader(
    manifest: Manifest,
    *,
    batch_size: int = 8,
    workers: int = 2,
    prefetch: int = 2,
    timer: Timer | None = None,
    once: bool = True,
) -> Loader:
    source = Source(root=manifest.root, max_bytes=1_000_000)
    reader = PixelReader(source, Decoder(formats=FORMATS, max_pixels=1_000_000), SPEC)
    return Loader(
        manifest,
        reader,
        LoaderSpec(batch_size=batch_size, workers=workers, prefetch=prefetch, once=once),
        device=torch.device("cpu"),
        timer=timer or Timer(),
    )


@dataclass(frozen=True)
class Seen:
    """A copy of a batch, taken before its buffer was given back."""

    shard: int
    rows: list[int]
    pixels: NDArray[np.uint8]


def run(manifest: Manifest, shards: list[Shard], **settings: Any) -> list[Seen | ShardRows]:
    """All that the loader gives, in order."""
    items: list[Seen | ShardRows] = []
    with make_loader(manifest, **settings) as loader:
        for item in loader.stream(shards):
            if isinstance(item, ImageBatch):
                pixels = item.pixels.numpy().copy()
                items.append(Seen(shard=item.shard.index, rows=item.rows.tolist(), pixels=pixels))
                loader.release(item)
            else:
                items.append(item)
    return items


def batches(items: list[Seen | ShardRows]) -> list[Seen]:
    return [item for item in items if isinstance(item, Seen)]


def shard_rows(items: list[Seen | ShardRows]) -> list[ShardRows]:
    return [item for item in items if isinstance(item, ShardRows)]


@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
def test_batches_hold_the_rows_in_order(tmp_path: Path, kind: str) -> None:
    write(tmp_path, range(70), kind=kind)
    manifest = opened(tmp_path)
    assert manifest.image_kind == kind
    items = run(manifest, list(cut(manifest, 30)))
    assert [(seen.shard, seen.rows) for seen in batches(items)] == [
        (0, list(range(0, 8))),
        (0, list(range(8, 16))),
        (0, list(range(16, 24))),
        (0, list(range(24, 30))),
        (1, list(range(0, 8))),
        (1, list(range(8, 16))),
        (1, list(range(16, 24))),
        (1, list(range(24, 30))),
        (2, list(range(0, 8))),
        (2, [8, 9]),
    ]
    for seen in batches(items):
        assert seen.pixels.shape == (8, 3, SIZE, SIZE)
        for pixels, row in zip(seen.pixels, seen.rows, strict=False):
            assert (pixels == np.reshape(colour(seen.shard * 30 + row), (3, 1, 1))).all()
        assert (seen.pixels[len(seen.rows) :] == seen.pixels[repeats(len(seen.rows), 8)]).all()


def test_a_shard_ends_with_its_rows(tmp_path: Path) -> None:
    write(tmp_path, range(70))
    manifest = opened(tmp_path)
    items = run(manifest, list(cut(manifest, 30)))
    order = [("batch", item.shard) if isinstance(item, Seen) else ("rows", item.shard.index) for item in items]
    wanted = []
    for shard, count in ((0, 4), (1, 4), (2, 2)):
        wanted += [("batch", shard)] * count + [("rows", shard)]
    assert order == wanted
    table = pa.concat_tables(item.table for item in shard_rows(items))
    assert table.column_names == ["id", "kept"]
    assert table["id"].to_pylist() == [f"row-{row}" for row in range(70)]
    assert table["kept"].to_pylist() == list(range(70))


def write_tars(folder: Path, order: str) -> None:
    """Three tars of images, some of them damaged, empty, missing or there twice, and their manifest."""
    folder.mkdir()
    paths = []
    for number in range(3):
        paths.append(str(folder / f"{number}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for row in range(number * 30, number * 30 + 30):
                data = {7: b"", 40: b"no image", 66: encoded(65)}.get(row, encoded(row))
                info = tarfile.TarInfo(f"{row}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    from_tars(paths, str(folder / "m.parquet"))
    table = pq.read_table(folder / "m.parquet").select(["id", "path"])
    cells = table["path"].to_pylist()
    cells[50], cells[51], cells[52] = cells[49], "1.tar#bytes=90000000-90000100", "no.tar#bytes=0-100"
    table = table.set_column(1, "path", pa.array(cells)).append_column("kept", pa.array(range(len(cells))))
    rows = list(range(len(cells)))
    if order == "shuffled":
        random.Random(1).shuffle(rows)
    if order == "in turn":
        rows.sort(key=lambda row: row % 30)
    pq.write_table(table.take(rows), folder / "m.parquet", row_group_size=50)


def unpack(manifest: Manifest, folder: Path) -> None:
    """The same rows, each with a file of its own."""
    folder.mkdir()
    source = Source(root=manifest.root, max_bytes=1_000_000)
    table = pq.read_table(manifest.files[0].url)
    names = [f"{row}.png" for row in range(len(table))]
    for name, row in zip(names, table.to_pylist(), strict=True):
        data = source.read(ImageRef(id=0, path=row["path"]))
        if not isinstance(data, Failure) or data.status == "empty":
            (folder / name).write_bytes(b"" if isinstance(data, Failure) else data)
    pq.write_table(table.set_column(1, "path", pa.array(names)), folder / "m.parquet", row_group_size=50)


def from_paths(folder: Path) -> Manifest:
    return open_manifest(ManifestConfig(path=str(folder / "m.parquet"), keep=["kept"], root=str(folder)))


@pytest.mark.parametrize("order", ["in order", "shuffled", "in turn"])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("workers", [1, 4])
def test_members_of_tars_come_as_their_files_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, *, small: bool, workers: int
) -> None:
    if small:
        for name, value in (("SPAN", 5000), ("GAP", 1000), ("HELD", 12_000)):
            monkeypatch.setattr(spans, name, value)
    write_tars(tmp_path / "tars", order)
    manifest = from_paths(tmp_path / "tars")
    unpack(manifest, tmp_path / "files")
    reads: list[str] = []
    read = beneath.Folder.read
    monkeypatch.setattr(beneath.Folder, "read", lambda self, path, *most: reads.append(path) or read(self, path, *most))
    together = run(manifest, list(cut(manifest, 40)), workers=workers)
    count = len(reads)
    monkeypatch.setattr(spans.Spans, "join", lambda self, refs: refs)
    singly = run(manifest, list(cut(manifest, 40)), workers=workers)
    files = from_paths(tmp_path / "files")
    unpacked = run(files, list(cut(files, 40)), workers=workers)
    assert len(batches(together)) == len(batches(singly)) == len(batches(unpacked))
    for one, other, file in zip(batches(together), batches(singly), batches(unpacked), strict=True):
        assert (one.shard, one.rows) == (other.shard, other.rows) == (file.shard, file.rows)
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.pixels, file.pixels)
    for told, alone, file_rows in zip(shard_rows(together), shard_rows(singly), shard_rows(unpacked), strict=True):
        assert told.table.equals(alone.table)
        assert told.table.equals(file_rows.table)
        assert told.failures == alone.failures
        statuses = {row: failure.status for row, failure in file_rows.failures.items()}
        assert {row: failure.status for row, failure in told.failures.items()} == statuses | {
            row: "empty" for row in statuses if told.failures[row].error.startswith("1.tar#bytes=90000000-")
        }
        assert told.repeats == alone.repeats == file_rows.repeats
    # One for each tar in each of four record batches, and the rows that are empty, behind the end, and in no file.
    assert count < 90 if small else count <= 4 * 3 + 3


def test_a_loader_of_tars_that_is_left_early_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SPAN", 5000)
    write_tars(tmp_path / "tars", "in order")
    manifest = from_paths(tmp_path / "tars")
    with make_loader(manifest, workers=4) as loader:
        assert isinstance(next(loader.stream(list(cut(manifest, 40)))), ImageBatch)
        assert any(name.startswith("spans") for name in threads())


def test_failed_rows_drop_out_and_are_told(tmp_path: Path) -> None:
    bad = (0, 3, 7, 8, 9, 29, 30, 31)
    write(tmp_path, range(40), bad=bad)
    (tmp_path / "20.png").unlink()
    manifest = opened(tmp_path)
    items = run(manifest, list(cut(manifest, 30)))
    failed = {*bad, 20}
    good = [row for row in range(30) if row not in failed]
    assert [seen.rows for seen in batches(items) if seen.shard == 0] == [good[:8], good[8:16], good[16:]]
    first, second = shard_rows(items)
    assert sorted(first.failures) == [0, 3, 7, 8, 9, 20, 29]
    assert first.failures[20].status == "not_found"
    assert {first.failures[row].status for row in (0, 3, 7, 8, 9, 29)} == {"truncated"}
    assert sorted(second.failures) == [0, 1]
    assert first.table.num_rows == 30


def test_a_shard_without_a_sound_image_has_no_batch(tmp_path: Path) -> None:
    write(tmp_path, range(30), bad=tuple(range(10, 20)))
    manifest = opened(tmp_path)
    items = run(manifest, list(cut(manifest, 10)))
    assert [seen.shard for seen in batches(items)] == [0, 0, 2, 2]
    assert sorted(shard_rows(items)[1].failures) == list(range(10))


def test_the_tail_is_zero_even_in_a_used_buffer(tmp_path: Path) -> None:
    write(tmp_path, range(100))
    manifest = opened(tmp_path)
    tails = [seen for seen in batches(run(manifest, list(cut(manifest, 9)), prefetch=1)) if len(seen.rows) < 8]
    assert len(tails) == 12
    assert all(
        (seen.pixels[len(seen.rows) :] == seen.pixels[repeats(len(seen.rows), len(seen.pixels))]).all()
        for seen in tails
    )


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_the_batches_follow_from_manifest_and_config_alone(tmp_path: Path, kind: str) -> None:
    write(tmp_path, range(100), kind=kind, bad=(5, 50, 51), group=13)
    manifest = opened(tmp_path)
    shards = list(cut(manifest, 30))
    first, *others = (
        run(manifest, shards, workers=workers, prefetch=prefetch)
        for workers, prefetch in ((1, 1), (1, 1), (2, 3), (5, 1), (9, 4))
    )
    for other in others:
        for one, two in zip(batches(first), batches(other), strict=True):
            assert (one.shard, one.rows) == (two.shard, two.rows)
            assert np.array_equal(one.pixels, two.pixels)
        assert [item.failures for item in shard_rows(first)] == [item.failures for item in shard_rows(other)]


def test_some_shards_give_the_batches_that_they_have_in_a_whole_run(tmp_path: Path) -> None:
    write(tmp_path, range(100), group=13)
    manifest = opened(tmp_path)
    shards = list(cut(manifest, 30))
    whole = [seen for seen in batches(run(manifest, shards)) if seen.shard in (1, 3)]
    some = batches(run(manifest, [shards[1], shards[3]]))
    for one, two in zip(whole, some, strict=True):
        assert (one.shard, one.rows) == (two.shard, two.rows)
        assert np.array_equal(one.pixels, two.pixels)


def test_no_shards_give_nothing(tmp_path: Path) -> None:
    write(tmp_path, range(10))
    assert run(opened(tmp_path), []) == []


@pytest.mark.parametrize("prefetch", [1, 3])
def test_buffers_are_used_again(tmp_path: Path, prefetch: int) -> None:
    write(tmp_path, range(100), kind="bytes")
    manifest = opened(tmp_path)
    addresses = []
    with make_loader(manifest, batch_size=4, prefetch=prefetch) as loader:
        for item in loader.stream(cut(manifest, 100)):
            if isinstance(item, ImageBatch):
                addresses.append(item.pixels.data_ptr())
                loader.release(item)
    assert len(addresses) == 25
    assert len(set(addresses)) <= prefetch + 2


def test_a_batch_keeps_its_pixels_until_it_is_released(tmp_path: Path) -> None:
    write(tmp_path, range(100), kind="bytes")
    manifest = opened(tmp_path)
    with make_loader(manifest, batch_size=4, prefetch=1) as loader:
        held: ImageBatch | None = None
        for item in loader.stream(cut(manifest, 100)):
            if not isinstance(item, ImageBatch):
                continue
            if held is None:
                held = item
                continue
            assert held.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
            loader.release(item)


def test_the_feeder_waits_for_buffers(tmp_path: Path) -> None:
    write(tmp_path, range(200), kind="bytes")
    manifest = opened(tmp_path)
    timer = Timer()
    with make_loader(manifest, batch_size=4, prefetch=2, timer=timer) as loader:
        stream = loader.stream(cut(manifest, 200))
        held = [next(stream) for _ in range(4)]
        time.sleep(0.3)
        assert loader._ready.empty()
        for item in held:
            assert isinstance(item, ImageBatch)
            loader.release(item)
        assert isinstance(next(stream), ImageBatch)


def test_shards_without_a_sound_image_are_not_read_ahead_without_end(tmp_path: Path) -> None:
    write(tmp_path, range(400), bad=tuple(range(400)))
    manifest = opened(tmp_path)
    taken = 0

    def shards() -> Iterator[Shard]:
        nonlocal taken
        for shard in cut(manifest, 4):
            taken += 1
            yield shard

    with make_loader(manifest) as loader:
        stream = loader.stream(shards())
        assert isinstance(next(stream), ShardRows)
        time.sleep(0.3)
        assert taken < 30
        assert sum(isinstance(item, ShardRows) for item in stream) == 99


def test_the_work_is_timed(tmp_path: Path) -> None:
    write(tmp_path, range(20))
    timer = Timer()
    manifest = opened(tmp_path)
    run(manifest, list(cut(manifest, 20)), timer=timer)
    assert set(timer.seconds) == {Stage.READ, Stage.DECODE, Stage.COPY}
    assert all(seconds > 0 for seconds in timer.seconds.values())


# Reading ahead


@pytest.fixture
def slow_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every record batch of the manifest takes 50 ms; the shards whose rows were asked for."""
    read, asked = ShardReader.read, list[int]()

    def slowly(reader: ShardReader, shard: Shard) -> Iterator[pa.RecordBatch]:
        asked.append(shard.index)
        for batch in read(reader, shard):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(ShardReader, "read", slowly)
    return asked


def test_rows_are_read_while_others_are_decoded(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write(tmp_path, range(320), kind="bytes", group=32)
    manifest = opened(tmp_path)

    def timed() -> float:
        # 320 images of 6 ms in two threads: a second.
        with armed("decode=delay:0.006"):
            started = time.perf_counter()
            assert len(shard_rows(run(manifest, list(cut(manifest, 64))))) == 5
            return time.perf_counter() - started

    alone = timed()
    slow_rows = request.getfixturevalue("slow_rows")
    both = timed()
    assert len(slow_rows) == 5
    # 10 record batches of 50 ms: one after the other they would take half a second more.
    assert both < alone + 0.35


def test_the_next_shard_is_decoded_while_the_last_batch_is_held(tmp_path: Path) -> None:
    write(tmp_path, range(24), kind="bytes")
    manifest = opened(tmp_path)
    with make_loader(manifest, batch_size=8, prefetch=1) as loader:
        stream = loader.stream(cut(manifest, 8))
        held = next(stream)
        # The first batch is in the encoder's hands, and the images of the next shards are ready.
        assert isinstance(next(stream), ShardRows)
        ready = next(stream)
        assert isinstance(held, ImageBatch)
        assert isinstance(ready, ImageBatch)
        assert (held.shard.index, ready.shard.index) == (0, 1)


def test_closing_does_not_wait_for_all_the_rows(tmp_path: Path, slow_rows: list[int]) -> None:
    write(tmp_path, range(640), kind="bytes", group=32)
    manifest = opened(tmp_path)
    with make_loader(manifest, batch_size=4, prefetch=1) as loader:
        next(loader.stream(cut(manifest, 32)))
        started = time.perf_counter()
    assert time.perf_counter() - started < 1
    assert len(slow_rows) < 20
    assert threads() == []


def test_an_error_of_the_decoding_ends_the_reading(tmp_path: Path, slow_rows: list[int]) -> None:
    write(tmp_path, range(640), kind="bytes", group=32)
    manifest = opened(tmp_path)
    with armed("decode=raise:EIO@40"), pytest.raises(OSError, match="failpoint decode"):
        run(manifest, list(cut(manifest, 32)))
    assert threads() == []
    assert len(slow_rows) < 20


def test_rows_that_weigh_much_wait_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow_rows: list[int]) -> None:
    monkeypatch.setattr("pipeline.engine.loader.AHEAD_BYTES", 1)
    write(tmp_path, range(640), kind="bytes", group=32)
    manifest = opened(tmp_path)
    with make_loader(manifest, batch_size=8, prefetch=1) as loader:
        stream = loader.stream(cut(manifest, 32))
        next(stream)
        time.sleep(0.6)
        # Two shards are in the buffers and in the pool; one waits and one was read behind it.
        assert len(slow_rows) <= 5


# Stopping


def test_closing_early_stops_the_threads(tmp_path: Path) -> None:
    write(tmp_path, range(300), kind="bytes")
    manifest = opened(tmp_path)
    with make_loader(manifest, batch_size=4, prefetch=1) as loader:
        next(loader.stream(cut(manifest, 100)))
        assert "loader" in threads()
        started = time.perf_counter()
    assert time.perf_counter() - started < 2
    assert threads() == []


@pytest.mark.parametrize("step", [pytest.param("read", marks=pytest.mark.slow), "decode"])
def test_closing_waits_for_one_image_and_not_for_a_chunk(tmp_path: Path, step: str) -> None:
    write(tmp_path, range(300), kind="bytes")
    manifest = opened(tmp_path)
    with armed(f"{step}=delay:0.3"):
        with make_loader(manifest, batch_size=4, prefetch=1) as loader:
            next(loader.stream(cut(manifest, 100)))
            started = time.perf_counter()
        assert time.perf_counter() - started < 1.2
    assert threads() == []


def test_an_error_of_the_consumer_stops_the_threads(tmp_path: Path) -> None:
    write(tmp_path, range(300), kind="bytes")
    manifest = opened(tmp_path)

    def consume() -> None:
        with make_loader(manifest, batch_size=4) as loader:
            for _ in loader.stream(cut(manifest, 100)):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert threads() == []


def test_a_closed_loader_ends_its_stream(tmp_path: Path) -> None:
    write(tmp_path, range(300), kind="bytes")
    manifest = opened(tmp_path)
    loader = make_loader(manifest, batch_size=4)
    stream = loader.stream(cut(manifest, 100))
    next(stream)
    loader.close()
    assert len(list(stream)) <= 4
    loader.close()


def test_a_loader_that_never_ran_closes(tmp_path: Path) -> None:
    write(tmp_path, range(10))
    with make_loader(opened(tmp_path)):
        pass


def test_a_loader_streams_once(tmp_path: Path) -> None:
    write(tmp_path, range(10))
    manifest = opened(tmp_path)
    with make_loader(manifest) as loader:
        list(loader.stream([]))
        with pytest.raises(RuntimeError, match="once"):
            next(loader.stream([]))


# Errors of the machine


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def lose_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(0, 5), path)


@pytest.mark.parametrize(
    ("change", "error"),
    [(shorten, ManifestError), (lose_rows, ManifestError), (Path.unlink, StorageError)],
    ids=["truncated", "fewer rows", "deleted"],
)
def test_a_manifest_that_changes_during_the_run_is_an_error(
    tmp_path: Path, change: Callable[[Path], None], error: type[Exception]
) -> None:
    for number, name in enumerate("abc"):
        write(tmp_path, range(number * 400, number * 400 + 400), kind="bytes", name=name, group=400)
    manifest = opened(tmp_path)
    seen = list[int]()

    def consume() -> None:
        with make_loader(manifest, batch_size=4, prefetch=1) as loader:
            for item in loader.stream(cut(manifest, 50)):
                if isinstance(item, ImageBatch):
                    if not seen:
                        change(tmp_path / "c.parquet")
                    seen.extend(item.shard.index * 50 + item.rows)
                    loader.release(item)

    with pytest.raises(error):
        consume()
    # What was read before is sound; a few rows that were on their way are lost with the error.
    assert seen == list(range(len(seen)))
    assert 400 < len(seen) <= 800


def test_an_error_in_the_list_of_shards_reaches_the_consumer(tmp_path: Path) -> None:
    write(tmp_path, range(30), kind="bytes")
    manifest = opened(tmp_path)

    def broken() -> Iterator[Shard]:
        yield from cut(manifest, 30)
        raise LookupError("no more shards")

    with make_loader(manifest, prefetch=8) as loader, pytest.raises(LookupError, match="no more shards"):
        list(loader.stream(broken()))


def test_a_row_group_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, range(30), kind="bytes")
    manifest = opened(tmp_path)
    shard = next(cut(manifest, 30))
    wrong = replace(shard, pieces=(replace(shard.pieces[0], stop=17),))
    with make_loader(manifest) as loader, pytest.raises(ManifestError, match="the rows end early"):
        list(loader.stream([wrong]))


def write_pictures(folder: Path, pictures: list[int | None]) -> None:
    """Rows with the bytes of these pictures; None is no image, and the same bytes each time."""
    cells = [b"no image" if picture is None else encoded(picture) for picture in pictures]
    table = pa.table({"id": [f"row-{row}" for row in range(len(cells))], "image": cells, "kept": range(len(cells))})
    pq.write_table(table, folder / "a.parquet")


@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_bytes_come_once_in_a_shard(tmp_path: Path, workers: int) -> None:
    pictures = [0, 1, 0, None, 2, 2, None, *range(3, 60), 1, 0]
    write_pictures(tmp_path, pictures)
    manifest = opened(tmp_path)
    items = run(manifest, list(cut(manifest, 1000)), workers=workers)
    [rows] = shard_rows(items)
    assert rows.repeats == {2: 0, 5: 4, 64: 1, 65: 0}
    assert set(rows.failures) == {3, 6}
    assert rows.failures[3] == rows.failures[6]
    wanted = [row for row in range(66) if row not in rows.repeats and row not in rows.failures]
    assert [row for batch in batches(items) for row in batch.rows] == wanted
    for batch in batches(items):
        for place, row in enumerate(batch.rows):
            assert tuple(batch.pixels[place][:, 0, 0]) == colour(pictures[row] or 0)


def test_another_shard_has_its_own(tmp_path: Path) -> None:
    write_pictures(tmp_path, [0, 1, 0, 1, 0, 1])
    manifest = opened(tmp_path)
    found = shard_rows(run(manifest, list(cut(manifest, 3))))
    assert [rows.repeats for rows in found] == [{2: 0}, {2: 0}]


def test_each_row_comes_by_itself_if_that_is_wanted(tmp_path: Path) -> None:
    write_pictures(tmp_path, [0, 0, 0])
    manifest = opened(tmp_path)
    items = run(manifest, list(cut(manifest, 3)), once=False)
    assert shard_rows(items)[0].repeats == {}
    assert [batch.rows for batch in batches(items)] == [[0, 1, 2]]


def test_a_repeat_that_is_decoded_first_still_comes_second() -> None:
    found = Repeats()
    assert not found.known(0, 9, b"a")
    assert not found.known(0, 2, b"a")
    assert found.known(0, 9, b"a")
    assert not found.known(0, 3, b"b")
    assert [found.first(row) for row in (2, 3, 4, 9)] == [2, 3, 4, 2]
