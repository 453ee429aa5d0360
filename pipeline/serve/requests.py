"""The bytes of a body, JSON or a form, to what is asked; pure functions that open nothing."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from pipeline.config.schema import ServeConfig
from pipeline.models.text import is_text
from pipeline.serve.errors import Refused
from pipeline.serve.schemas import FORMS, JSON, MULTIPART, EmbedRequest, EncodedImage, PredictRequest

# Of all that is wrong with a body, so much is told.
TOLD = 5
# Parts of a form that are no images and no texts.
OTHER_PARTS = 8
# Of a message, so many characters are sent back, however long the names are that a client made up.
MESSAGE = 500
# The strings of JSON, and the commas between them. A string that does not end goes to the end, so that nothing is read
# twice.
PIECES = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|,', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Image:
    """One encoded image of a request, and the name by which its sender knows it."""

    id: str | None
    data: bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was read and checked against the limits; None stands for what the service has itself."""

    images: tuple[Image, ...] = ()
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    top_k: int | None = None


def read_asked(model: type[BaseModel], content_type: str, body: bytes | bytearray, limits: ServeConfig) -> Asked:
    """What a body asks for.

    Raises:
        Refused: with 415 or 422, and what is wrong.
    """
    kind, options = parse_options_header(content_type)
    if kind == JSON.encode():
        asked = _from_json(model, body, limits)
    elif kind == MULTIPART.encode():
        asked = _from_form(model, options.get(b"boundary", b""), bytes(body), limits)
    else:
        raise Refused(415, "media_type", f"the body must be {JSON} or {MULTIPART}, and its type is {content_type!r}")
    _check(asked, limits)
    if model is EmbedRequest and not asked.images and not asked.texts:
        raise invalid("images and texts are both empty; give one or the other")
    if model is PredictRequest and not asked.images:
        raise invalid("images is empty; give at least one")
    return asked


def invalid(message: str) -> Refused:
    """A body that is not what it should be."""
    return Refused(422, "invalid", message if len(message) <= MESSAGE else f"{message[:MESSAGE]}...")


def _from_json(model: type[BaseModel], body: bytes | bytearray, limits: ServeConfig) -> Asked:
    # Before it is parsed: a body of nothing but small values, or of errors, would take many times its own memory. An
    # image has four strings and their commas, a text has one.
    most = 8 * limits.max_images + 2 * limits.max_texts + OTHER_PARTS
    if sum(1 for _ in islice(PIECES.finditer(body), most + 1)) > most:
        raise invalid(
            f"more values than serve.max_images={limits.max_images:,} and serve.max_texts={limits.max_texts:,} make"
        )
    try:
        read: Any = model.model_validate_json(bytes(body))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        told = [f"{'.'.join(map(str, each['loc'])) or 'body'}: {_said(model, each)}" for each in found[:TOLD]]
        more = f" and {len(found) - TOLD} more" if len(found) > TOLD else ""
        raise invalid(f"{'; '.join(told)}{more}") from error
    _count("images", len(read.images), min(limits.max_images, limits.queue))
    images = []
    for place, image in enumerate(read.images):
        if image.id is not None and len(image.id) > limits.max_text_chars:
            raise invalid(f"images.{place}.id: over serve.max_text_chars={limits.max_text_chars:,} characters")
        try:
            images.append(Image(id=image.id, data=base64.b64decode(image.data, validate=True)))
        except (binascii.Error, ValueError) as error:
            raise invalid(f"images.{place}.data: not base64 without line breaks and prefix: {error}") from error
    given = {name: getattr(read, name, None) for name in ("labels", "templates")}
    lists = {name: None if value is None else tuple(value) for name, value in given.items()}
    texts, top_k = tuple(getattr(read, "texts", ())), getattr(read, "top_k", None)
    return Asked(images=tuple(images), texts=texts, top_k=top_k, **lists)


def _said(model: type[BaseModel], error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        known = model if len(error["loc"]) == 1 else EncodedImage
        return f"is not known; there are {', '.join(known.model_fields)}"
    return error["msg"]


@dataclass(slots=True)
class _Form:
    """The parts of a form as the parser finds them."""

    limit: int
    parts: list[tuple[dict[bytes, bytes], bytearray]] = field(default_factory=list)
    ended: bool = False
    _name: bytes = b""
    _value: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)

    def begin(self) -> None:
        if len(self.parts) == self.limit:
            raise invalid(f"a form of more than {self.limit} parts")
        self._headers = {}
        self.parts.append((self._headers, bytearray()))

    def name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1][1].extend(memoryview(data)[start:end])

    def end(self) -> None:
        self.ended = True


def _from_form(model: type[BaseModel], boundary: bytes, body: bytes, limits: ServeConfig) -> Asked:
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
        raise invalid("the form is cut off: its last boundary is missing")
    known = FORMS[model]["properties"]
    images: list[Image] = []
    lists: dict[str, list[str]] = {}
    for headers, data in form.parts:
        options = parse_options_header(headers.get(b"content-disposition", b""))[1]
        name = options.get(b"name", b"").decode(errors="replace")
        if name not in known:
            raise invalid(f"a form has the parts {', '.join(known)}, and this one has {name!r}")
        if name == "images":
            _count("images", len(images) + 1, min(limits.max_images, limits.queue))
            named = options.get(b"filename")
            images.append(Image(id=None if named is None else named.decode(errors="replace"), data=bytes(data)))
        else:
            lists.setdefault(name, []).append(_text(name, data))
    optional = {name: tuple(lists[name]) if name in lists else None for name in ("labels", "templates")}
    return Asked(images=tuple(images), texts=tuple(lists.get("texts", ())), top_k=_top_k(lists), **optional)


def _text(name: str, data: bytearray) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"{name}: not UTF-8 ({error.reason})") from error


def _top_k(lists: dict[str, list[str]]) -> int | None:
    given = lists.get("top_k")
    if given is None:
        return None
    if len(given) != 1 or not re.fullmatch(r"[0-9]{1,4}", given[0]) or not 1 <= int(given[0]) <= 1000:
        raise invalid(f"top_k: {', '.join(given)[:40]!r} is not one number from 1 to 1000")
    return int(given[0])


def _check(asked: Asked, limits: ServeConfig) -> None:
    labels, templates = asked.labels or (), asked.templates or ()
    _count("texts", len(asked.texts) + len(labels) * max(1, len(templates)), limits.max_texts)
    _count("templates", len(templates), limits.max_texts)
    for name, texts in (("texts", asked.texts), ("labels", labels), ("templates", templates)):
        for place, text in enumerate(texts):
            if len(text) > limits.max_text_chars:
                raise invalid(
                    f"{name}.{place}: {len(text):,} characters, over serve.max_text_chars={limits.max_text_chars:,}"
                )
            if not text.strip() or not is_text(text):
                raise invalid(f"{name}.{place}: is empty, or no text")
    if asked.templates is not None and asked.labels is None:
        raise invalid("templates go with labels; give both")
    if asked.labels is not None:
        _check_labels(labels, asked.templates)
        # Every image's answer names them again.
        longest = sorted((len(json.dumps(label)) for label in labels), reverse=True)[: asked.top_k or 1]
        if len(asked.images) * sum(longest) > limits.max_body_bytes:
            raise invalid(
                f"the answer would be over serve.max_body_bytes={limits.max_body_bytes:,}; take a lower top_k"
            )


def _check_labels(labels: Sequence[str], templates: Sequence[str] | None) -> None:
    if not labels:
        raise invalid("labels is empty; give at least one, or leave it out for those of the service")
    if len(set(labels)) < len(labels):
        twice = next(label for place, label in enumerate(labels) if label in labels[:place])
        raise invalid(f"labels: {twice[:80]!r} stands there twice; take one out")
    if templates is not None and not templates:
        raise invalid("templates is empty; give at least one, or leave it out for those of the service")
    for place, template in enumerate(templates or ()):
        if template.count("{}") != 1:
            raise invalid(f"templates.{place}: must hold {{}} exactly once, where the label goes")


def _count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise invalid(f"{name}: {count:,}, over serve.max_{name if name != 'templates' else 'texts'}={limit:,}")
