"""A folder of images in S3: its manifest, and the job over it."""

from __future__ import annotations

import io
import random
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("moto", reason="needs the extra compat")
pytest.importorskip("s3fs", reason="needs the extra s3")

import s3fs

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import StorageError
from pipeline.core.records import ImageRef
from pipeline.dataset.dataset import open_dataset
from pipeline.images.sources.source import Source
from pipeline.images.sources.spans import Member, Spans
from pipeline.job.main import run_job
from pipeline.manifest import __main__ as command
from pipeline.manifest.files import holds_images
from pipeline.manifest.manifest import open_manifest
from pipeline.manifest.shards import ShardReader, cut, refs
from pipeline.nightly.folder import folder_job
from tests.jobs import config_for, content, scene
from tests.s3 import BUCKET, Proxy, moto_server, pointed_at, proxy_to

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url, proxy_to(url) as proxy, pointed_at(proxy.url):
        yield proxy


@pytest.fixture
def place(proxy: Proxy) -> str:
    """The address of a folder with four images, junk, and the empty object that some tools write for a folder."""
    fs, folder = s3fs.S3FileSystem(), f"{BUCKET}/{uuid.uuid4().hex}/my photos"
    for number in range(4):
        fs.pipe_file(f"{folder}/{number // 2}/ü {number}%20.jpg", scene(number)[0])
    for name in ("", "0/", "__MACOSX/0/x.jpg", "notes.txt", "._a.jpg"):
        fs.call_s3("put_object", Bucket=BUCKET, Key=f"{folder}/{name}".partition("/")[2], Body=b"")
    return f"s3://{folder}"


def test_the_images_of_a_bucket_are_a_manifest(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{place}-manifest.parquet"
    assert command.main(["folder", f"{place}/", out]) == 0
    said = capsys.readouterr().out
    assert "1 .txt" in said
    assert "folders __MACOSX (1)" in said
    with s3fs.S3FileSystem().open(out, "rb") as file:
        table = pq.read_table(file)
    assert table["id"].to_pylist() == [f"{number // 2}/ü {number}%20.jpg" for number in range(4)]
    assert table["size"].to_pylist() == [len(scene(number)[0]) for number in range(4)]
    assert table["modified"].null_count == 0
    assert table.schema.metadata[b"pipeline.root"].decode() == place


def test_a_bucket_of_images_is_a_job_and_embeds_what_is_new(place: str, tmp_path: Path) -> None:
    assert holds_images(place)
    config = config_for(Path("unused"), tmp_path / "out", manifest={"path": place, "image": "path", "keep": []})
    run_job(folder_job(config, tmp_path, run=""))
    assert open_dataset(str(tmp_path / "out")).vectors == 4
    fs = s3fs.S3FileSystem()
    fs.pipe_file(f"{place}/9.jpg", scene(9)[0])
    fs.rm(f"{place}/0/ü 0%20.jpg")
    run_job(folder_job(config, tmp_path, run=""))
    dataset = open_dataset(str(tmp_path / "out"))
    assert [str(row) for table in dataset.stream(["id"]) for row in table["id"]] == [
        "0/ü 1%20.jpg", "1/ü 2%20.jpg", "1/ü 3%20.jpg", "9.jpg",
    ]  # fmt: skip
    assert dataset.vectors == 4


@pytest.mark.parametrize("name", ["nosuchfolder", "my photos/nosuch"])
def test_a_folder_that_a_bucket_does_not_have_is_refused(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    address = f"s3://{BUCKET}/{name}"
    assert command.main(["folder", address, str(tmp_path / "m.parquet")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {address}: no such folder")


def bucket_of_tars(folder: Path, rows: int) -> tuple[str, dict[str, object]]:
    """Two tars of scenes in S3 and their manifest there; the settings of a job over it."""
    address = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    fs, names = s3fs.S3FileSystem(), []
    for number in range(2):
        with tarfile.open(folder / "t.tar", "w") as tar:
            for row in range(number * rows // 2, (number + 1) * rows // 2):
                info = tarfile.TarInfo(f"{row:04}.jpg")
                info.size = len(scene(row)[0])
                tar.addfile(info, io.BytesIO(scene(row)[0]))
        names.append(f"{address}/{number}.tar")
        fs.put_file(str(folder / "t.tar"), names[-1])
    assert command.main(["tar", *names, f"{address}/m.parquet"]) == 0
    return address, {"path": f"{address}/m.parquet", "image": "path", "keep": [], "shard_rows": 40}


def test_the_members_of_a_tar_in_a_bucket_take_one_request(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = bucket_of_tars(tmp_path, 120)
    proxy.reset()
    run_job(config_for(Path("unused"), tmp_path / "together", manifest=rows))
    # Each shard begins record batches of its own; the gates and the page read some rows by themselves.
    together = len(proxy.seen("GET", ".tar"))
    proxy.reset()
    monkeypatch.setattr(Spans, "join", lambda self, refs: refs)
    run_job(config_for(Path("unused"), tmp_path / "singly", manifest=rows))
    singly = len(proxy.seen("GET", ".tar"))
    assert content(tmp_path / "together") == content(tmp_path / "singly")
    assert singly - together == 120 - 4
    assert open_dataset(str(tmp_path / "together")).vectors == 120


@pytest.mark.parametrize("fault", ["500", "cut", "half"])
def test_a_request_for_members_that_fails_is_made_again(tmp_path: Path, proxy: Proxy, fault: str) -> None:
    address, _ = bucket_of_tars(tmp_path, 20)
    manifest = open_manifest(ManifestConfig(path=f"{address}/m.parquet"))
    source = Source(root=manifest.root, max_bytes=10**6)
    with ShardReader(manifest) as reader:
        found = [ref for shard in cut(manifest, 20) for batch in reader.read(shard) for ref in refs(manifest, batch)]
    proxy.reset()
    proxy.inject(fault, "GET", ".tar", times=2)
    spans = Spans(source)
    read = [ref.read(source) if isinstance(ref, Member) else b"" for ref in spans.join(found)]
    spans.close()
    assert read == [scene(row)[0] for row in range(20)]
    assert len(proxy.seen("GET", ".tar")) < 20


@pytest.mark.parametrize("fault", ["403", "409"])
def test_a_store_that_refuses_ends_as_with_single_reads(tmp_path: Path, proxy: Proxy, fault: str) -> None:
    address, _ = bucket_of_tars(tmp_path, 4)
    refs_ = [ImageRef(id=row, path=f"0.tar#bytes={row * 10}-{row * 10 + 10}") for row in range(4)]
    source = Source(root=address, max_bytes=10**6)
    proxy.inject(fault, "GET", ".tar", times=1000)
    spans = Spans(source)

    def outcome(ref: ImageRef) -> str:
        try:
            return str(ref.read(source) if isinstance(ref, Member) else source.read(ref))
        except StorageError as error:
            return str(error)

    assert [outcome(ref) for ref in spans.join(refs_)] == [outcome(ref) for ref in refs_]
    spans.close()
    proxy.reset()


def test_images_in_a_manifest_in_a_bucket_take_few_requests(tmp_path: Path, proxy: Proxy) -> None:
    noise, count, address = random.Random(0), 3000, f"s3://{BUCKET}/{uuid.uuid4().hex}.parquet"
    cells = {"id": range(count), "image": [noise.randbytes(20_000) for _ in range(count)]}
    pq.write_table(pa.table(cells), tmp_path / "m.parquet", compression="none", use_dictionary=False)
    s3fs.S3FileSystem().put_file(str(tmp_path / "m.parquet"), address)
    manifest = open_manifest(ManifestConfig(path=address, image="image"))
    proxy.reset()
    with ShardReader(manifest) as reader:
        assert sum(batch.num_rows for shard in cut(manifest, 500) for batch in reader.read(shard)) == count
    # The footer, the ids, and 60 MB of images.
    assert len(proxy.seen("GET")) <= 2 + 5
