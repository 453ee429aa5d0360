"""Bodies of the answers and fields of forms, for the OpenAPI document; columns and statuses are those of a dataset."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ImageEmbedding(BaseModel):
    """Result of one image; ``embedding`` is null unless ``status`` is ok."""

    id: str | None
    status: str
    error: str | None
    embedding: list[float] | None


class TextEmbedding(BaseModel):
    """Result of one text."""

    embedding: list[float]


class EmbedAnswer(BaseModel):
    """Embeddings of length 1 in the order of the request; ``fingerprint`` identifies the model and the settings."""

    fingerprint: str
    dim: int
    images: list[ImageEmbedding]
    texts: list[TextEmbedding]


class Prediction(BaseModel):
    """Result of one image, with the columns of a dataset; ``label`` is also null below labels.threshold."""

    id: str | None
    status: str
    error: str | None
    label: str | None
    score: float | None
    top_labels: list[str] | None
    top_scores: list[float] | None


class PredictAnswer(BaseModel):
    """Labels in the order of the request; ``prompts`` is the fingerprint of the label set."""

    fingerprint: str
    prompts: str
    images: list[Prediction]


class Embedding(BaseModel):
    """One embedding for OpenAI's clients; in base64, of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts, special ones included; texts with more than the model takes are cut."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """Embeddings of length 1 in the order of the input; ``model`` is the name in the request."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class OpenAIErrorDetail(BaseModel):
    """Error for OpenAI's clients; ``code`` is its name, ``param`` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorAnswer(BaseModel):
    """Body of every answer to a request of OpenAI's clients that was refused or failed."""

    error: OpenAIErrorDetail


class ErrorDetail(BaseModel):
    """Name and message of an error; ``request`` is the id of the request, as in the log."""

    name: str
    message: str
    request: str


class ErrorAnswer(BaseModel):
    """Body of every answer to a request that was refused or failed."""

    error: ErrorDetail


class State(BaseModel):
    """State of the service."""

    status: str


class VersionAnswer(BaseModel):
    """Version, model, fingerprints and settings of the service."""

    version: str
    model: str
    fingerprint: str | None
    fingerprints: dict[str, Any] | None
    device: str | None
    precision: str | None
    parity: list[dict[str, Any]]
    config: dict[str, Any]


_DESCRIPTIONS = {
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is neither JSON nor multipart/form-data.",
    422: "The body does not match the schema, or exceeds a limit of the service.",
    429: "Too many requests of this client are in progress.",
    500: "The service failed.",
    503: "Not ready, ending, or overloaded.",
    504: "The request was not answered in time.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": description, "model": ErrorAnswer} for code, description in _DESCRIPTIONS.items()
}
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    400 if code == 422 else code: {"description": description, "model": OpenAIErrorAnswer}
    for code, description in _DESCRIPTIONS.items()
}

ONE_OF_IMAGES: dict[str, Any] = {"anyOf": [{"required": ["images"]}, {"required": ["image"]}]}
_FILES = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "description": "Files; their names are returned as ids.",
}
_TEXTS = {"type": "array", "items": {"type": "string"}}
EMBED_FIELDS = {"images": _FILES, "texts": _TEXTS}
PREDICT_FIELDS = {
    "images": _FILES,
    "image": {"type": "string", "format": "binary", "description": "One file in place of images."},
    "labels": _TEXTS,
    "texts": {"anyOf": [_TEXTS, {"type": "string"}], "description": "Labels: repeated, a JSON list, or with commas."},
    "templates": _TEXTS,
    "top_k": {"type": "integer", "minimum": 1, "maximum": 1000},
}
