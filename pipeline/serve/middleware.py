"""ASGI middleware around every request: id, limits of size and time, log line, metrics, and errors as JSON.

A body is counted while it arrives, whatever its content-length states.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect

from pipeline.serve.errors import Refused
from pipeline.serve.limits import Admission
from pipeline.serve.openai import PREFIX, openai_error
from pipeline.serve.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Ids of clients are written to the log and into a header.
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Status in the log and the metrics of a request whose client disconnected before the answer; nginx uses it too.
DISCONNECTED = 499
KEY = "exchange"
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Exchange:
    """One request and its answer; ``resources`` is closed once the client read the answer or disconnected.

    ``held`` counts the bytes of its body and of the images that the body names.
    """

    id: str
    admission: Admission
    started: float = field(default_factory=time.perf_counter)
    held: int = 0
    received: bool = False
    answered: bool = False
    status: int = 0
    error: str = ""
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def seconds(self) -> float:
        """Seconds since the head of the request was complete."""
        return time.perf_counter() - self.started

    def hold(self, count: int) -> None:
        """Count more bytes in memory, until the exchange ends.

        Raises:
            Refused: there are too many, of this request or in total.
        """
        self.admission.check_size(self.held + count)
        self.admission.hold(count)
        self.held += count


class RequestMiddleware:
    """Middleware of the app. Each of ``routes`` has its own metrics; all other paths share ``other``."""

    def __init__(self, app: App, service: Service, routes: frozenset[str]) -> None:
        self._app, self._service, self._routes = app, service, routes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), self._service.admission)
        scope.setdefault("state", {})[KEY] = exchange
        try:
            await self._answer(exchange, scope, receive, send)
        finally:
            exchange.resources.close()
            exchange.admission.release(exchange.held)
            self._record(exchange, scope)

    async def _answer(self, exchange: Exchange, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        limits = self._service.config.serve
        deadline = asyncio.timeout(limits.timeout_seconds)

        async def counted_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not exchange.received:
                exchange.hold(len(message.get("body", b"")))
                exchange.received = not message.get("more_body", False)
            return message

        async def marked_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", exchange.id.encode())]
                if self._service.draining:
                    message["headers"].append((b"connection", b"close"))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                exchange.answered = True
                with suppress(RuntimeError):
                    # The connection limits the time for reading an answer. A refusal may follow an expired deadline.
                    deadline.reschedule(None)
                # Sending this message waits until most of the answer was sent, and is no longer in memory.
                message = {"type": "http.response.body"}
            await send(message)

        refuse = partial(self._refuse, exchange, scope, marked_send)
        try:
            async with deadline:
                self._check_length(scope)
                await self._app(scope, counted_receive, marked_send)
        except TimeoutError:
            seconds = f"in {limits.timeout_seconds:g} s (serve.timeout_seconds)"
            late = Refused(504, "timeout", f"not answered {seconds}", retry=1)
            if not exchange.received and scope["method"] == "POST":
                late = Refused(408, "slow_body", f"the body did not arrive {seconds}")
            await refuse(late)
        except Refused as refused:
            await refuse(refused)
        except ClientDisconnect:
            exchange.status, exchange.error = DISCONNECTED, "gone"
        except asyncio.CancelledError:
            # serve.grace_seconds have passed.
            if exchange.answered:
                raise
            self._service.unanswered += 1
            with suppress(Exception):
                ending = Refused(503, "ending", "the service ends; ask another instance", retry=1)
                await refuse(ending)
            raise
        except Exception as error:
            log.exception("%s %r failed", scope["method"][:20], scope["path"][:200], extra={"request": exchange.id})
            message = f"the service failed ({type(error).__name__}); its log has the details under this request"
            await refuse(Refused(500, "internal", message))

    def _check_length(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse a body whose content-length is too large before it is read."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                self._service.admission.check_size(int(value[:20]))

    async def _refuse(self, exchange: Exchange, scope: MutableMapping[str, Any], send: Send, refused: Refused) -> None:
        exchange.error, exchange.why = refused.name, refused.message
        if exchange.status:
            # Part of another answer was sent.
            return
        error = {"name": refused.name, "message": refused.message, "request": exchange.id}
        status, told = openai_error(refused) if scope["path"].startswith(PREFIX) else (refused.status, error)
        body = json.dumps({"error": told}).encode()
        headers = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _record(self, exchange: Exchange, scope: MutableMapping[str, Any]) -> None:
        seconds = exchange.seconds
        route = scope["path"] if scope["path"] in self._routes else "other"
        metrics = self._service.metrics
        metrics.requests.labels(route, exchange.status).inc()
        metrics.seconds.labels(route).observe(seconds)
        facts = {"request": exchange.id, "route": route, "status": exchange.status, "seconds": round(seconds, 6)}
        facts |= exchange.facts | ({"client": scope["client"][0]} if scope.get("client") else {})
        reason = ""
        if exchange.error:
            metrics.errors.labels(exchange.error).inc()
            facts |= {"error": exchange.error, "why": exchange.why}
            # The message may contain text of the client; escaped, it stays on one line.
            reason = f": {exchange.error} {exchange.why.encode('unicode_escape').decode()}"
        # Probes and scrapes would fill the log.
        level = logging.INFO if scope["method"] == "POST" or exchange.status >= 400 else logging.DEBUG
        values = (scope["method"][:20], route, exchange.status, 1000 * seconds, exchange.id, reason)
        log.log(level, "%s %s %d in %.1f ms [%s]%s", *values, extra=facts)


def _request_id(scope: MutableMapping[str, Any]) -> str:
    """Return the client's X-Request-ID if it is valid, else a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return secrets.token_hex(8)
