"""Around every request: its id, the limits on its body and its time, one line of the log, the figures, and errors as
JSON. Pure ASGI, so that a body is counted while it comes, whatever its head says."""

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
from typing import Any

from pipeline.serve.errors import Gone, Refused, content
from pipeline.serve.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Ids that come from outside go into the log and back into a header.
SANE = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# What the log and the metrics call a client that went away before its answer; nginx does too.
GONE = 499
KEY = "exchange"
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Exchange:
    """One request and its answer; ``under_way`` is closed once the answer is read, or the connection."""

    id: str
    began: float = field(default_factory=time.perf_counter)
    held: int = 0
    whole: bool = False
    answered: bool = False
    status: int = 0
    error: str = ""
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    under_way: ExitStack = field(default_factory=ExitStack)

    @property
    def seconds(self) -> float:
        """Since the head of the request was there."""
        return time.perf_counter() - self.began


class Envelope:
    """Wraps the app. ``routes`` are the paths that have figures of their own; all others share ``other``."""

    def __init__(self, app: App, service: Service, routes: frozenset[str]) -> None:
        self._app, self._service, self._routes = app, service, routes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_id(scope))
        scope.setdefault("state", {})[KEY] = exchange
        try:
            await self._answer(exchange, scope, receive, send)
        finally:
            exchange.under_way.close()
            self._service.admission.release(exchange.held)
            self._note(exchange, scope)

    async def _answer(self, exchange: Exchange, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        limits = self._service.config.serve
        patience = asyncio.timeout(limits.timeout_seconds)

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not exchange.whole:
                self._take(exchange, len(message.get("body", b"")))
                exchange.whole = not message.get("more_body", False)
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", exchange.id.encode())]
                if self._service.draining:
                    message["headers"].append((b"connection", b"close"))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                exchange.answered = True
                with suppress(RuntimeError):
                    # How long a client may read is for its connection to say. A refusal may come after the time-out.
                    patience.reschedule(None)
                # This one waits until most of the answer is out, and so are its bytes no longer in memory.
                message = {"type": "http.response.body"}
            await send(message)

        try:
            async with patience:
                self._check_length(scope)
                await self._app(scope, received, sent)
        except TimeoutError:
            seconds = f"in {limits.timeout_seconds:g} s (serve.timeout_seconds)"
            late = Refused(504, "timeout", f"not answered {seconds}", retry=1)
            if not exchange.whole and scope["method"] == "POST":
                late = Refused(408, "slow_body", f"the body did not come {seconds}")
            await self._refuse(exchange, late, sent)
        except Refused as refused:
            await self._refuse(exchange, refused, sent)
        except Gone:
            exchange.status, exchange.error = GONE, "gone"
        except asyncio.CancelledError:
            # The grace has ended.
            if exchange.answered:
                raise
            self._service.unanswered += 1
            with suppress(Exception):
                await self._refuse(exchange, Refused(503, "ending", "the service ends; ask another", retry=1), sent)
            raise
        except Exception as error:
            log.exception("%s %r failed", scope["method"][:20], scope["path"][:200], extra={"request": exchange.id})
            message = f"the service failed ({type(error).__name__}); its log says more under this request"
            await self._refuse(exchange, Refused(500, "internal", message), sent)

    def _check_length(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse by its own word what is too large, before it is read."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                self._check_size(int(value[:20]))

    def _check_size(self, size: int) -> None:
        limits = self._service.config.serve
        limit = min(limits.max_body_bytes, limits.held_bytes)
        if size > limit:
            raise Refused(413, "too_large", f"the body is over serve.max_body_bytes={limit:,}")

    def _take(self, exchange: Exchange, count: int) -> None:
        self._check_size(exchange.held + count)
        self._service.admission.hold(count)
        exchange.held += count

    async def _refuse(self, exchange: Exchange, refused: Refused, send: Send) -> None:
        exchange.error, exchange.why = refused.name, refused.message
        if exchange.status:
            # Half of another answer is out.
            return
        body = json.dumps(content(refused.name, refused.message, exchange.id)).encode()
        headers = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _note(self, exchange: Exchange, scope: MutableMapping[str, Any]) -> None:
        seconds = exchange.seconds
        route = scope["path"] if scope["path"] in self._routes else "other"
        metrics = self._service.metrics
        metrics.requests.labels(route, exchange.status).inc()
        metrics.seconds.labels(route).observe(seconds)
        if exchange.error:
            metrics.errors.labels(exchange.error).inc()
        facts = {"request": exchange.id, "route": route, "status": exchange.status, "seconds": round(seconds, 6)}
        facts |= exchange.facts | ({"client": scope["client"][0]} if scope.get("client") else {})
        if exchange.error:
            facts |= {"error": exchange.error, "why": exchange.why}
        # What a client wrote may be told in it, and stays on its line.
        why = exchange.why.encode("unicode_escape").decode()
        # Probes and scrapes would fill the log.
        level = logging.INFO if scope["method"] == "POST" or exchange.status >= 400 else logging.DEBUG
        log.log(
            level,
            "%s %s %d in %.1f ms [%s]%s",
            scope["method"][:20],
            route,
            exchange.status,
            1000 * seconds,
            exchange.id,
            f": {exchange.error} {why}" if exchange.error else "",
            extra=facts,
        )


def _id(scope: MutableMapping[str, Any]) -> str:
    """The client's id for its request, if it is a sane one, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE.fullmatch(value):
            return str(value.decode())
    return secrets.token_hex(8)
