"""``POST /v1/embeddings`` as OpenAI's clients send it: the body, the answer, and the form of errors.

OpenAI's ``input`` is a text or a list of texts. Images are sent as other servers take them: as a string that is a data
URI of an image (Infinity), or as an object ``{"image": ...}`` with a data URI, a URL or base64 (Jina), beside
``{"text": ...}``. A string that begins with ``http`` is a text: only an object lets the service fetch a URL.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo, model_validator

from pipeline.config.schema import ServeConfig
from pipeline.core.errors import NumericalError
from pipeline.core.records import Failure
from pipeline.dataset.vectors import VectorFormat
from pipeline.images.sources.http import SCHEMES
from pipeline.serve import requests
from pipeline.serve.errors import Refused, invalid
from pipeline.serve.requests import (
    Closed,
    EncodedImage,
    check_count,
    checked_text,
    decoded,
    limit_error,
    limits_of,
    short_text,
)
from pipeline.serve.service import Service
from pipeline.storage.urls import scheme_of

# Paths with OpenAI's form of errors.
PREFIX = "/v1/"
# An input that begins with a number is one of token ids, which may be longer than other bodies.
_TOKENS = re.compile(rb'"input"\s*+:[\[\s]*+[\d-]')
_DATA = re.compile(r"data:image/[\w.+-]+(?:;[\w-]+=[\w-]+)*;base64,", re.IGNORECASE | re.ASCII)
_FORMS = 'a text, a data URI of an image, {"text": ...} or {"image": ...}'


@dataclass(frozen=True, slots=True)
class Link:
    """Address of an image, http or https."""

    url: str


Item = str | bytes | Link
_Image = TypeVar("_Image")


def _image(value: str, info: ValidationInfo) -> bytes | Link:
    """Return the bytes of a data URI or of base64, or the address to fetch them from."""
    if found := _DATA.match(value):
        return decoded(value[found.end() :])
    if value[:5].lower() == "data:":
        raise limit_error("a data URI of an image begins like data:image/jpeg;base64,")
    scheme = scheme_of(value)
    if not scheme:
        return decoded(value)
    if scheme not in SCHEMES:
        raise limit_error(f"{scheme[:20]} addresses are not fetched; give http, https or a data URI")
    return Link(short_text(value, info))


def _item(value: Any, info: ValidationInfo) -> Item:
    if isinstance(value, dict) and len(value) == 1:
        [(name, inner)] = value.items()
        if name == "image" and isinstance(inner, str):
            return _image(inner, info)
        if name == "text" and isinstance(inner, str):
            return checked_text(inner, info)
    if not isinstance(value, str):
        raise limit_error(f"must be {_FORMS}")
    return _image(value, info) if value[:11].lower() == "data:image/" else checked_text(value, info)


def _as_list(value: Any) -> Any:
    if isinstance(value, str | dict):
        return [value]
    if not isinstance(value, list):
        raise limit_error(f"must be {_FORMS}, or a list of them")
    return value


def _positive(value: int) -> int:
    if value < 1:
        raise limit_error("must be at least 1")
    return value


_Given = str | dict[Literal["text", "image"], str]


class EmbeddingsRequest(Closed):
    """OpenAI's request for embeddings, of texts and images."""

    input: Annotated[
        list[Annotated[Item, PlainValidator(_item, json_schema_input_type=_Given)]],
        BeforeValidator(_as_list, json_schema_input_type=_Given | list[_Given]),
    ] = Field(description=f"One or a list of: {_FORMS}.")
    model: Annotated[str, AfterValidator(short_text)] | None = Field(None, description="Any name; it is returned.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32.")
    dimensions: Annotated[int, AfterValidator(_positive)] | None = Field(
        None, description="How many numbers of an embedding are returned, of length 1 again."
    )
    user: str | None = Field(None, description="Not used.")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> EmbeddingsRequest:
        limits = limits_of(info)
        if not self.input:
            raise limit_error("input is empty; give at least one text or image")
        check_count("input: images", len(self.images), min(limits.max_images, limits.queue), "serve.max_images")
        check_count("input: texts", len(self.texts), limits.max_texts, "serve.max_texts")
        return self

    @property
    def texts(self) -> list[str]:
        """The texts of the input."""
        return [item for item in self.input if isinstance(item, str)]

    @property
    def images(self) -> list[bytes | Link]:
        """The images of the input."""
        return [item for item in self.input if not isinstance(item, str)]


def read_request(content_type: str, body: bytes | bytearray, limits: ServeConfig) -> EmbeddingsRequest:
    """Parse and validate a body.

    Raises:
        Refused: see :func:`pipeline.serve.requests.read_request`; for token ids too.
    """
    if _TOKENS.search(body):
        message = "input: token ids are not taken, as the tokens are those of another model; send texts"
        raise invalid(f"{message} (LangChain: check_embedding_ctx_length=False)", param="input")
    return requests.read_request(EmbeddingsRequest, content_type, body, limits)


async def embed(service: Service, body: EmbeddingsRequest, *, hold: Callable[[int], None]) -> dict[str, Any]:
    """Return the answer, with an embedding for each input; ``hold`` counts the bytes of fetched images.

    Raises:
        Refused: an image cannot be fetched or decoded, there are too few numbers, or the service is not ready.
    """
    form = _with_dimensions(service.ready_engine().vectors, body.dimensions)

    async def fetched(image: bytes | Link) -> bytes | Failure:
        if isinstance(image, bytes):
            return image
        found = await service.fetch(image.url)
        if not isinstance(found, Failure):
            hold(len(found))
        return found

    # All end before a refusal does: what is counted later would never be released.
    ended = await asyncio.gather(*map(fetched, body.images), return_exceptions=True)
    for error in (each for each in ended if isinstance(each, BaseException)):
        raise error
    data = _without_failures(body, (each for each in ended if not isinstance(each, BaseException)))
    rows, texts, tokens = await asyncio.gather(
        service.rows([EncodedImage.model_construct(data=each) for each in data], None),
        service.texts(body.texts),
        service.count_tokens(body.texts),
    )
    of_images, of_texts = iter(_without_failures(body, rows)), iter(texts)
    vectors = [next(of_texts) if isinstance(item, str) else next(of_images).vector for item in body.input]
    try:
        floats = [form.floats(vector) for vector in vectors]
    except NumericalError as error:
        message = f"dimensions: the first {form.dim} numbers of an embedding are 0; take more of them"
        raise invalid(message, param="dimensions") from error
    shown = [_base64(each) if body.encoding_format == "base64" else each.tolist() for each in floats]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": place, "embedding": each} for place, each in enumerate(shown)],
        "model": service.config.model.name if body.model is None else body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _with_dimensions(form: VectorFormat, dimensions: int | None) -> VectorFormat:
    if dimensions is None:
        return form
    if dimensions > form.dim:
        message = f"dimensions: {dimensions:,}, and the embeddings of this service have {form.dim:,} numbers"
        raise invalid(message, param="dimensions")
    return replace(form, dim=dimensions)


def _without_failures(body: EmbeddingsRequest, images: Iterable[_Image | Failure]) -> list[_Image]:
    """Return what became of the images; the first failure refuses the request, as an answer has no place for it."""
    places = (place for place, item in enumerate(body.input) if not isinstance(item, str))
    good = []
    for place, image in zip(places, images, strict=True):
        if isinstance(image, Failure):
            raise invalid(f"input.{place}: {image.error}", name=image.status, param="input")
        good.append(image)
    return good


def _base64(vector: NDArray[Any]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def openai_error(refused: Refused) -> tuple[int, dict[str, str | None]]:
    """Return the status and the error as OpenAI's clients expect them; a body that is not valid is 400 there."""
    status = 400 if refused.status == 422 else refused.status
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return status, {"message": refused.message, "type": kind, "param": refused.param, "code": refused.name}
