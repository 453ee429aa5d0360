"""Request bodies: the models that validate them, and the parsers of JSON and multipart/form-data."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails, PydanticCustomError
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from pipeline.config.schema import ServeConfig
from pipeline.models.label_files import as_read, is_text
from pipeline.serve.errors import Refused, invalid
from pipeline.serve.schemas import EMBED_FIELDS, ONE_OF_IMAGES, PREDICT_FIELDS

REFERENCE = "#/components/schemas/{model}"
JSON, MULTIPART = "application/json", "multipart/form-data"
# A message lists at most so many errors of a body.
LISTED = 5
# A form may have so many parts in addition to its images and texts.
OTHER_PARTS = 8
# The strings of JSON, and the commas between them. A string without an end extends to the end of the body, so that
# no byte is read twice.
PIECES = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|,', re.DOTALL)


def _error(message: str) -> PydanticCustomError:
    # Without a context, pydantic does not replace braces in the message.
    return PydanticCustomError("limit", message)


def _limits(info: ValidationInfo) -> ServeConfig:
    assert isinstance(info.context, ServeConfig)
    return info.context


def _decoded(value: Any) -> bytes:
    """Decode base64; the value is bytes in a form, never in JSON."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _error("must be a string in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _error(f"not base64 without line breaks and prefix: {error}") from error


def _short(value: str, info: ValidationInfo) -> str:
    limit = _limits(info).max_text_chars
    if len(value) > limit:
        raise _error(f"{len(value):,} characters, over serve.max_text_chars={limit:,}")
    return value


def _text(value: str, info: ValidationInfo) -> str:
    if not _short(value, info).strip() or not is_text(value):
        raise _error("is empty, or is not text")
    return value


def _check_count(name: str, count: int, limit: int, setting: str) -> None:
    if count > limit:
        raise _error(f"{name}: {count:,}, over {setting}={limit:,}")


class _Closed(BaseModel):
    # Strict, so that a number is not accepted as text; closed, so that a misspelt name is an error.
    model_config = ConfigDict(extra="forbid", strict=True)


class EncodedImage(_Closed):
    """One encoded image (JPEG, PNG, ...) in base64; ``id`` is returned with its result."""

    data: Annotated[bytes, PlainValidator(_decoded, json_schema_input_type=str)] = Field(
        description="The bytes of the file, in base64."
    )
    id: Annotated[str, AfterValidator(_short)] | None = None


Texts = list[Annotated[str, AfterValidator(_text)]]


def _as_image(value: Any) -> Any:
    """Return the fields of one image: given as its data alone, or the only part of its name in a form."""
    if isinstance(value, list):
        if len(value) != 1:
            raise _error(f"{len(value):,} images; give several as images")
        return value[0]
    return {"data": value} if isinstance(value, str) else value


def _as_list(value: Any, info: ValidationInfo) -> Any:
    """Return the texts in a single one: a JSON list of them, or separated by commas."""
    if not isinstance(value, str):
        return value
    limits = _limits(info)
    if value.lstrip().startswith("["):
        _check_values(value.encode(errors="replace"), limits)
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _error("begins like a JSON list, and is none") from error
    _check_count("labels", value.count(",") + 1, limits.max_texts, "serve.max_texts")
    return [each.strip() for each in value.split(",")]


class EmbedRequest(_Closed):
    """Images, texts, or both."""

    images: list[EncodedImage] = []
    texts: Texts = []

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> EmbedRequest:
        limits = _limits(info)
        _check_count("images", len(self.images), min(limits.max_images, limits.queue), "serve.max_images")
        _check_count("texts", len(self.texts), limits.max_texts, "serve.max_texts")
        if not self.images and not self.texts:
            raise _error("images and texts are both empty; give at least one")
        return self


class PredictRequest(_Closed):
    """Images, or one image, and optionally labels in place of those of the service."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=ONE_OF_IMAGES)

    images: list[EncodedImage] = []
    image: Annotated[
        EncodedImage | None, BeforeValidator(_as_image, json_schema_input_type=EncodedImage | str | None)
    ] = Field(None, description="One image in place of images: as there, or in base64 alone.")
    labels: Texts | None = None
    texts: Annotated[Texts | None, BeforeValidator(_as_list, json_schema_input_type=list[str] | str | None)] = Field(
        None, description="Labels in place of labels: a list, or one text with commas between them."
    )
    templates: Texts | None = Field(None, description="Each contains {} once, for the label; only with labels.")
    top_k: int | None = Field(None, ge=1, le=1000)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> PredictRequest:
        limits = _limits(info)
        self._merge()
        _check_count("images", len(self.images), min(limits.max_images, limits.queue), "serve.max_images")
        if not self.images:
            raise _error("images is empty; give at least one")
        if self.labels is not None:
            self._check_labels(self.labels, limits)
        elif self.templates is not None:
            raise _error("templates without labels; give both")
        return self

    def _merge(self) -> None:
        """Take over what was given under another name."""
        if self.image is not None:
            if self.images:
                raise _error("image and images; give one of them")
            self.images, self.image = [self.image], None
        if self.texts is not None:
            if self.labels is not None:
                raise _error("texts and labels; give one of them")
            self.labels, self.texts = self.texts, None

    def _check_labels(self, labels: list[str], limits: ServeConfig) -> None:
        templates = self.templates or []
        if not labels or self.templates == []:
            name = "templates" if labels else "labels"
            raise _error(f"{name} is empty; give at least one, or leave it out to use those of the service")
        _check_count("templates", len(templates), limits.max_texts, "serve.max_texts")
        _check_count("labels in templates", len(labels) * max(1, len(templates)), limits.max_texts, "serve.max_texts")
        seen: dict[str, str] = {}
        for label in labels:
            same = seen.get(as_read(label))
            seen[as_read(label)] = label
            if same is not None:
                what = "is a duplicate" if same == label else f"and {same[:80]!r} differ in spaces or Unicode form only"
                raise _error(f"labels: {label[:80]!r} {what}; remove it")
        for place, template in enumerate(templates):
            if template.count("{}") != 1:
                raise _error(f"templates.{place}: must contain {{}} exactly once, for the label")
        # The answer repeats the labels for every image.
        longest = sorted((len(json.dumps(label)) for label in labels), reverse=True)[: self.top_k or 1]
        if len(self.images) * sum(longest) > limits.max_body_bytes:
            limit = f"serve.max_body_bytes={limits.max_body_bytes:,}"
            raise _error(f"the answer would exceed {limit}; take a lower top_k")


_Request = TypeVar("_Request", EmbedRequest, PredictRequest)


def read_request(model: type[_Request], content_type: str, body: bytes | bytearray, limits: ServeConfig) -> _Request:
    """Parse and validate a body.

    Raises:
        Refused: with status 415 or 422 and the errors of the body.
    """
    kind, options = parse_options_header(content_type)
    try:
        if kind == JSON.encode():
            _check_values(body, limits)
            return model.model_validate_json(bytes(body), context=limits)
        if kind == MULTIPART.encode():
            values = _read_form(options.get(b"boundary", b""), bytes(body), limits)
            if model is PredictRequest and len(values.get("texts", ())) == 1:
                # Once, it may hold several; repeated, each is one label.
                [values["texts"]] = values["texts"]
            return model.model_validate(values, context=limits)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        listed = "; ".join(_message(model, each) for each in found[:LISTED])
        raise invalid(f"{listed} and {len(found) - LISTED} more" if len(found) > LISTED else listed) from error
    raise Refused(415, "media_type", f"the body must be {JSON} or {MULTIPART}, and its type is {content_type!r}")


def _check_values(body: bytes | bytearray, limits: ServeConfig) -> None:
    # Before the body is parsed: many small values, or many errors, take several times the memory of the body. An image
    # has four strings and their commas, a text has one.
    most = 8 * limits.max_images + 2 * limits.max_texts + OTHER_PARTS
    if sum(1 for _ in islice(PIECES.finditer(body), most + 1)) > most:
        names = f"serve.max_images={limits.max_images:,} and serve.max_texts={limits.max_texts:,}"
        raise invalid(f"more values than {names} allow")


def _message(model: type[BaseModel], error: ErrorDetails) -> str:
    message, place = error["msg"], ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = model if len(error["loc"]) == 1 else EncodedImage
        message = f"is not known; there are {', '.join(known.model_fields)}"
    # The checks of a whole request name the field themselves.
    return message if error["type"] == "limit" and not place else f"{place or 'body'}: {message}"


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


def _read_form(boundary: bytes, body: bytes, limits: ServeConfig) -> dict[str, Any]:
    """Return the parts of a form as the values of a model."""
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


FORMS: dict[type[BaseModel], dict[str, Any]] = {
    EmbedRequest: {"type": "object", "properties": EMBED_FIELDS},
    PredictRequest: {"type": "object", "properties": PREDICT_FIELDS, **ONE_OF_IMAGES},
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a body: JSON of a model, or a form."""
    reference = {"$ref": REFERENCE.format(model=model.__name__)}
    content = {JSON: {"schema": reference}, MULTIPART: {"schema": FORMS[model]}}
    return {"requestBody": {"required": True, "content": content}}


def request_schemas() -> dict[str, Any]:
    """Return the OpenAPI components that :func:`body_of` refers to."""
    models = [(model, "validation") for model in FORMS]
    found: dict[str, Any] = models_json_schema(models, ref_template=REFERENCE)[1]["$defs"]  # type: ignore[arg-type]
    return found
