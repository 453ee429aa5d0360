"""Parser of multipart/form-data: the parts of a form as the values of a request."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from pipeline.config.schema import ServeConfig
from pipeline.serve.errors import invalid

# A form may have so many parts in addition to its images and texts.
OTHER_PARTS = 8


@dataclass(slots=True)
class _Form:
    """Parts of a form, collected by the parser's callbacks."""

    limit: int
    parts: list[tuple[dict[bytes, bytes], bytearray]] = field(default_factory=list)
    ended: bool = False
    _name: bytes = b""
    _value: bytes = b""

    def begin(self) -> None:
        if len(self.parts) == self.limit:
            raise invalid(f"a form of more than {self.limit} parts")
        self.parts.append(({}, bytearray()))

    def name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header(self) -> None:
        self.parts[-1][0][self._name.lower()] = self._value
        self._name = self._value = b""

    def data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1][1].extend(memoryview(data)[start:end])

    def end(self) -> None:
        self.ended = True


def read_form(boundary: bytes, body: bytes, limits: ServeConfig) -> dict[str, Any]:
    """Return the parts of a form as the values of a model.

    Raises:
        Refused: it is not a form, or has too many parts.
    """
    form = _Form(limits.max_images + limits.max_texts + OTHER_PARTS)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.begin,
                "on_part_data": form.data,
                "on_header_field": form.name,
                "on_header_value": form.value,
                "on_header_end": form.header,
                "on_end": form.end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise invalid(f"not a form: {error}") from error
    if not form.ended:
        raise invalid("the form is truncated: its last boundary is missing")
    values: dict[str, Any] = {}
    for headers, data in form.parts:
        options = parse_options_header(headers.get(b"content-disposition", b""))[1]
        name = options.get(b"name", b"").decode(errors="replace")
        if name in ("images", "image"):
            file = options.get(b"filename")
            image = {"data": bytes(data), "id": None if file is None else file.decode(errors="replace")}
            values.setdefault(name, []).append(image)
        elif name == "top_k":
            if name in values or not re.fullmatch(rb"[0-9]{1,4}", data):
                raise invalid("top_k: must be one number from 1 to 1000")
            values[name] = int(data)
        else:
            try:
                values.setdefault(name, []).append(data.decode())
            except UnicodeDecodeError as error:
                raise invalid(f"{name}: not UTF-8 ({error.reason})") from error
    return values
