"""A folder of images in S3: its manifest, and the job over it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("moto", reason="needs the extra compat")
pytest.importorskip("s3fs", reason="needs the extra s3")

import s3fs

from pipeline.dataset.dataset import open_dataset
from pipeline.job.main import run_job
from pipeline.manifest import __main__ as command
from pipeline.manifest.files import holds_images
from pipeline.nightly.folder import folder_job
from tests.jobs import config_for, scene
from tests.s3 import BUCKET, moto_server, pointed_at

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url, pointed_at(url):
        yield


@pytest.fixture
def place(_server: None) -> str:
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
