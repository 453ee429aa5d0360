"""Request bodies: the models that validate them."""

from __future__ import annotations

import base64
import binascii
import json
import re
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
from python_multipart.multipart import parse_options_header

from pipeline.config.schema import ServeConfig
from pipeline.models.label_files import as_read, is_text
from pipeline.serve.errors import Refused, invalid
from pipeline.serve.forms import OTHER_PARTS, read_form
from pipeline.serve.schemas import EMBED_FIELDS, ONE_OF_IMAGES, PREDICT_FIELDS

REFERENCE = "#/components/schemas/{model}"
JSON, MULTIPART = "application/json", "multipart/form-data"
# A message lists at most so many errors of a body.
LISTED = 5
# The strings of JSON, and the commas between them. A string without an end extends to the end of the body, so that
# no byte is read twice.
PIECES = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|,', re.DOTALL)


def limit_error(message: str) -> PydanticCustomError:
    """Return an error for a validator to raise; its message is shown as it is."""
    # Without a context, pydantic does not replace braces in the message.
    return PydanticCustomError("limit", message)


def limits_of(info: ValidationInfo) -> ServeConfig:
    """Return the limits that a body is validated with."""
    assert isinstance(info.context, ServeConfig)
    return info.context


def decoded(value: Any) -> bytes:
    """Decode base64; the value is bytes in a form, never in JSON.

    Raises:
        PydanticCustomError: it is not base64.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise limit_error("must be a string in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise limit_error(f"not base64 without line breaks and prefix: {error}") from error


def short_text(value: str, info: ValidationInfo) -> str:
    """Return a string of at most ``serve.max_text_chars`` characters.

    Raises:
        PydanticCustomError: it has more.
    """
    limit = limits_of(info).max_text_chars
    if len(value) > limit:
        raise limit_error(f"{len(value):,} characters, over serve.max_text_chars={limit:,}")
    return value


def checked_text(value: str, info: ValidationInfo) -> str:
    """Return a text for the text tower.

    Raises:
        PydanticCustomError: it is empty, too long, or not text.
    """
    if not short_text(value, info).strip() or not is_text(value):
        raise limit_error("is empty, or is not text")
    return value


def check_count(name: str, count: int, limit: int, setting: str) -> None:
    """Check a number of values against a setting.

    Raises:
        PydanticCustomError: there are more.
    """
    if count > limit:
        raise limit_error(f"{name}: {count:,}, over {setting}={limit:,}")


class Closed(BaseModel):
    """Model of a body: strict, so that a number is no text; closed, so that a misspelt name is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class EncodedImage(Closed):
    """One encoded image (JPEG, PNG, ...) in base64; ``id`` is returned with its result."""

    data: Annotated[bytes, PlainValidator(decoded, json_schema_input_type=str)] = Field(
        description="The bytes of the file, in base64."
    )
    id: Annotated[str, AfterValidator(short_text)] | None = None


Texts = list[Annotated[str, AfterValidator(checked_text)]]


def _as_image(value: Any) -> Any:
    """Return the fields of one image: given as its data alone, or the only part of its name in a form."""
    if isinstance(value, list):
        if len(value) != 1:
            raise limit_error(f"{len(value):,} images; give several as images")
        return value[0]
    return {"data": value} if isinstance(value, str) else value


def _as_list(value: Any, info: ValidationInfo) -> Any:
    """Return the texts in a single one: a JSON list of them, or separated by commas."""
    if not isinstance(value, str):
        return value
    limits = limits_of(info)
    if value.lstrip().startswith("["):
        _check_values(value.encode(errors="replace"), limits)
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise limit_error("begins like a JSON list, and is none") from error
    check_count("labels", value.count(",") + 1, limits.max_texts, "serve.max_texts")
    return [each.strip() for each in value.split(",")]


class EmbedRequest(Closed):
    """Images, texts, or both."""

    images: list[EncodedImage] = []
    texts: Texts = []

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> EmbedRequest:
        limits = limits_of(info)
        check_count("images", len(self.images), min(limits.max_images, limits.queue), "serve.max_images")
        check_count("texts", len(self.texts), limits.max_texts, "serve.max_texts")
        if not self.images and not self.texts:
            raise limit_error("images and texts are both empty; give at least one")
        return self


class PredictRequest(Closed):
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
        limits = limits_of(info)
        self._merge()
        check_count("images", len(self.images), min(limits.max_images, limits.queue), "serve.max_images")
        if not self.images:
            raise limit_error("images is empty; give at least one")
        if self.labels is not None:
            self._check_labels(self.labels, limits)
        elif self.templates is not None:
            raise limit_error("templates without labels; give both")
        return self

    def _merge(self) -> None:
        """Take over what was given under another name."""
        if self.image is not None:
            if self.images:
                raise limit_error("image and images; give one of them")
            self.images, self.image = [self.image], None
        if self.texts is not None:
            if self.labels is not None:
                raise limit_error("texts and labels; give one of them")
            self.labels, self.texts = self.texts, None

    def _check_labels(self, labels: list[str], limits: ServeConfig) -> None:
        templates = self.templates or []
        if not labels or self.templates == []:
            name = "templates" if labels else "labels"
            raise limit_error(f"{name} is empty; give at least one, or leave it out to use those of the service")
        check_count("templates", len(templates), limits.max_texts, "serve.max_texts")
        check_count("labels in templates", len(labels) * max(1, len(templates)), limits.max_texts, "serve.max_texts")
        seen: dict[str, str] = {}
        for label in labels:
            same = seen.get(as_read(label))
            seen[as_read(label)] = label
            if same is not None:
                what = "is a duplicate" if same == label else f"and {same[:80]!r} differ in spaces or Unicode form only"
                raise limit_error(f"labels: {label[:80]!r} {what}; remove it")
        for place, template in enumerate(templates):
            if template.count("{}") != 1:
                raise limit_error(f"templates.{place}: must contain {{}} exactly once, for the label")
        # The answer repeats the labels for every image.
        longest = sorted((len(json.dumps(label)) for label in labels), reverse=True)[: self.top_k or 1]
        if len(self.images) * sum(longest) > limits.max_body_bytes:
            limit = f"serve.max_body_bytes={limits.max_body_bytes:,}"
            raise limit_error(f"the answer would exceed {limit}; take a lower top_k")


_Request = TypeVar("_Request", bound=BaseModel)


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
        if kind == MULTIPART.encode() and model in FORMS:
            values = read_form(options.get(b"boundary", b""), bytes(body), limits)
            if model is PredictRequest and len(values.get("texts", ())) == 1:
                # Once, it may hold several; repeated, each is one label.
                [values["texts"]] = values["texts"]
            return model.model_validate(values, context=limits)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        listed = "; ".join(_message(model, each) for each in found[:LISTED])
        message = f"{listed} and {len(found) - LISTED} more" if len(found) > LISTED else listed
        raise invalid(message, param=str(found[0]["loc"][0]) if found[0]["loc"] else None) from error
    kinds = f"{JSON} or {MULTIPART}" if model in FORMS else JSON
    raise Refused(415, "media_type", f"the body must be {kinds}, and its type is {content_type!r}")


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


FORMS: dict[type[BaseModel], dict[str, Any]] = {
    EmbedRequest: {"type": "object", "properties": EMBED_FIELDS},
    PredictRequest: {"type": "object", "properties": PREDICT_FIELDS, **ONE_OF_IMAGES},
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a body: JSON of a model, or a form if there is one."""
    content = {JSON: {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}
    if model in FORMS:
        content[MULTIPART] = {"schema": FORMS[model]}
    return {"requestBody": {"required": True, "content": content}}


def request_schemas(*more: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI components that :func:`body_of` refers to: the models with a form, and ``more``."""
    models = [(model, "validation") for model in (*FORMS, *more)]
    found: dict[str, Any] = models_json_schema(models, ref_template=REFERENCE)[1]["$defs"]  # type: ignore[arg-type]
    return found
