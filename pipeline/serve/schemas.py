"""What travels over HTTP, as its readers see it in the OpenAPI page; statuses and columns are those of a dataset."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"
JSON, MULTIPART = "application/json", "multipart/form-data"


class _Asked(BaseModel):
    # Strict, so that a number is not taken for a text; closed, so that a typo is told.
    model_config = ConfigDict(extra="forbid", strict=True)


class EncodedImage(_Asked):
    """One encoded image (JPEG, PNG, ...) in base64; ``id`` comes back with its answer."""

    data: str = Field(description="The bytes of the file, in base64.")
    id: str | None = None


class EmbedRequest(_Asked):
    """Images, texts, or both."""

    images: list[EncodedImage] = []
    texts: list[str] = []


class PredictRequest(_Asked):
    """Images, and what to tell apart, if not the labels of the service."""

    images: list[EncodedImage]
    labels: list[str] | None = None
    templates: list[str] | None = Field(None, description="Each holds {} once, where a label goes; with labels alone.")
    top_k: int | None = Field(None, ge=1, le=1000)


class ImageEmbedding(BaseModel):
    """One image's answer; ``embedding`` is null unless ``status`` is ok."""

    id: str | None
    status: str
    error: str | None
    embedding: list[float] | None


class TextEmbedding(BaseModel):
    """One text's answer."""

    embedding: list[float]


class EmbedAnswer(BaseModel):
    """Answers in the order of the request; embeddings have length 1, and ``fingerprint`` says what made them."""

    fingerprint: str
    dim: int
    images: list[ImageEmbedding]
    texts: list[TextEmbedding]


class Prediction(BaseModel):
    """One image's answer, with the columns of a dataset; ``label`` is null under labels.threshold too."""

    id: str | None
    status: str
    error: str | None
    label: str | None
    score: float | None
    top_labels: list[str] | None
    top_scores: list[float] | None


class PredictAnswer(BaseModel):
    """Answers in the order of the request; ``prompts`` is the fingerprint of the label set."""

    fingerprint: str
    prompts: str
    images: list[Prediction]


class ErrorDetail(BaseModel):
    """Why there is no answer; ``request`` is the id that the log has too."""

    name: str
    message: str
    request: str


class ErrorAnswer(BaseModel):
    """A request that was not done."""

    error: ErrorDetail


class State(BaseModel):
    """How the service is."""

    status: str


class VersionAnswer(BaseModel):
    """What answers: versions, model, fingerprints and settings."""

    version: str
    model: str
    fingerprint: str | None
    fingerprints: dict[str, Any] | None
    device: str | None
    precision: str | None
    parity: list[dict[str, Any]]
    config: dict[str, Any]


FILES = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "Files; their names come back as ids."}  # fmt: skip  # noqa: E501
TEXTS = {"type": "array", "items": {"type": "string"}}
FORMS: dict[type[BaseModel], dict[str, Any]] = {
    EmbedRequest: {"type": "object", "properties": {"images": FILES, "texts": TEXTS}},
    PredictRequest: {
        "type": "object",
        "properties": {
            "images": FILES,
            "labels": TEXTS,
            "templates": TEXTS,
            "top_k": {"type": "integer", "minimum": 1, "maximum": 1000},
        },
        "required": ["images"],
    },
}
_WORDS = {
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is neither JSON nor multipart/form-data.",
    422: "The body is not what the schema says, or over a limit of the service.",
    429: "Too many requests of this client are under way.",
    500: "The service failed.",
    503: "Not ready, ending, or overloaded.",
    504: "No answer in time.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": words, "model": ErrorAnswer} for code, words in _WORDS.items()
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI page says of the body: JSON of a model, or a form."""
    reference = {"$ref": REFERENCE.format(model=model.__name__)}
    content = {JSON: {"schema": reference}, MULTIPART: {"schema": FORMS[model]}}
    return {"requestBody": {"required": True, "content": content}}


def asked_schemas() -> dict[str, Any]:
    """The components that :func:`body_of` refers to."""
    models = [(model, "validation") for model in FORMS]
    found: dict[str, Any] = models_json_schema(models, ref_template=REFERENCE)[1]["$defs"]  # type: ignore[arg-type]
    return found
