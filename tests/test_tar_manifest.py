"""Jobs over WebDataset tars that nothing is unpacked from: their members, their rows, and datasets made of them."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ClusterConfig, Config, ManifestConfig
from pipeline.core.errors import ConfigError, ManifestError, TooManyFailures
from pipeline.core.records import Failure
from pipeline.dataset import verify as verification
from pipeline.dataset.dataset import open_dataset
from pipeline.images.sources.source import Source
from pipeline.job.estimate.estimate import estimate_job
from pipeline.job.main import run_job
from pipeline.job.relabel import relabel
from pipeline.manifest import build, tar_stream, tars
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.shards import ShardReader, cut, refs
from pipeline.nightly.prepare import prepare
from pipeline.nightly.records import NightError, NightOptions
from pipeline.report.thumbnails import find
from pipeline.storage.factory import open_storage
from pipeline.verify import main as verify
from tests.crashes import at
from tests.forks import forks
from tests.jobs import config_for, content, scene
from tests.s3 import BUCKET, Proxy, moto_server, pointed_at, proxy_to

KEPT = ["txt", "json"]


def tar_of(
    members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w", kind: int = tarfile.GNU_FORMAT
) -> bytes:
    """The bytes of a tar with these members; a list may name one twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=kind) as tar:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def opened(path: Path | str, **values: Any) -> Manifest:
    return open_manifest(ManifestConfig(path=str(path), **values))


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Every row of the shards of a manifest of tars, as the job reads them."""
    with ShardReader(manifest) as reader:
        return [row for shard in cut(manifest, 8) for batch in reader.read(shard) for row in batch.to_pylist()]


def read(tmp_path: Path, data: bytes, name: str = "t.tar", **values: Any) -> list[dict[str, Any]]:
    return rows_of(opened(write(tmp_path / name, data), **values))


def images(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    return {row["id"]: row["path"] for row in rows}


def damage_of(path: str) -> tuple[list[bytes], str]:
    """The images of a damaged tar, and the failure of the row behind them."""
    with ShardReader(opened(path)) as reader:
        [shard] = cut(reader.manifest, 8)
        *found, last = [ref for batch in reader.read(shard) for ref in refs(reader.manifest, batch)]
    assert last.id == tars.stem_of(path)
    failure = Source(root="/", max_bytes=2**20).read(last)
    assert isinstance(failure, Failure)
    assert failure.status == "damaged_tar"
    return [ref.data for ref in found if ref.data is not None], failure.error


# --- what is a manifest of tars


@pytest.mark.parametrize("given", ["", "*.tar", "{000..002}.tar", "00[0-9].tar", "memory"])
def test_a_folder_a_glob_and_a_range_are_all_their_tars_in_order(tmp_path: Path, given: str) -> None:
    import fsspec

    for number in range(3):
        write(tmp_path / "tars" / f"{number:03}.tar", tar_of({"1.jpg": b"x" * (number + 1)}))
    path = str(tmp_path / "tars" / given)
    if given == "memory":
        fsspec.filesystem("memory").put(str(tmp_path / "tars"), "/own", recursive=True)
        path = "memory://own"
    manifest = opened(path)
    assert not manifest.counted
    assert manifest.image_kind == "bytes"
    assert images(rows_of(manifest)) == {"000/1": b"x", "001/1": b"xx", "002/1": b"xxx"}


def test_the_tars_of_a_folder_are_taken_at_any_depth_and_others_of_its_files_are_not(tmp_path: Path) -> None:
    for name in ("a.tar", "deep/b.TAR", "c.tar.gz", "d.tgz"):
        data = tar_of({"1.jpg": name.encode()}, "w:gz" if name.endswith("gz") else "w")
        write(tmp_path / "tars" / name, data)
    write(tmp_path / "tars" / ".hidden.tar", b"no tar")
    write(tmp_path / "tars" / "notes.txt", b"no tar")
    assert images(rows_of(opened(tmp_path / "tars"))) == {
        "a/1": b"a.tar", "c/1": b"c.tar.gz", "d/1": b"d.tgz", "b/1": b"deep/b.TAR",
    }  # fmt: skip


def test_a_parquet_manifest_beside_the_tars_is_the_manifest(tmp_path: Path) -> None:
    tar = write(tmp_path / "t.tar", tar_of({"1.jpg": b"x"}))
    build.from_tars([tar], str(tmp_path / "m.parquet"))
    assert opened(tmp_path).counted


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["0.tar"], "{0..1}.tar", "1.tar: no such file"),
        (["0.tar"], "{3..1}.tar", "no tar is there"),
        (["0.tar"], "x*.tar", "no such file, folder or match"),
        (["0.tar", "0.txt"], "0.*", "0.txt is none"),
        (["a/0.tar", "b/0.tar"], "", "two tars have the same name"),
        (["a/0.tar", "a/0.tar.gz"], "", "two tars have the same name"),
    ],
)
def test_what_is_no_manifest_of_tars_is_refused(tmp_path: Path, names: list[str], given: str, said: str) -> None:
    for name in names:
        write(tmp_path / "tars" / name, tar_of({"1.jpg": b"x"}))
    with pytest.raises(Exception, match=re.escape(said)) as raised:
        opened(tmp_path / "tars" / given)
    assert getattr(raised.value, "exit_code", 1) != 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image": None, "text": "txt"}, "manifest.image=null"),
        ({"keep": ["caption"]}, "manifest.keep: no column 'caption'"),
        ({"text": "caption"}, "id (string), path (binary), txt (string), json (string), cls (string)"),
        ({"id": "txt"}, "manifest.id=txt"),
        ({"image": "id"}, "manifest.image has the same name"),
    ],
)
def test_columns_that_tars_do_not_have_are_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    tar = write(tmp_path / "t.tar", tar_of({"1.jpg": b"x"}))
    with pytest.raises(ManifestError, match=re.escape(said)):
        opened(tar, **values)


# --- members


LONG = "folder/" * 30 + "0001"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_rows_are_those_of_the_manifest_of_the_same_tar(tmp_path: Path, kind: int, mode: str) -> None:
    long = LONG if kind != tarfile.USTAR_FORMAT else "folder/" * 15 + "0001"
    members = {
        "0001.jpg": os.urandom(1000), "0001.txt": "a cät".encode(), "v1.0/a.left.jpg": b"left",
        "v1.0/a.right.JPG": b"right", "v1.0/a.json": b'{"n": 1}', "._0002.jpg": b"book",
        "sub/0002.png": os.urandom(513), "alone.txt": b"no image", "ü.webp": b"x", f"{long}.GIF": b"long",
        "b.seg.png": b"only", "last.npy": b"\0" * 700,
    }  # fmt: skip
    found = read(tmp_path, tar_of(members, mode, kind), keep=KEPT)
    build.from_tars([write(tmp_path / "plain" / "t.tar", tar_of(members, "w", kind))], str(tmp_path / "m.parquet"))
    table = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert [(row["id"], row["txt"], row["json"]) for row in found] == [
        (row["id"], row["txt"], row["json"]) for row in table
    ]
    manifest = opened(tmp_path / "m.parquet")
    source = Source(root=manifest.root, max_bytes=2**20)
    with ShardReader(manifest) as reader:
        [shard] = cut(manifest, 100)
        ranges = [ref for batch in reader.read(shard) for ref in refs(manifest, batch)]
    assert [row["path"] for row in found] == [source.read(ref) for ref in ranges]


def test_columns_have_the_names_of_the_config(tmp_path: Path) -> None:
    [row] = read(tmp_path, tar_of({"1.jpg": b"x", "1.cls": b"7"}), id="key", image="jpg", keep=["cls"])
    assert row == {"key": "t/1", "jpg": b"x", "cls": "7"}


def test_links_folders_devices_and_names_that_climb_are_names(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE), ("f.jpg", tarfile.FIFOTYPE), ("empty.jpg", tarfile.REGTYPE),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("../../up.jpg")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"up"))
    assert images(read(tmp_path, buffer.getvalue())) == {"t/empty": b"", "t/../../up": b"up"}
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]


def test_names_that_are_no_utf_8_stay_apart(tmp_path: Path) -> None:
    data = tar_of([("aX.jpg", b"1"), ("aY.jpg", b"2")], kind=tarfile.USTAR_FORMAT)
    for byte, letter in ((b"\xfe", b"X"), (b"\xff", b"Y")):
        at, name = data.index(b"a" + letter + b".jpg"), b"a" + byte + b".jpg"
        header = bytearray(data[at : at + 512])
        header[: len(name)] = name
        header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        data = data[:at] + bytes(header) + data[at + 512 :]
    assert images(read(tmp_path, data)) == {"t/a\\xfe": b"1", "t/a\\xff": b"2"}


def test_sparse_members_are_passed_over(tmp_path: Path) -> None:
    sparse = bytearray(tar_of({"s.jpg": b"data" * 100})[:1024])
    # The next block says more of its holes, and one more follows it.
    sparse[156:157], sparse[482] = b"S", 1
    sparse[148:156] = b"%06o\0 " % (256 + sum(sparse[:148]) + sum(sparse[156:512]))
    more = bytearray(512)
    more[504] = 1
    data = bytes(sparse[:512] + more + bytes(512) + sparse[512:])
    assert images(read(tmp_path, data + tar_of({"1.jpg": b"x"}))) == {"t/1": b"x"}


def test_no_row_is_lost_where_a_key_comes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        ("1.jpg", b"a"), ("1.JPG", b"b"), ("1.png", b"c"), ("2.jpg", b"d"), ("1.jpg", b"e"), ("2.jpg", b"f"),
        ("3.jpg", b"g"), ("2.jpg", b"h"), ("2#2.jpg", b"i"), ("4.jpg", b"j"), ("3.txt", b"stands apart"),
    ]  # fmt: skip
    found = read(tmp_path, tar_of(members), keep=["txt"])
    assert [row["path"] for row in found] == [data for name, data in members if not name.endswith(".txt")]
    assert len({row["id"] for row in found}) == len(found)
    assert [row["id"] for row in found][:5] == ["t/1.jpg", "t/1.jpg#2", "t/1.png", "t/2", "t/1"]
    assert {row["txt"] for row in found} == {None}
    said = caplog.text
    assert said.count("the key '2' comes again") == 0 or said.count("comes again") == 1
    assert "t.tar: the texts of the key '3' do not stand next to its image" in said


# --- damage


SOUND = {f"{number}.jpg": bytes([number]) * 2000 for number in range(5)}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, "the last header", "the end"])
def test_no_row_of_a_torn_tar_is_taken_for_all(tmp_path: Path, zipped: bool, share: float | str) -> None:
    data = tar_of(SOUND)
    whole = gzip.compress(data) if zipped else data
    if share == "the last header":
        torn = gzip.compress(data[: 4 * 2560]) if zipped else data[: 4 * 2560]
    elif share == "the end":
        torn = whole[:-1] if zipped else data[: 5 * 2560]
    else:
        torn = whole[: int(len(whole) * float(share))]
    assert len(read(tmp_path, whole)) == 5
    if share in (0.0, 0.2) and (zipped or not share):
        # Nothing of it can be read, and the manifest has no other tar.
        with pytest.raises(ManifestError, match=r"torn\.tar: not a sound tar"):
            opened(write(tmp_path / "torn.tar", torn))
        return
    found, error = damage_of(write(tmp_path / "torn.tar", torn))
    assert found == list(SOUND.values())[: len(found)]
    assert "torn.tar: not a sound tar" in error
    assert "(at byte" in error


def with_a_flipped_byte(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 0xFF]) + data[-19:]


DAMAGES: dict[str, tuple[Callable[[bytearray], Any], str]] = {
    "no tar": (lambda data: data.__setitem__(slice(None), b"<html>" * 1000), "a header is not one of a tar"),
    "a header": (lambda data: data.__setitem__(slice(2560, 2760), b"\1" * 200), "a header is not one of a tar"),
    "a sum": (lambda data: data.__setitem__(2560 + 150, data[2560 + 150] ^ 1), "a header is not one of a tar"),
    "two tars": (lambda data: data.extend(tar_of({"9.jpg": b"x"})), "something stands behind its end"),
    "xz": (lambda data: data.__setitem__(slice(None), tar_of(SOUND, "w:xz")), "compressed by xz"),
    "bzip2": (lambda data: data.__setitem__(slice(None), tar_of(SOUND, "w:bz2")), "compressed by bzip2"),
    "gzip": (lambda data: data.__setitem__(slice(None), with_a_flipped_byte(gzip.compress(data))), "its gzip data are"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_damage_of_a_tar_is_a_row_behind_its_images(tmp_path: Path, damage: str) -> None:
    data = bytearray(tar_of(SOUND))
    do, said = DAMAGES[damage]
    do(data)
    path = write(tmp_path / "t.tar", bytes(data))
    if damage in ("no tar", "xz", "bzip2", "gzip"):
        with pytest.raises(ManifestError, match=rf"t\.tar: not a sound tar, .*{said}"):
            opened(path)
        write(tmp_path / "0.tar", tar_of({"1.jpg": b"x"}))
        rows = rows_of(opened(tmp_path))
        assert [row["id"] for row in rows] == ["0/1", "t"]
        return
    found, error = damage_of(path)
    assert found == list(SOUND.values())[: len(found)]
    assert len(found) == {"a header": 1, "a sum": 1}.get(damage, 5)
    assert said in error


def test_every_flipped_bit_of_a_header_is_found_or_changes_nothing(tmp_path: Path) -> None:
    data = tar_of({"1.jpg": b"x"})
    # Of the numbers of a checksum, some bytes mean nothing.
    found = 0
    for place in range(512):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        try:
            rows = images(read(tmp_path, bytes(flipped)))
        except ManifestError:
            found += 1
        else:
            assert rows == {"t/1": b"x"}, place
    assert found > 500


def test_several_gzip_streams_and_zeros_behind_them_are_one_tar(tmp_path: Path) -> None:
    data = tar_of(SOUND)
    zipped = gzip.compress(data[:3000]) + gzip.compress(data[3000:]) + b"\0" * 1000
    assert len(read(tmp_path, zipped, "t.tar.gz")) == 5


@pytest.mark.parametrize("torn", [False, True])
def test_a_tar_that_changed_since_the_job_began_is_an_error(tmp_path: Path, torn: bool) -> None:
    manifest = opened(write(tmp_path / "t.tar", tar_of(SOUND)))
    data = tar_of({**SOUND, "more.jpg": b"x" * 9000})
    write(tmp_path / "t.tar", data[:9000] if torn else data)
    with pytest.raises(ManifestError, match=r"t\.tar: has changed since the job began"):
        rows_of(manifest)


# --- limits


@pytest.mark.parametrize("zipped", [False, True])
def test_an_image_over_the_limit_is_a_failed_row_and_not_memory(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w:gz" if zipped else "w") as tar:
        for name, size in (("a.jpg", 10), ("bomb.jpg", 60 << 20), ("skipped.bin", 60 << 20), ("z.jpg", 10)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    manifest = opened(path)
    # Arrow imports what it may need at its first array.
    rows_of(opened(write(tmp_path / "small.tar", tar_of({"1.jpg": b"x"}))))
    tracemalloc.start()
    try:
        with ShardReader(manifest, max_bytes=1000) as reader:
            [shard] = cut(manifest, 8)
            found = [ref for batch in reader.read(shard) for ref in refs(manifest, batch)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20
    read_them = [Source(root="/", max_bytes=1000).read(ref) for ref in found]
    assert [each.status if isinstance(each, Failure) else len(each) for each in read_them] == [10, "too_many_bytes", 10]


def test_a_hostile_header_takes_no_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info.type, info.size = kind, 4 << 30
        with pytest.raises(ManifestError, match="a name is too long"):
            read(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    info.type = tarfile.XHDTYPE
    for records in (b"9999 path=x\n", b"-5 path=x\n", b"3 \n", b"12 size=-9\n\n", b"nothing"):
        info.size = len(records)
        with pytest.raises(ManifestError, match="not a sound tar"):
            read(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + records.ljust(512, b"\0") + tar_of({"1.jpg": b"x"}))


def test_endless_zeros_behind_the_end_are_not_read_to_their_end(tmp_path: Path) -> None:
    zipper = zlib.compressobj(wbits=31)
    zeros = bytes(1 << 20)
    data = zipper.compress(tar_of({"1.jpg": b"x"})) + b"".join(zipper.compress(zeros) for _ in range(200))
    found, error = damage_of(write(tmp_path / "t.tar", data + zipper.flush()))
    assert found == [b"x"]
    assert "something stands behind its end" in error


def test_texts_and_keys_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "TEXT_BYTES", 100)
    data = tar_of({"1.jpg": b"x", "1.json": b"x" * 101})
    assert [row["id"] for row in read(tmp_path, data)] == ["t/1"]
    assert [row["id"] for row in read(tmp_path, data, keep=["json"])] == ["t/1", "t"]
    monkeypatch.setattr(tars, "SAMPLE_BYTES", 10_000)
    found, error = damage_of(write(tmp_path / "t.tar", tar_of([("1.jpg", b"x" * 3000)] * 4)))
    assert len(found) == 3
    assert "the key 1 has 12,072 bytes, more than the 10,000" in error


# --- jobs


def scenes(count: int, first: int = 0) -> dict[str, bytes]:
    """Members of so many samples, with a text beside every second one."""
    found: dict[str, bytes] = {}
    for number in range(first, first + count):
        data, label = scene(number)
        found[f"d.x/{number:04}.jpg"] = data
        if number % 2:
            found[f"d.x/{number:04}.txt"] = label.encode()
        found[f"d.x/{number:04}.json"] = json.dumps({"n": number}).encode()
    return found


COUNTS = (13, 0, 8, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tars: one is zipped, one has no member, one has no image but others; two images are damaged."""
    folder = tmp_path_factory.mktemp("tars")
    first = 0
    for number, count in enumerate(COUNTS):
        members = scenes(count, first)
        if number == 0:
            members["d.x/0003.jpg"] = b"no picture at all"
            members["d.x/0007.jpg"] = b""
        if number == 2:
            members["e/again.jpg"] = members["d.x/0013.jpg"]
        name = f"{number:02}.tar.gz" if number == 2 else f"{number:02}.tar"
        write(folder / "tars" / name, tar_of(members, "w:gz" if number == 2 else "w"))
        first += count
    write(folder / "tars" / "99.tar", tar_of({"readme.md": b"no image", "1.txt": b"x"}))
    return folder


ROWS = sum(COUNTS) + 1


def job(folder: Path, output: Path, **groups: dict[str, Any]) -> Config:
    manifest = {"image": "path", "keep": KEPT, "shard_rows": 0, **groups.pop("manifest", {})}
    return config_for(folder / "tars", output, manifest=manifest, **groups)


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Config:
    config = job(folder, folder / "unbroken")
    report = run_job(config)
    assert report.total_rows == report.rows == ROWS
    assert report.counts == {"ok": ROWS - 2, "empty": 1, "not_an_image": 1}
    return config


def test_a_job_over_tars_has_the_rows_of_one_over_their_manifest(folder: Path, unbroken: Config) -> None:
    found = pa.concat_tables(open_dataset(unbroken.output.dir).stream(["id", "txt", "json", "status", "embedding"]))
    # A manifest of the same bytes.
    rows = pa.Table.from_pylist(rows_of(opened(folder / "tars", keep=KEPT)))
    pq.write_table(rows.rename_columns(["id", "txt", "json", "image"]), folder / "m.parquet")
    config = config_for(folder / "m.parquet", folder / "as-parquet", manifest={"keep": KEPT})
    run_job(config)
    wanted = pa.concat_tables(open_dataset(config.output.dir).stream(found.column_names))
    assert found.num_rows == ROWS
    for name in ("id", "txt", "json", "status"):
        assert found[name].to_pylist() == wanted[name].to_pylist()
    one, other = (np.stack(table["embedding"].drop_null().to_pylist()) for table in (found, wanted))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert found["id"].to_pylist()[:2] == ["00/d.x/0000", "00/d.x/0001"]
    assert found["txt"].null_count > 0


def test_the_plan_knows_the_tars_and_the_commits_their_rows(unbroken: Config, folder: Path) -> None:
    out = Path(unbroken.output.dir)
    plan = json.loads((out / "_plan.json").read_bytes())
    assert (plan["rows"], plan["shards"], plan["shard_rows"]) == (None, 5, None)
    assert plan["fingerprints"]["manifest"]["rows"] is None
    assert json.loads((out / "_SUCCESS").read_bytes())["rows"] == ROWS
    commits = [json.loads(path.read_bytes())["rows"] for path in sorted(out.glob("_commits/*.json"))]
    assert commits == [13, 0, 9, 5, 0]
    assert len(open_dataset(str(out)).starts) == 5
    assert open_dataset(str(out)).plan.rows == ROWS


def test_verify_reads_a_dataset_of_tars_and_has_damage_done_again(
    unbroken: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = unbroken.changed({"output.dir": str(tmp_path / "out")})
    run_job(config)
    assert verify([config.output.dir]) == 0
    victim = next((tmp_path / "out").glob("part-00002-*"))
    victim.write_bytes(victim.read_bytes()[:-9])
    assert verify([config.output.dir]) != 0
    assert verify([config.output.dir, "--repair"]) == 0, capsys.readouterr()
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))
    assert verification.verify(open_storage(config.output.dir)).rows == ROWS


@pytest.mark.parametrize("parts", [["1/2", "2/2"], ["auto"], ["2/5", "1/5", "3/5", "4/5", "5/5"]])
def test_parts_make_the_same_bytes(unbroken: Config, tmp_path: Path, parts: list[str]) -> None:
    for part in parts:
        run_job(unbroken.changed({"output.dir": str(tmp_path / "out"), "cluster": ClusterConfig(part=part)}))
    found, wanted = content(tmp_path / "out"), content(Path(unbroken.output.dir))
    assert {name: data for name, data in found.items() if not name.startswith("_parts/")} == wanted


@pytest.mark.parametrize(
    "loader", [{"workers": 1}, {"workers": 3, "prefetch": 1}, {"feeders": 2, "isolation": "process"}]
)
def test_workers_and_feeders_make_the_same_bytes(unbroken: Config, tmp_path: Path, loader: dict[str, Any]) -> None:
    config = unbroken.changed({"output.dir": str(tmp_path / "out"), **{f"loader.{k}": v for k, v in loader.items()}})
    run_job(config)
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


@pytest.mark.slow
def test_a_cluster_makes_the_same_bytes(unbroken: Config, tmp_path: Path) -> None:
    cluster = ClusterConfig(name="local", workers=2)
    run_job(unbroken.changed({"output.dir": str(tmp_path / "out"), "cluster": cluster}))
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


KILLED = [
    *("rows=kill@3", "encoded=kill@3", "part.written=kill@2", "part.published=kill@3", "commit.done=kill@1"),
    *("commit.done=kill@4", "finalize.checked=kill"),
]


@pytest.mark.parametrize("rule", KILLED)
def test_a_killed_job_goes_on(unbroken: Config, tmp_path: Path, rule: str) -> None:
    child = forks().start("tests.forks:job", at(unbroken, tmp_path / "out"), failpoints=rule)
    assert child.wait() < 0, child.said()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    report = run_job(unbroken.changed({"output.dir": str(tmp_path / "out")}))
    assert report.total_rows == ROWS
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


@pytest.mark.parametrize("isolation", ["none", "feeders"])
def test_a_torn_tar_is_a_failed_row_and_the_exit_code_of_a_job(folder: Path, tmp_path: Path, isolation: str) -> None:
    for path in (folder / "tars").iterdir():
        data = path.read_bytes()
        write(tmp_path / "tars" / path.name, data[: len(data) // 2] if path.name == "03.tar" else data)
    loader = {"feeders": 2, "isolation": "process"} if isolation == "feeders" else {}
    config = job(tmp_path, tmp_path / "out", loader=loader)
    with pytest.raises(TooManyFailures, match=r"damaged_tar 1.*images of damaged tars have no rows"):
        run_job(config)
    assert verify([str(tmp_path / "out")]) == 0
    last = pq.read_table(next((tmp_path / "out").glob("part-00003-*"))).to_pylist()
    assert 1 < len(last) < 6
    assert [row["status"] for row in last] == ["ok"] * (len(last) - 1) + ["damaged_tar"]
    assert (last[-1]["id"], last[-1]["txt"], last[-1]["embedding"]) == ("03", None, None)
    assert "03.tar: not a sound tar" in last[-1]["error"]
    assert json.loads((tmp_path / "out" / "_report.json").read_bytes())["exit_code"] == 3


def test_other_tars_are_another_dataset(unbroken: Config, folder: Path, tmp_path: Path) -> None:
    for path in (folder / "tars").iterdir():
        write(tmp_path / "tars" / path.name.replace("00", "77"), path.read_bytes())
    with pytest.raises(Exception, match="holds a dataset of another job"):
        run_job(unbroken.changed({"manifest.path": str(tmp_path / "tars")}))


def test_tars_without_any_image_make_no_dataset(tmp_path: Path) -> None:
    write(tmp_path / "tars" / "a.tar", tar_of({"1.txt": b"x"}))
    with pytest.raises(ManifestError, match="no tar of the manifest holds an image"):
        run_job(job(tmp_path, tmp_path / "out"))


def test_the_command_takes_a_range_without_further_quotes(unbroken: Config, folder: Path, tmp_path: Path) -> None:
    path = f"manifest.path={folder}/tars/{{00..01}}.tar"
    options = ("backend.device=cpu", "loader.batch_size=8", "errors.max_fraction=0.5", "report.html=false")
    child = forks().start("tests.forks:run_command", path, f"output.dir={tmp_path / 'out'}", *options)
    assert child.wait() == 0, child.said()
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_bytes())["rows"] == COUNTS[0]


def test_rows_of_a_shard_are_not_chosen(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.shard_rows.*python -m pipeline\.manifest tar"):
        run_job(job(folder, tmp_path / "out", manifest={"shard_rows": 24}))


def test_a_night_is_of_a_manifest(folder: Path, tmp_path: Path) -> None:
    store = open_storage(str(tmp_path / "store"))
    with pytest.raises(NightError, match=r"python -m pipeline\.manifest tar"):
        prepare(job(folder, tmp_path / "out"), NightOptions(store=store.url), store, "2026-01-01")


def test_captions_beside_images_come_from_the_same_reading(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens: list[str] = []
    real = tar_stream.TarStream.__init__

    def counted(self: tar_stream.TarStream, url: str, size: int, digest: str = "", **options: Any) -> None:
        if not options:
            opens.append(url)
        real(self, url, size, digest, **options)

    monkeypatch.setattr(tar_stream.TarStream, "__init__", counted)
    run_job(job(folder, tmp_path / "out", manifest={"keep": [], "text": "txt"}))
    assert len(opens) == 5
    table = pa.concat_tables(open_dataset(str(tmp_path / "out")).stream(["txt", "text_embedding", "similarity"]))
    assert table["txt"].null_count == table["text_embedding"].null_count > 0
    assert table["similarity"].null_count < ROWS


def test_the_pictures_of_a_report_are_those_of_their_rows(unbroken: Config, folder: Path) -> None:
    manifest = opened(folder / "tars").with_rows([13, 0, 9, 5, 0])
    assert manifest.rows == ROWS
    found = dict(find(manifest, [0, 12, 13, 22, 26], seconds=60))
    assert [found[number].id for number in found] == [
        "00/d.x/0000", "00/d.x/0012", "02/d.x/0013", "03/d.x/0021", "03/d.x/0025",
    ]  # fmt: skip


def test_labels_can_be_given_anew(unbroken: Config, tmp_path: Path) -> None:
    config = unbroken.changed({"output.dir": str(tmp_path / "new"), "prompts.labels": ["red circle", "blue square"]})
    relabel(open_dataset(unbroken.output.dir), config)
    found = open_dataset(str(tmp_path / "new"))
    assert found.plan.rows == ROWS
    assert not found.plan.counted


def test_an_estimate_expects_rows_by_bytes(folder: Path, tmp_path: Path) -> None:
    config = job(folder, tmp_path / "out", run={"dry": True})
    found = estimate_job(config)
    assert ROWS / 3 < found.rows < 3 * ROWS
    assert (found.shards, found.left_shards, found.shard_rows) == (5, 5, 0)
    assert found.seconds > 0
    assert not (tmp_path / "out").exists()


# --- S3


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with (
        moto_server(tmp_path_factory.mktemp("moto") / "log") as server,
        proxy_to(server) as proxy,
        pointed_at(proxy.url),
    ):
        yield proxy


@pytest.mark.slow
def test_tars_in_s3_are_read_once_with_few_requests(
    proxy: Proxy, folder: Path, unbroken: Config, tmp_path: Path
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=proxy.upstream, key="test", secret="test")
    for path in sorted((folder / "tars").iterdir()):
        fs.pipe_file(f"{BUCKET}/tars/{path.name}", path.read_bytes())
    config = unbroken.changed({"output.dir": str(tmp_path / "out"), "manifest.path": f"s3://{BUCKET}/tars"})
    proxy.reset()
    run_job(config)
    got = [path for verb, path, _ in proxy.requests if verb == "GET" and ".tar" in path.partition("?")[0]]
    # The beginning of each of the five for its rows, and some again for the gates of the backend; all of it once.
    assert len(got) <= 5 * 3, got
    assert len(proxy.seen("HEAD", ".tar")) <= 5 * 2
    found, wanted = content(tmp_path / "out"), content(Path(unbroken.output.dir))
    parts = [pq.read_table(tmp_path / "out" / name) for name in sorted(found) if name.startswith("part-")]
    there = [pq.read_table(Path(unbroken.output.dir) / name) for name in sorted(wanted) if name.startswith("part-")]
    assert [table.drop_columns([]).to_pylist() for table in parts] == [table.to_pylist() for table in there]
    # A glob and a large folder are listed, without a request for each tar.
    for number in range(20):
        fs.pipe_file(f"{BUCKET}/many/{number:02}.tar", tar_of({"1.jpg": b"x"}))
    proxy.reset()
    for given in ("*.tar", "{00..19}.tar", ""):
        assert len(opened(f"s3://{BUCKET}/many/{given}").files) == 20
    # One is for a file of the name of the glob.
    assert len(proxy.seen("HEAD", ".tar")) <= 1
    # Requests that fail are tried again.
    proxy.throw_dice(0.2, seed=3)
    run_job(config.changed({"output.dir": str(tmp_path / "again")}))
    proxy.reset()
    assert content(tmp_path / "again") == found


@pytest.mark.slow
def test_a_tar_in_s3_is_read_in_large_pieces_and_one_that_was_replaced_is_found(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=proxy.upstream, key="test", secret="test")
    data = tar_of({f"{number}.jpg": os.urandom(1 << 20) for number in range(40)})
    fs.pipe_file(f"{BUCKET}/large/0.tar", data)
    manifest = opened(f"s3://{BUCKET}/large/{{0..0}}.tar")
    proxy.reset()
    assert len(rows_of(manifest)) == 40
    assert len(proxy.seen("GET", "large/0.tar")) == 3
    fs.pipe_file(f"{BUCKET}/large/0.tar", data[:-1024] + bytes(1023) + b"\0")
    assert len(rows_of(manifest)) == 40
    other = tar_of({f"{number}.jpg": os.urandom(1 << 20) for number in range(40)})
    fs.pipe_file(f"{BUCKET}/large/0.tar", other)
    with pytest.raises(ManifestError, match="has changed since the job began"):
        rows_of(manifest)
