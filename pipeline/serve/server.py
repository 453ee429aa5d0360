"""Run the service of a config on its address until a signal."""

from __future__ import annotations

import logging
import socket
from contextlib import AbstractContextManager
from typing import Any

import uvicorn

from pipeline.config.schema import Config
from pipeline.core.errors import exit_code_of
from pipeline.core.log_format import ending
from pipeline.core.machine import is_loopback
from pipeline.serve.app import build
from pipeline.serve.bind import BACKLOG, bind_to
from pipeline.serve.service import Service
from pipeline.serve.uvicorn_server import Server

# Seconds that an idle connection is kept: longer than in proxies (nginx: 60), so that the proxy closes first.
KEEP_ALIVE = 75
log = logging.getLogger(__name__)


def serve(config: Config) -> int:
    """Answer requests until a signal; returns the exit code.

    0: every accepted request was answered. 1: some were not answered within ``serve.grace_seconds``, or the engine
    failed. If the engine cannot be opened, the error is raised.

    Raises:
        ConfigError: the address cannot be bound.
        PipelineError: the engine cannot be opened.
    """
    service = Service(config)
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    with bind(config) as listening:
        app = build(service, failed=failed)
        server = Server(_settings(app), service)
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("listening on %s", url, extra={"url": url})
        if not is_loopback(config.serve.host):
            log.warning(
                "serve.host=%s: every client that connects can use it; there are no passwords",
                config.serve.host,
            )
        server.run(sockets=[listening])
    if failures:
        raise failures[0]
    if service.fault is not None:
        log.handle(ending(service.fault, exit_code_of(service.fault)))
        return 1
    if service.unanswered:
        grace = config.serve.grace_seconds
        log.error("%d requests were not answered in serve.grace_seconds=%g", service.unanswered, grace)
    return 1 if service.unanswered else 0


def bind(config: Config) -> AbstractContextManager[socket.socket]:
    """Bind the socket of the config; see :func:`bind_to`."""
    return bind_to(config.serve.host, config.serve.port)


def _settings(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws="none",
        backlog=BACKLOG,
        lifespan="on",
        # The middleware logs a line for each request.
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
