"""CSVs of any encoding and delimiter: the right rows, or a message with the line."""

from __future__ import annotations

import codecs
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.manifest import __main__ as command

ROWS = [
    {"id": "001", "path": "ü b/ß.jpg", "text": "größe; 5,0 €"},
    {"id": "002", "path": "東京/一.jpg", "text": 'two\nlines, "quoted"'},
    {"id": "003", "path": "c.jpg", "text": "x\ty|z"},
]
UTF_8 = ["utf-8", "utf-8-sig"]
WIDE = [f"utf-{size}-{order}{mark}" for size in (16, 32) for order in ("le", "be") for mark in ("", " with a mark")]
MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE,
}  # fmt: skip


def encoded(text: str, encoding: str) -> bytes:
    name = encoding.removesuffix(" with a mark")
    return (MARKS[name] if name != encoding else b"") + text.encode(name)


def csv_of(delimiter: str, end: str) -> str:
    def cell(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if set(value) & {delimiter, "\n", '"'} else value

    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return "".join(delimiter.join(map(cell, line)) + end for line in lines)


def build(tmp_path: Path, data: bytes, *arguments: str, name: str = "m.csv") -> int:
    (tmp_path / name).write_bytes(data)
    return command.main(["csv", str(tmp_path / name), str(tmp_path / "m.parquet"), *arguments])


def table(tmp_path: Path) -> pa.Table:
    return pq.read_table(tmp_path / "m.parquet")


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, *arguments: str) -> str:
    assert build(tmp_path, data, *arguments) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv"]
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'm.csv'}: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", [*UTF_8, *WIDE])
def test_a_csv_of_any_unicode_and_delimiter_gives_its_rows(
    tmp_path: Path, encoding: str, delimiter: str, end: str
) -> None:
    assert build(tmp_path, encoded(csv_of(delimiter, end), encoding)) == 0
    assert table(tmp_path).to_pylist() == ROWS


def test_a_csv_that_is_packed_is_read(tmp_path: Path) -> None:
    assert build(tmp_path, gzip.compress(csv_of(",", "\n").encode()), name="m.csv.gz") == 0
    assert table(tmp_path).to_pylist() == ROWS


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_the_delimiter_that_a_spreadsheet_names_is_taken(tmp_path: Path, first: str) -> None:
    assert build(tmp_path, f"{first}\r\nid;path\r\na;1,5.jpg\r\n".encode("utf-8-sig")) == 0
    assert table(tmp_path).to_pylist() == [{"id": "a", "path": "1,5.jpg"}]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "cp932"])
@pytest.mark.parametrize(
    ("text", "line"),
    [("id,path,größe\na,1.jpg,5\n", 1), ("id,path\na,1.jpg\nb,süß.jpg\n", 3), ("id,path\nä,1.jpg\n", 2)],
    ids=["header", "path", "id"],
)
def test_text_of_an_older_encoding_is_named_with_its_line_and_never_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: int, encoding: str
) -> None:
    data = (
        text.replace("ü", "я").replace("ö", "я").replace("ä", "я").replace("ß", "") if encoding != "latin-1" else text
    )
    data = data.replace("я", "ü") if encoding == "cp1252" else data
    said = refused(tmp_path, capsys, data.encode(encoding))
    assert f"line {line} is not UTF-8 (byte 0x" in said
    assert "iconv -f WINDOWS-1252 -t UTF-8" in said


@pytest.mark.parametrize("encoding", WIDE)
def test_a_wide_encoding_that_is_cut_short_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    said = refused(tmp_path, capsys, encoded("id,path\na,1.jpg\n", encoding)[:-1])
    assert f"line 2 is not {encoding.removesuffix(' with a mark').upper()}" in said


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["not readable as CSV: the file is empty"]),
        ("\ufeff", ["the file is empty"]),
        (" \n\n", ["the file is empty"]),
        ("id,path\n", ["a header without rows"]),
        ("id,path\na,1.jpg\nb,2.jpg,x\n", ["line 3: Expected 2 columns, got 3: b,2.jpg,x", "needs quotes"]),
        ("id,path\na,1.jpg\nb\n", ["line 3: Expected 2 columns, got 1: b"]),
        ('id,path\na,"1\n.jpg"\nb,2.jpg,x\n', ["line 4: Expected 2 columns, got 3"]),
        ("sep=,\nid,path\nb,2.jpg,x\n", ["line 3: Expected 2 columns, got 3"]),
        ('id,path\na,"1.jpg\nb,2.jpg\nc,3.jpg\n', ["a quote is opened and not closed"]),
        ('id,path\na,1.jpg\nb,"2.jpg\n', ["after the record of line 2: a quote is opened"]),
        ("id,path\na,1\0.jpg\n", ["line 2 holds a NUL byte"]),
        ("id,path,path\na,1.jpg,2.jpg\n", ["line 1: two columns are called 'path'"]),
        ("id,path,x,x\na,1.jpg,2,3\n", ["line 1: two columns are called 'x'"]),
        ("id,Path\na,1.jpg\n", ["no column 'path'; its columns are id, Path", "did you mean Path?"]),
        ("id:path\na:1.jpg\n", ["no column 'path'; its columns are id:path"]),
    ],
)
def test_a_csv_that_holds_no_table_is_refused_with_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, parts: list[str]
) -> None:
    said = refused(tmp_path, capsys, text.encode())
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize("encoding", ["utf-16-le with a mark", "utf-32-be with a mark"])
def test_a_mistake_in_a_wide_encoding_has_the_same_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    said = refused(tmp_path, capsys, encoded("id,path\na,1.jpg\nb,2.jpg,x\n", encoding))
    assert "line 3: Expected 2 columns, got 3: b,2.jpg,x" in said


def test_columns_without_a_name_get_one_by_their_place(tmp_path: Path) -> None:
    assert build(tmp_path, b",id,path, \n0,a,1.jpg,x\n1,b,2.jpg,y\n") == 0
    assert table(tmp_path).to_pylist() == [
        {"column_1": 0, "id": "a", "path": "1.jpg", "column_4": "x"},
        {"column_1": 1, "id": "b", "path": "2.jpg", "column_4": "y"},
    ]


def test_a_single_quote_sign_within_a_cell_is_text(tmp_path: Path) -> None:
    assert build(tmp_path, b'id,path,size\na,1.jpg,5" wide\n') == 0
    assert table(tmp_path)["size"].to_pylist() == ['5" wide']


def test_a_comma_is_the_delimiter_where_it_makes_the_columns(tmp_path: Path) -> None:
    assert build(tmp_path, b"id,path,note\na,1.jpg,x;y;z\n") == 0
    assert table(tmp_path)["note"].to_pylist() == ["x;y;z"]


def test_named_columns_find_the_delimiter(tmp_path: Path) -> None:
    assert build(tmp_path, b"sku;file\n007;a,b.jpg\n", "--image", "file", "--id", "sku") == 0
    assert table(tmp_path).to_pylist() == [{"sku": "007", "file": "a,b.jpg"}]
