"""Bad input through a whole job: for each thing that can be wrong with an image one status, tested on real bytes."""

from __future__ import annotations

import csv
import ctypes
import json
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.models.hub import DEMO_FOLDER
from tests.conftest import data_folder
from tests.forks import forks, job
from tests.pictures import saved
from tests.test_decode import ODD

MAX_PIXELS, MAX_BYTES = 1_000_000, 400_000
MARK = "hold-this-one"


def photo(kind: str = "JPEG", size: tuple[int, int] = (90, 70), mode: str = "RGB", **options: Any) -> bytes:
    width, height = size
    y, x = np.mgrid[:height, :width]
    planes = np.stack([x * 2 % 256, y * 3 % 256, (x ^ y) % 256], axis=2).astype(np.uint8)
    return saved(Image.fromarray(planes).convert(mode), kind, **options)


def flat(size: int, mode: str = "L", kind: str = "PNG", **options: Any) -> bytes:
    return saved(Image.new(mode, (size, size)), kind, **options)


def damaged(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def slow_jpeg(size: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan stands there ``scans`` times: few bytes, and hours of work."""
    data = flat(size, "L", "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def fits() -> bytes:
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                   20", "NAXIS2  =                   20", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)


# What each file holds, and its status; every name ends in .jpg or .png, whatever it is.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a-photo.jpg": (photo, "ok"),
    "a-png-called.jpg": (lambda: photo("PNG"), "ok"),
    "a-webp-called.png": (lambda: photo("WEBP"), "ok"),
    "empty.jpg": (bytes, "empty"),
    "one-byte.jpg": (lambda: b"\xff", "not_an_image"),
    "text.jpg": (lambda: b"This is not a photo, whatever it is called.", "not_an_image"),
    "html.jpg": (lambda: b"<!doctype html><title>404</title>", "not_an_image"),
    "zeros.jpg": (lambda: bytes(5000), "not_an_image"),
    "zip.png": (lambda: b"PK\x03\x04" + bytes(200), "not_an_image"),
    "half.jpg": (lambda: photo()[:900], "truncated"),
    "half.png": (lambda: photo("PNG")[:150], "truncated"),
    "half-gif.png": (lambda: photo("GIF", mode="P")[:1500], "truncated"),
    "half-webp.jpg": (lambda: photo("WEBP")[:300], "truncated"),
    "half-tiff.jpg": (lambda: photo("TIFF")[:3000], "truncated"),
    "checksum.png": (lambda: damaged(photo("PNG"), 60, b"\0\1\2\3"), "corrupt"),
    "only-a-header.jpg": (lambda: photo()[:2] + b"\xff\xd9", "corrupt"),
    "unsupported-bmp.jpg": (lambda: damaged(photo("BMP"), 30, struct.pack("<I", 4)), "unsupported"),
    "eps.jpg": (lambda: photo("EPS"), "format_not_allowed"),
    "pdf.jpg": (lambda: photo("PDF"), "format_not_allowed"),
    "fits.png": (fits, "format_not_allowed"),
    "svg.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', "format_not_allowed"),
    "svg-xml.png": (lambda: b'<?xml version="1.0"?><svg/>', "format_not_allowed"),
    "wmf.jpg": (lambda: b"\xd7\xcd\xc6\x9a" + bytes(200), "format_not_allowed"),
    "emf.jpg": (lambda: b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(200), "format_not_allowed"),
    "hdf5.jpg": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(200), "format_not_allowed"),
    "grib.jpg": (lambda: b"GRIB\0\0\0\1" + bytes(200), "format_not_allowed"),
    "bufr.jpg": (lambda: b"BUFR\0\0\0\1" + bytes(200), "format_not_allowed"),
    "psd.jpg": (lambda: b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\10\0\0\0\10\0\10\0\3" + bytes(99), "format_not_allowed"),
    "dds.jpg": (lambda: photo("DDS"), "format_not_allowed"),
    "icns.jpg": (lambda: flat(128, "RGBA", "ICNS"), "format_not_allowed"),
    "heic.jpg": (lambda: b"\0\0\0\x18ftypheic" + bytes(200), "corrupt"),
    "raw.jpg": (lambda: b"FUJIFILMCCD-RAW 0201" + bytes(200), "unsupported"),
    "many-pixels.png": (lambda: flat(1001), "too_many_pixels"),
    "bomb.png": (lambda: damaged(flat(10), 16, struct.pack(">II", 60_000, 60_000)), "corrupt"),
    "bomb-tiff.jpg": (lambda: flat(20_000, "1", "TIFF", compression="group4"), "too_many_pixels"),
    "many-bytes.png": (lambda: photo("BMP", (400, 400)), "too_many_bytes"),
}


def groups(folder: Path, output: Path, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The job over ``folder/m.parquet`` that these tests run."""
    found: dict[str, dict[str, Any]] = {
        "model": {"name": str(DEMO_FOLDER)},
        "manifest": {"path": str(folder / "m.parquet"), "image": "image", "root": str(folder / "root")},
        "images": {"max_pixels": MAX_PIXELS, "max_bytes": MAX_BYTES},
        "loader": {"batch_size": 8, "workers": 2},
        "output": {"dir": str(output)},
        "errors": {"max_fraction": 1.0},
        "backend": {"device": "cpu"},
        "report": {"progress": "none", "html": False},
    }
    for name, values in more.items():
        found[name] = {**found.get(name, {}), **values}
    return found


def make(folder: Path, files: dict[str, bytes], *extra: str | None) -> None:
    """The files in ``folder/root``, and a manifest of their names, and of ``extra`` ones."""
    (folder / "root").mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / "root" / name).write_bytes(data)
    cells = [*files, *extra]
    table = pa.table({"id": range(len(cells)), "image": pa.array(cells, pa.string())})
    pq.write_table(table, folder / "m.parquet")


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The rows, once what holds for every job was checked: each has a status, a failed one an error and no vector."""
    rows: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    for row in rows:
        assert (row["status"] == "ok") == (row["embedding"] is not None) == (row["error"] is None), row
        assert row["error"] is None or len(row["error"]) > 5
    counts = Counter(row["status"] for row in rows)
    for name in ("_SUCCESS", "_report.json"):
        assert Counter(json.loads((output / name).read_text())["counts"]) == counts
    return rows


def without_superuser(config: dict[str, dict[str, Any]]) -> int:
    """A job that file permissions hold for, whoever runs the tests."""
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data, libc = ctypes.create_string_buffer(24), ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("<6I", data.raw))
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, effective, permitted and inheritable.
    words[:3] = [word & ~0b110 for word in words[:3]]
    assert libc.capset(header, struct.pack("<6I", *words)) == 0
    return job(config, True)


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_every_kind_of_bad_file_has_its_status_and_the_others_go_on(tmp_path: Path, isolation: str) -> None:
    make(tmp_path, {name: build() for name, (build, _) in FILES.items()})
    config = groups(tmp_path, tmp_path / "out", loader={"isolation": isolation})
    child = forks().start("tests.forks:job", config, True)
    assert child.wait() == 0, child.said()
    found = {name: row["status"] for name, row in zip(FILES, rows_of(tmp_path / "out"), strict=True)}
    assert found == {name: status for name, (_, status) in FILES.items()}


def test_every_way_in_which_a_file_cannot_be_read_has_its_status(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make(tmp_path, {"good.jpg": photo()}, None, "", "missing.jpg", "gone/x.jpg", "good.jpg/x.jpg", "dangling.jpg")
    (tmp_path / "secret.jpg").write_bytes(photo())
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "leaves.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    (root / "private.jpg").write_bytes(photo())
    (root / "private.jpg").chmod(0)
    expected = {
        "good.jpg": "ok", "": "no_image", "missing.jpg": "not_found", "gone/x.jpg": "not_found",
        "good.jpg/x.jpg": "not_found", "dangling.jpg": "not_found", "leaves.jpg": "outside_root",
        "../secret.jpg": "outside_root", str(tmp_path / "secret.jpg"): "outside_root", "loop.jpg": "unreadable",
        "folder.jpg": "unreadable", "pipe.jpg": "unreadable", "socket.jpg": "unreadable", "/dev/zero": "outside_root",
        "private.jpg": "permission", "ftp://example.org/x.jpg": "scheme_not_allowed", "x" * 300: "unreadable",
        "good.jpg#bytes=5-2": "unreadable", "a\0b.jpg": "unreadable",
    }  # fmt: skip
    make(tmp_path, {}, *expected, None)
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(root)
        listener.bind("socket.jpg")
        os.chdir(here)
        child = forks().start("tests.test_bad_input:without_superuser", groups(tmp_path, tmp_path / "out"))
        assert child.wait() == 0, child.said()
    rows = rows_of(tmp_path / "out")
    assert {name: row["status"] for name, row in zip(expected, rows, strict=False)} == expected
    assert rows[-1]["status"] == "no_image"
    for name, row in zip(expected, rows, strict=False):
        if row["error"] is not None and name:
            assert name.split("#")[0].split("\0")[0] in row["error"], row


def test_too_many_failures_end_with_3_and_a_whole_dataset(tmp_path: Path) -> None:
    make(tmp_path, {"a.jpg": photo(), "b.jpg": b"none"})
    child = forks().start("tests.forks:job", groups(tmp_path, tmp_path / "out", errors={"max_fraction": 0.4}), True)
    assert child.wait() == 3
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok", "not_an_image"]
    assert "1 of 2 rows failed (50.0%" in child.said()


# In one job, and quicker: test_decoder_pool.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "status", "said"),
    [
        ("kill:SIGSEGV", "decoder_crashed", "SIGSEGV"),
        ("kill:SIGABRT", "decoder_crashed", "SIGABRT"),
        ("delay:600", "decoder_timeout", "loader.decode_seconds"),
        ("grow:1e12", "out_of_memory", "memory"),
        ("raise:EIO", "decoder_crashed", "failpoint"),
    ],
)
def test_a_decoder_that_dies_hangs_or_grows_costs_one_row(tmp_path: Path, rule: str, status: str, said: str) -> None:
    files = {f"{number:02d}.jpg": photo() for number in range(20)}
    files["07.jpg"] = photo(comment=MARK.encode())
    make(tmp_path, files)
    config = groups(tmp_path, tmp_path / "out", loader={"decode_seconds": 1.0})
    child = forks().start("tests.forks:job", config, True, failpoints=f"child.decode[{MARK}]={rule}")
    assert child.wait() == 0, child.said()
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == [status if name == "07.jpg" else "ok" for name in files]
    assert said in rows[7]["error"]
    assert forks().strays() == []


def test_a_machine_that_kills_decoders_ends_the_job_and_is_told(tmp_path: Path) -> None:
    """A system without memory kills with SIGKILL; the image is not to blame, and a later run embeds it."""
    make(tmp_path, {"a.jpg": photo(), "b.jpg": photo(comment=MARK.encode())})
    config = groups(tmp_path, tmp_path / "out")
    child = forks().start("tests.forks:job", config, True, failpoints=f"child.decode[{MARK}]=kill")
    assert child.wait() == 2
    for word in ("SIGKILL", "memory", "loader.workers", "loader.decode_memory"):
        assert word in child.said()
    assert forks().strays() == []
    assert forks().start("tests.forks:job", config, True).wait() == 0
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok", "ok"]


def test_a_job_whose_every_decoder_crashes_still_ends(tmp_path: Path) -> None:
    make(tmp_path, {f"{number}.jpg": photo() for number in range(5)} | {"none.jpg": b""})
    config = groups(tmp_path, tmp_path / "out")
    child = forks().start("tests.forks:job", config, True, failpoints="child.decode=kill:SIGSEGV")
    assert child.wait() == 0, child.said()
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["decoder_crashed"] * 5 + ["empty"]


@pytest.mark.slow
def test_real_bytes_that_take_too_long_or_too_much_memory_cost_one_row_each(tmp_path: Path) -> None:
    """A JPEG of a few hundred kilobytes with seconds of work in it, and a PNG that unpacks to 300 MB."""
    make(tmp_path, {"a.jpg": photo(), "slow.jpg": slow_jpeg(5000, 1000), "large.png": flat(9000), "b.jpg": photo()})
    limits = {"decode_seconds": 1.0, "decode_memory": 128 * 2**20}
    wide = {"max_pixels": 100_000_000, "max_bytes": 10_000_000}
    child = forks().start("tests.forks:job", groups(tmp_path, tmp_path / "out", loader=limits, images=wide), True)
    assert child.wait() == 0, child.said()
    found = [row["status"] for row in rows_of(tmp_path / "out")]
    assert found == ["ok", "decoder_timeout", "out_of_memory", "ok"]


def test_all_the_odd_files_come_out_with_the_status_that_is_theirs(tmp_path: Path) -> None:
    folder = data_folder("odd")
    # The inventory itself lies there too, and is no picture.
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with (folder / "inventory.csv").open() as file:
        huge = {row["file"] for row in csv.DictReader(file) if row["pillow_13"] == "huge-not-decoded"}
    pq.write_table(pa.table({"id": names, "image": names}), tmp_path / "m.parquet")
    limits = {"max_pixels": 100_000_000, "max_bytes": 268_435_456}
    config = groups(tmp_path, tmp_path / "out", manifest={"root": str(folder)}, images=limits)
    child = forks().start("tests.forks:job", config, True)
    assert child.wait() == 0, child.said()
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == names
    expected = {name: status for status, files in ODD.items() for name in files.split()}
    found = {row["id"]: row["status"] for row in rows if row["status"] != "ok"}
    assert found == {**expected, "inventory.csv": "not_an_image"}
    assert len(huge) > 1
    assert {found[name] for name in huge} == {"too_many_pixels"}
