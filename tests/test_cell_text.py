"""A text in the image column that is no path fails in one short sentence that says what the cell holds."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import TooManyFailures
from pipeline.core.records import Failure, ImageRef
from pipeline.dataset.parts import LONGEST_ERROR, short_error
from pipeline.images.sources.cell_text import describe
from pipeline.images.sources.source import Source
from pipeline.job.main import run_job
from tests.jobs import config_for, scene
from tests.pictures import saved

JPEG = scene(0)[0]


def encoded() -> dict[str, tuple[str, str]]:
    """Texts by name, each with words of its sentence."""
    from PIL import Image

    picture = Image.effect_noise((96, 96), 50).convert("RGB")
    files = {form: saved(picture, form) for form in ("PNG", "JPEG", "GIF", "WebP", "TIFF", "BMP")}
    found = {f"base64-{form}": (base64.b64encode(data).decode(), "base64 text") for form, data in files.items()}
    found |= {f"data-{form}": (f"data:image/{form.lower()};base64,{text}", "a data: URL")
              for form, (text, _) in ((name[7:], value) for name, value in found.items())}  # fmt: skip
    text = base64.b64encode(JPEG).decode()
    return {
        **found,
        "base64-lines": (base64.encodebytes(JPEG).decode(), "base64 text of a JPEG"),
        "base64-url": (base64.urlsafe_b64encode(JPEG).decode(), "base64 text of a JPEG"),
        "data-svg": ("data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>", "a data: URL"),
        "data-upper": (f"DATA:image/jpeg;base64,{text}", "a data: URL"),
        "hex": (JPEG.hex(), "hex digits of a JPEG"),
        "hex-upper": (JPEG.hex().upper(), "hex digits of a JPEG"),
        "hex-0x": ("0x" + JPEG.hex(), "hex digits of a JPEG"),
        "hex-bytea": ("\\x" + JPEG.hex(), "hex digits of a JPEG"),
        "json-object": (json.dumps({"bytes": text, "path": None}), "JSON text"),
        "json-url": (json.dumps({"url": "https://example.com/a.jpg", "more": "x" * 400}), "JSON text"),
        "json-list": (json.dumps([text]), "JSON text"),
        "python-bytes": (repr(JPEG), "bytes as Python prints them"),
        "python-dict": (repr({"bytes": JPEG}), "a dict as Python prints it"),
        "long-text": ("word " * 2000, "longer than a path can be"),
        "long-name": ("x" * 450, "longer than a path can be"),
        "long-cjk": ("日本" * 3000, "longer than a path can be"),
    }


CASES = encoded()


@pytest.mark.parametrize("name", CASES)
def test_a_text_that_is_no_path_is_named_in_a_short_sentence(tmp_path: Path, name: str) -> None:
    text, words = CASES[name]
    found = Source(str(tmp_path), 1 << 30).read(ImageRef(id=name, path=text))
    assert isinstance(found, Failure)
    assert found.status == "unreadable"
    assert words in found.error
    assert f"{len(text):,} characters" in found.error
    assert len(found.error) < 350
    assert "\n" not in found.error


SHORT = {
    "gif": base64.b64encode(b"GIF89a" + bytes(29)).decode(),
    "png": base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(59)).decode(),
    "hex": (b"GIF89a" + bytes(29)).hex(),
    "json": '{"path": "a.jpg"}',
}


@pytest.mark.parametrize("name", SHORT)
def test_a_text_that_may_be_a_name_is_looked_at_only_if_there_is_no_such_file(tmp_path: Path, name: str) -> None:
    source, ref = Source(str(tmp_path), 1 << 30), ImageRef(id=name, path=SHORT[name])
    missing = source.read(ref)
    assert isinstance(missing, Failure)
    assert missing.status == "not_found"
    assert "the manifest's cell holds" in missing.error
    (tmp_path / SHORT[name]).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / SHORT[name]).write_bytes(JPEG)
    assert source.read(ref) == JPEG


@pytest.mark.parametrize(
    "path",
    [
        "photos/IMG_0001 (2).jpg",
        "[brackets].png",
        "{curly}.png",
        "deadbeef" * 8,
        "ffd8ffe0" * 8,
        "data:2024,01.jpg",
        "a/" * 150 + "b.jpg",
        "https://example.com/" + "a" * 5000,
        "b'quoted'.jpg",
        "日本.jpg",
    ],
)
def test_a_path_is_never_taken_for_something_else(path: str) -> None:
    assert describe(path) is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of every text, one good picture, and addresses of 3,000 characters."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "good.jpg").write_bytes(JPEG)
    long = {"deep": ("d/" * 1500 + "x.jpg", ""), "scheme": ("gopher://" + "a" * 3000, "")}
    cells = {**CASES, **long, "good": ("good.jpg", "")}
    pq.write_table(pa.table({"id": [*cells], "image": [text for text, _ in cells.values()]}), folder / "m.parquet")
    settings: dict[str, Any] = {
        "manifest": {"keep": [], "root": str(folder)},
        "report": {"html": True, "examples": 50, "progress": "none"},
        "errors": {"max_fraction": 0.99},
    }
    run_job(config_for(folder / "m.parquet", folder / "out", **settings))
    return folder / "out"


def test_no_row_and_no_report_has_a_longer_error(made: Path) -> None:
    rows = pa.concat_tables(pq.ParquetFile(path).read() for path in made.glob("part-*")).to_pylist()
    assert {row["id"] for row in rows if row["status"] == "ok"} == {"good"}
    assert max(len(row["error"] or "") for row in rows) <= LONGEST_ERROR == 500
    report = json.loads((made / "_report.json").read_text())
    assert len(report["failures"]) > 3
    assert max(len(failure["error"]) for failure in report["failures"]) <= LONGEST_ERROR
    page = (made / "_report.html").read_text()
    assert CASES["base64-PNG"][0][:200] not in page


def test_a_long_error_keeps_its_beginning_and_its_end() -> None:
    assert short_error("x" * 500) == "x" * 500
    cut = short_error("begin " + "x" * 5000 + ": no such file")
    assert len(cut) == 500
    assert cut.startswith("begin ")
    assert cut.endswith(": no such file")


def test_a_job_of_such_texts_alone_ends_with_the_code_for_failures(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "image": [CASES["base64-PNG"][0]]}), tmp_path / "m.parquet")
    with pytest.raises(TooManyFailures) as caught:
        run_job(config_for(tmp_path / "m.parquet", tmp_path / "out", manifest={"keep": [], "root": str(tmp_path)}))
    assert len(str(caught.value)) < 1000
