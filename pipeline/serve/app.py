"""ASGI app with the routes of the service; ``create`` is the factory for gunicorn and uvicorn."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from importlib import metadata
from typing import Any, TypeVar, cast

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipeline.config.schema import Config, ServeConfig
from pipeline.core.errors import exit_code_of
from pipeline.core.log_format import ending, new_run
from pipeline.core.records import OK, Failure
from pipeline.dataset.vectors import VectorFormat
from pipeline.engine.forward import Labelling
from pipeline.serve import openai
from pipeline.serve.errors import Refused
from pipeline.serve.forward import Row
from pipeline.serve.middleware import KEY, Exchange, RequestMiddleware
from pipeline.serve.openai import PREFIX, EmbeddingsRequest
from pipeline.serve.requests import (
    EmbedRequest,
    EncodedImage,
    PredictRequest,
    body_of,
    read_request,
    request_schemas,
)
from pipeline.serve.schemas import (
    ERRORS,
    OPENAI_ERRORS,
    EmbedAnswer,
    EmbeddingsAnswer,
    PredictAnswer,
    State,
    VersionAnswer,
)
from pipeline.serve.service import Service
from pipeline.serve.settings import config_of_environment
from pipeline.telemetry.logs import library_messages, log_to_terminal

# Bodies of at least so many bytes are parsed in another thread.
LARGE = 2**18
# Exit code on which gunicorn ends with all workers. A replacement of a worker gets another code from the environment,
# so that the other workers stay.
BOOT_ERROR = 3
BOOT_CODE = "PIPELINE_SERVE_BOOT_CODE"
_T = TypeVar("_T")
_Body = TypeVar("_Body", EmbedRequest, PredictRequest, EmbeddingsRequest)
_Work = Coroutine[Any, Any, _T]
log = logging.getLogger(__name__)


def create() -> FastAPI:
    """Return the app for the overrides in ``PIPELINE_SERVE_OVERRIDES``; it logs to standard error.

    The model is opened in the background. If that fails, the process ends with gunicorn's exit code for it.

    Raises:
        ConfigError: with every problem.
    """
    config, run, opened = config_of_environment(), new_run(), ExitStack()
    opened.enter_context(library_messages(config.log, run))
    opened.enter_context(log_to_terminal(config.log, run))

    def failed(error: BaseException) -> None:
        logging.getLogger("pipeline").handle(ending(error, exit_code_of(error)))
        os._exit(int(os.environ.get(BOOT_CODE, BOOT_ERROR)))

    return build(Service(config), failed=failed, ended=opened.close)


def build(
    service: Service, *, failed: Callable[[BaseException], None], ended: Callable[[], None] = lambda: None
) -> FastAPI:
    """Return the app that starts, serves and closes a service.

    Args:
        service: a service that is not started.
        failed: called if the engine cannot be opened.
        ended: called last.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start(failed)
        try:
            yield
        finally:
            service.drain()
            await service.close()
            ended()

    # A redirect would lead to the host that the request names.
    options: dict[str, Any] = {"redoc_url": None, "docs_url": None, "redirect_slashes": False}
    app = FastAPI(title="clip-pipeline", version=metadata.version("clip-pipeline"), lifespan=lifespan, **options)
    app.state.service = service
    _add_probes(app, service)
    _add_inference(app, service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]

    async def refused(request: Request, error: Exception) -> Response:
        # The middleware answers all refusals.
        http = cast(HTTPException, error)
        message = f"{request.method[:20]} {request.url.path[:200]}: {http.detail}; see /openapi.json for the routes"
        name = {404: "not_found", 405: "method_not_allowed"}.get(http.status_code, "http")
        raise Refused(http.status_code, name, message, headers=http.headers)

    app.add_exception_handler(HTTPException, refused)
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(RequestMiddleware, service=service, routes=routes)
    return app


def _add_probes(app: FastAPI, service: Service) -> None:
    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": State, "description": "The reason."}}

    @app.get("/healthz", response_model=State, responses=not_ready)
    async def healthz() -> Response:
        """Liveness; 503 after the engine failed, so that a supervisor starts a new process."""
        failed = service.fault is not None
        return _json({"status": service.not_ready_reason if failed else "alive"}, 503 if failed else 200)

    @app.get("/readyz", response_model=State, responses=not_ready)
    async def readyz() -> Response:
        """Readiness: the model is warm and its parity passed; 503 while it is opened, and while the service ends."""
        reason = "draining" if service.draining else service.not_ready_reason
        return _json({"status": reason or "ready"}, 503 if reason else 200)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.page(), headers={"content-type": service.metrics.content_type})

    @app.get("/version", response_model=VersionAnswer)
    async def version() -> Response:
        """Version, model, fingerprints and settings of the service."""
        engine = service.engine
        return _json(
            {
                "version": metadata.version("clip-pipeline"),
                "model": service.config.model.name,
                "fingerprint": engine.fingerprint if engine else None,
                "fingerprints": engine.fingerprints if engine else None,
                "device": engine.device if engine else None,
                "precision": engine.precision if engine else None,
                "parity": [dataclasses.asdict(each) for each in engine.parity] if engine else [],
                "config": _shown(service.config),
            }
        )

    for probe in (healthz, readyz, metrics, version):
        # Load balancers ask so too; the server sends no body then.
        app.add_api_route(f"/{probe.__name__}", probe, methods=["HEAD"], include_in_schema=False)


def _add_inference(app: FastAPI, service: Service) -> None:
    async def answer(
        request: Request,
        read: Callable[[str, bytearray, ServeConfig], _Body],
        work: Callable[[_Body], _Work[dict[str, Any]]],
    ) -> Response:
        exchange: Exchange = request.scope["state"][KEY]
        service.ready_engine()
        client = request.client.host if request.client else ""
        exchange.resources.enter_context(service.admission.request(client))
        body = await _body(request)
        service.metrics.stage("read", exchange.seconds)
        parse = partial(read, request.headers.get("content-type", ""), body, service.config.serve)
        parsed = parse() if len(body) < LARGE else await asyncio.to_thread(parse)
        # The body must not stay in memory while its images are decoded.
        del body, parse
        exchange.facts |= {"images": len(parsed.images), "texts": len(getattr(parsed, "texts", None) or ())}
        with service.admission.images(len(parsed.images)):
            return _json(await _unless_disconnected(request, work(parsed)))

    async def embed(body: EmbedRequest) -> dict[str, Any]:
        engine = service.ready_engine()
        kept = engine.vectors
        rows, texts = await asyncio.gather(service.rows(body.images, None), service.texts(body.texts))
        return {
            "fingerprint": engine.fingerprint,
            "dim": kept.dim,
            "images": [_embedding(image, row, kept) for image, row in zip(body.images, rows, strict=True)],
            "texts": [{"embedding": kept.floats(vector).tolist()} for vector in texts],
        }

    async def predict(body: PredictRequest) -> dict[str, Any]:
        engine, labelling = service.ready_engine(), await service.labelling(body)
        rows, threshold = await service.rows(body.images, labelling), service.config.labels.threshold
        images = [_prediction(image, row, labelling, threshold) for image, row in zip(body.images, rows, strict=True)]
        return {"fingerprint": engine.fingerprint, "prompts": labelling.bank.fingerprint, "images": images}

    @app.post("/embed", response_model=EmbedAnswer, responses=ERRORS, openapi_extra=body_of(EmbedRequest))
    async def embed_route(request: Request) -> Response:
        """Embeddings of texts, and of images as in a dataset; a bad image has a status and no embedding."""
        return await answer(request, partial(read_request, EmbedRequest), embed)

    @app.post("/predict", response_model=PredictAnswer, responses=ERRORS, openapi_extra=body_of(PredictRequest))
    async def predict_route(request: Request) -> Response:
        """Best labels of images as in a dataset, from the labels of the service or of the request."""
        return await answer(request, partial(read_request, PredictRequest), predict)

    @app.post(
        f"{PREFIX}embeddings",
        response_model=EmbeddingsAnswer,
        responses=OPENAI_ERRORS,
        openapi_extra=body_of(EmbeddingsRequest),
    )
    async def embeddings_route(request: Request) -> Response:
        """Embeddings of texts and images for OpenAI's clients; a bad image refuses the request."""
        exchange: Exchange = request.scope["state"][KEY]
        return await answer(request, openai.read_request, partial(openai.embed, service, hold=exchange.hold))


def _embedding(image: EncodedImage, row: Row | Failure, kept: VectorFormat) -> dict[str, Any]:
    if isinstance(row, Failure):
        return {"id": image.id, **_failed(row), "embedding": None}
    return {"id": image.id, "status": OK, "error": None, "embedding": kept.floats(row.vector).tolist()}


def _prediction(
    image: EncodedImage, row: Row | Failure, labelling: Labelling, threshold: float | None
) -> dict[str, Any]:
    if isinstance(row, Failure):
        nothing = dict.fromkeys(("label", "score", "top_labels", "top_scores"))
        return {"id": image.id, **_failed(row), **nothing}
    names, scores = [labelling.bank.names[each] for each in row.top], row.scores.tolist()
    # Compared in float32, as a dataset's column is.
    unsure = threshold is not None and bool(row.scores[0] < np.float32(threshold))
    label = None if unsure else names[0]
    found = {"label": label, "score": scores[0], "top_labels": names, "top_scores": scores}
    return {"id": image.id, "status": OK, "error": None, **found}


def _failed(row: Failure) -> dict[str, str]:
    return {"status": row.status, "error": row.error}


async def _body(request: Request) -> bytearray:
    """Return the whole body; the middleware limits its size."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "content_encoding", "bodies are not decompressed; send the body without a content-encoding")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    return body


async def _unless_disconnected(request: Request, work: _Work[_T]) -> _T:
    """Return the result of the work; cancel it once the client closes the connection.

    Raises:
        ClientDisconnect: the client closed it first.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for each in (working, watching):
            each.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working


def _json(content: dict[str, Any], status: int = 200) -> Response:
    # Without a pydantic model: it would take half of the time of an answer with many embeddings.
    body = json.dumps(content, allow_nan=False, default=str, separators=(",", ":"))
    return Response(body.encode(), status, media_type="application/json")


def _shown(config: Config) -> dict[str, Any]:
    """Return the settings without paths of this machine and names of credentials."""
    groups = ("backend", "images", "loader", "labels", "output", "parity", "serve")
    hidden = {"artifacts", "dir", "host", "port", "private_hosts", "schemes"}
    found = {name: dataclasses.asdict(getattr(config, name)) for name in groups}
    return {group: {key: each for key, each in values.items() if key not in hidden} for group, values in found.items()}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schema["components"]["schemas"] |= request_schemas(EmbeddingsRequest)
        app.openapi_schema = schema
    return app.openapi_schema
