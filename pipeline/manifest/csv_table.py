"""A CSV as a table: its encoding, its delimiter, its header, and the line of each mistake."""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.config.schema import nearest
from pipeline.core.errors import ManifestError
from pipeline.storage.urls import is_local, local_file, open_file

# The mark of UTF-16 is the beginning of that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DELIMITERS = (",", ";", "\t", "|")
# Bytes at the beginning that tell an encoding without a mark, and the least share of zeros in UTF-16 and UTF-32.
_HEAD, _ZEROS = 1 << 16, 0.1


@dataclass(frozen=True, slots=True)
class _Text:
    """The content of a CSV in UTF-8, with its delimiter; ``skipped`` lines before the header are left out."""

    path: str
    data: bytes
    delimiter: str
    skipped: int = 0

    def records(self, *, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
        """Every record that is not empty, with its first line, counted from 1."""
        lines = io.TextIOWrapper(io.BytesIO(self.data), encoding="utf-8", newline="")
        reader, first = csv.reader(lines, delimiter=self.delimiter, strict=strict), self.skipped + 1
        for record in reader:
            if record:
                yield first, record
            first = self.skipped + reader.line_num + 1

    def error(self, said: str) -> ManifestError:
        return ManifestError(f"{self.path}: not readable as CSV: {said}")


def read_table(path: str, image: str, id: str | None) -> tuple[pa.Table, str | None]:
    """Read a CSV; return the table, with the columns of ids and images as text, and the name of the id column.

    The encoding is UTF-8, or UTF-16 or UTF-32 with or without a mark. The delimiter is a comma (a tab in a ``.tsv``),
    or else the semicolon, tab or bar that makes the named columns, or that Excel names in a first line ``sep=;``.
    Without ``id``, the id column is ``id``, or None if there is none. Columns without a name are called ``column_N``.

    Raises:
        ManifestError: not readable, or a column is missing or stands twice; the message names the line.
    """
    text = _read(path)
    wanted = [name for name in (image, id) if name is not None]
    text = next((each for each in _delimited(text) if {*wanted} <= {*_header(each)}), text)
    names = _header(text)
    missing = [name for name in wanted if name not in names]
    if missing:
        hint = nearest(missing[0], names)
        raise ManifestError(
            f"{path}: no column {missing[0]!r}; its columns are {', '.join(names)}; --id and --image name them"
            f"{f' ({hint})' if hint else ''}"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise text.error(f"line {text.skipped + 1}: two columns are called {twice[0]!r}; give each a name of its own")
    id = "id" if id is None and "id" in names else id
    return _parsed(text, names, [name for name in (image, id) if name is not None]), id


def _read(path: str) -> _Text:
    """The content in UTF-8, whatever it was written in."""
    try:
        if is_local(path):
            # The stream unpacks what ends in .gz and the like.
            with pa.input_stream(str(local_file(path))) as file:
                data = file.read()
        else:
            with open_file(path) as file:
                data = file.read()
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(f"{path}: not readable as CSV: {error}") from error
    encoding, mark = _encoding(data)
    text = _Text(path, data, "\t" if path.lower().endswith(".tsv") else ",")
    try:
        decoded = data[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[mark : mark + error.start].decode(encoding, errors="replace").count("\n") + 1
        raise text.error(
            f"line {line} is not {encoding.upper()} (byte 0x{data[mark + error.start]:02X}); save the file as UTF-8, "
            f"or convert it from what it was written in, such as: iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8.csv"
        ) from error
    if not decoded.strip():
        raise text.error("the file is empty")
    if "\0" in decoded:
        line = decoded.count("\n", 0, decoded.index("\0")) + 1
        raise text.error(f"line {line} holds a NUL byte, which no text has; write the file again, or save it as UTF-8")
    first, _, rest = decoded.partition("\n")
    named = first.strip().strip('"')
    if named.lower().startswith("sep=") and len(named) == 5:
        return _Text(path, rest.encode(), named[4], skipped=1)
    return _Text(path, data[mark:] if encoding == "utf-8" else decoded.encode(), text.delimiter)


def _encoding(data: bytes) -> tuple[str, int]:
    """The encoding of a CSV and the bytes of its mark; without a mark, ASCII in UTF-16 and UTF-32 is half zeros."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name, len(mark)
    head = data[:_HEAD]
    zeros = [head[place::4].count(0) for place in range(4)]
    if sum(zeros) > _ZEROS * len(head):
        order = "le" if zeros[1] + zeros[3] > zeros[0] + zeros[2] else "be"
        wide = min(zeros[1], zeros[2]) > 0.9 * (len(head) // 4)
        if wide:
            return ("utf-32-le" if zeros[3] > zeros[0] else "utf-32-be"), 0
        return f"utf-16-{order}", 0
    return "utf-8", 0


def _delimited(text: _Text) -> Iterator[_Text]:
    """The text with its own delimiter, then with others."""
    yield text
    yield from (replace(text, delimiter=each) for each in _DELIMITERS if each != text.delimiter)


def _header(text: _Text) -> list[str]:
    """The names of the columns; those without one get a name by their number."""
    names: list[str] = []
    with suppress(csv.Error):
        _, names = next(text.records(), (0, []))
    return [name if name.strip() else f"column_{number}" for number, name in enumerate(names, 1)]


def _parsed(text: _Text, names: list[str], texts: list[str]) -> pa.Table:
    # A quote that is not closed would make one cell of all lines after it.
    if text.data.count(b'"') % 2:
        _refuse_open_quote(text)
    try:
        # The streaming reader infers types from the first block, and fails at a later 3.5 in a column of 3s.
        table = pa_csv.read_csv(
            pa.BufferReader(text.data),
            parse_options=pa_csv.ParseOptions(delimiter=text.delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )
    except pa.ArrowException as error:
        raise text.error(_ragged(text, len(names)) or str(error)) from error
    return table.rename_columns(names)


def _refuse_open_quote(text: _Text) -> None:
    records, line = text.records(strict=True), text.skipped + 1
    try:
        while (found := next(records, None)) is not None:
            line = found[0]
    except csv.Error as error:
        if "unexpected end" in str(error) or "field limit" in str(error):
            raise text.error(f"after the record of line {line}: a quote is opened and not closed") from error


def _ragged(text: _Text, count: int) -> str:
    """The first line with another number of cells than the header has, in words; empty if there is none."""
    with suppress(csv.Error):
        for line, record in text.records():
            if len(record) != count:
                cells = text.delimiter.join(record)[:80]
                shown = "".join(each if each.isprintable() else " " for each in cells)
                quotes = f"; a cell that holds {text.delimiter!r} needs quotes" if len(record) > count else ""
                return f"line {line}: Expected {count} columns, got {len(record)}: {shown}{quotes}"
    return ""
