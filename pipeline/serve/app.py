"""The routes of the service, as an ASGI app; ``create`` is the factory for gunicorn and uvicorn."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from importlib import metadata
from typing import Any, TypeVar, cast

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipeline.config.schema import Config
from pipeline.core.errors import exit_code_of
from pipeline.core.log_format import ending, new_run
from pipeline.core.records import OK, Failure
from pipeline.engine.forward import Labelling
from pipeline.serve.errors import Gone, Refused
from pipeline.serve.forward import Row
from pipeline.serve.middleware import KEY, Envelope, Exchange
from pipeline.serve.requests import Asked, Image, read_asked
from pipeline.serve.schemas import (
    ERRORS,
    EmbedAnswer,
    EmbedRequest,
    PredictAnswer,
    PredictRequest,
    State,
    VersionAnswer,
    asked_schemas,
    body_of,
)
from pipeline.serve.service import Service
from pipeline.serve.settings import config_of_environment
from pipeline.telemetry.logs import library_messages, log_to_terminal

# Bodies from so many bytes on are read in another thread.
LARGE = 2**18
# What gunicorn takes for a worker that cannot start: it ends, with all others. One that replaces a worker says which
# code leaves those alone.
BOOT_ERROR = 3
BOOT_CODE = "PIPELINE_SERVE_BOOT_CODE"
_T = TypeVar("_T")
log = logging.getLogger(__name__)


def create() -> FastAPI:
    """The app of the overrides in ``PIPELINE_SERVE_OVERRIDES``; its log goes to standard error.

    The model is opened beside the server. If that fails, the process ends, with gunicorn's code for it.

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
    """The app of a service, which it starts and closes.

    Args:
        service: not started.
        failed: told if the engine cannot be opened.
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

    # A redirect would lead to whatever host the request names.
    plain: dict[str, Any] = {"redoc_url": None, "docs_url": None, "redirect_slashes": False}
    app = FastAPI(title="clip-pipeline", version=metadata.version("clip-pipeline"), lifespan=lifespan, **plain)
    app.state.service = service
    _add_probes(app, service)
    _add_work(app, service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]

    async def refused(request: Request, error: Exception) -> Response:
        # To the envelope, which answers all refusals.
        http = cast(HTTPException, error)
        message = f"{request.method[:20]} {request.url.path[:200]}: {http.detail}; /openapi.json says what there is"
        name = {404: "not_found", 405: "method_not_allowed"}.get(http.status_code, "http")
        raise Refused(http.status_code, name, message, headers=http.headers)

    app.add_exception_handler(HTTPException, refused)
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Envelope, service=service, routes=routes)
    return app


def _add_probes(app: FastAPI, service: Service) -> None:
    unready: dict[int | str, dict[str, Any]] = {503: {"model": State, "description": "Not so, and why."}}

    @app.get("/healthz", response_model=State, responses=unready)
    async def healthz() -> Response:
        """Whether the process is alive; 503 where the engine broke and another should be started."""
        broken = service.fault is not None
        return _json({"status": service.trouble if broken else "alive"}, 503 if broken else 200)

    @app.get("/readyz", response_model=State, responses=unready)
    async def readyz() -> Response:
        """Whether the model is warm and its parity held; 503 while it is opened, and while the service ends."""
        trouble = "draining" if service.draining else service.trouble
        return _json({"status": trouble or "ready"}, 503 if trouble else 200)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """The figures, for Prometheus."""
        return Response(service.metrics.page(), headers={"content-type": service.metrics.content_type})

    @app.get("/version", response_model=VersionAnswer)
    async def version() -> Response:
        """What answers."""
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


def _add_work(app: FastAPI, service: Service) -> None:
    async def answered(
        request: Request, model: type[BaseModel], work: Callable[[Asked], Coroutine[Any, Any, dict[str, Any]]]
    ) -> Response:
        exchange: Exchange = request.state._state[KEY]
        service.ready_engine()
        client = request.client.host if request.client else ""
        exchange.under_way.enter_context(service.admission.request(client))
        body = await _body(request)
        service.metrics.stage("read", exchange.seconds)
        arguments = (model, request.headers.get("content-type", ""), body, service.config.serve)
        if len(body) < LARGE:
            asked = read_asked(*arguments)
        else:
            asked = await asyncio.to_thread(read_asked, *arguments)
        del body, arguments
        exchange.facts |= {"images": len(asked.images), "texts": len(asked.texts)}
        with service.admission.pictures(len(asked.images)):
            return _json(await _unless_gone(request, work(asked)))

    async def embed(asked: Asked) -> dict[str, Any]:
        engine = service.ready_engine()
        rows, texts = await asyncio.gather(service.rows(asked.images, None), service.texts(asked.texts))
        dtype = np.dtype(service.config.output.dtype)
        return {
            "fingerprint": engine.fingerprint,
            "dim": engine.checkpoint.dim,
            "images": [_embedding(image, row, dtype) for image, row in zip(asked.images, rows, strict=True)],
            "texts": [{"embedding": vector.astype(dtype).tolist()} for vector in texts],
        }

    async def predict(asked: Asked) -> dict[str, Any]:
        engine, labelling = service.ready_engine(), await service.labelling(asked)
        rows = await service.rows(asked.images, labelling)
        threshold = service.config.labels.threshold
        return {
            "fingerprint": engine.fingerprint,
            "prompts": labelling.bank.fingerprint,
            "images": [
                _prediction(image, row, labelling, threshold) for image, row in zip(asked.images, rows, strict=True)
            ],
        }

    @app.post("/embed", response_model=EmbedAnswer, responses=ERRORS, openapi_extra=body_of(EmbedRequest))
    async def embed_route(request: Request) -> Response:
        """Embeddings of images, as a dataset has them, and of texts; a bad image has a status, and no embedding."""
        return await answered(request, EmbedRequest, embed)

    @app.post("/predict", response_model=PredictAnswer, responses=ERRORS, openapi_extra=body_of(PredictRequest))
    async def predict_route(request: Request) -> Response:
        """The best labels of images, as a dataset has them, from the service's labels or those of the request."""
        return await answered(request, PredictRequest, predict)


def _embedding(image: Image, row: Row | Failure, dtype: np.dtype[Any]) -> dict[str, Any]:
    if isinstance(row, Failure):
        return {"id": image.id, **_failed(row), "embedding": None}
    return {"id": image.id, "status": OK, "error": None, "embedding": row.vector.astype(dtype).tolist()}


def _prediction(image: Image, row: Row | Failure, labelling: Labelling, threshold: float | None) -> dict[str, Any]:
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
    """The whole body, which the envelope counts."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "content_encoding", "bodies are not unpacked; send it without a content-encoding")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
    except ClientDisconnect as error:
        raise Gone from error
    return body


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What comes of the work, which ends once the client has closed the connection.

    Raises:
        Gone: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for each in (working, watching):
            each.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working


def _json(content: dict[str, Any], status: int = 200) -> Response:
    # Without a model in between: half of the time of an answer with many embeddings would go there.
    body = json.dumps(content, allow_nan=False, default=str, separators=(",", ":"))
    return Response(body.encode(), status, media_type="application/json")


def _shown(config: Config) -> dict[str, Any]:
    """The settings without those that say where things lie on this machine or name credentials."""
    groups = ("backend", "images", "loader", "labels", "output", "parity", "serve")
    hidden = {"artifacts", "dir", "host", "port", "private_hosts", "schemes"}
    found = {name: dataclasses.asdict(getattr(config, name)) for name in groups}
    return {group: {key: each for key, each in values.items() if key not in hidden} for group, values in found.items()}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schema["components"]["schemas"] |= asked_schemas()
        app.openapi_schema = schema
    return app.openapi_schema
