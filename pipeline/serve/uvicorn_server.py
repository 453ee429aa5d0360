"""uvicorn with connection timeouts, and a shutdown that answers every accepted request.

uvicorn has options for none of these, and an ASGI middleware cannot add them: a slow head has no ASGI scope yet, and
only the transport can drop an answer that the client does not read.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    # gunicorn's workers import this module before the app imports PyTorch.
    from pipeline.serve.service import Service

# Seconds to read the rest of a refused body, so that the client receives the answer before the connection closes.
LINGER = 2.0
# Seconds after the signal in which open connections are closed with their next answer.
NOTICE = 0.3


class TimeoutProtocol(H11Protocol):
    """HTTP/1.1 with timeouts for the head of a request, the rest of a refused body, and the reading of an answer."""

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    head_seconds = 10.0
    answer_seconds = 30.0
    max_connections = sys.maxsize

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request; close connections over ``max_connections``."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._start_timer(self.head_seconds)

    def data_received(self, data: bytes) -> None:
        """Limit the time until a head is complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._start_timer(self.head_seconds)

    def on_response_complete(self) -> None:
        """Limit the time for the rest of a refused body, or for reading the last answer."""
        refused = self.cycle is not None and self.cycle.more_body
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_timer(self.answer_seconds)
        elif refused:
            self._start_timer(LINGER)

    def send_400_response(self, msg: str) -> None:
        """Send the error if no answer has started, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        self._start_timer(self.answer_seconds)

    def pause_writing(self) -> None:
        """Start the timeout of a client that does not read its answer."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timeout of a client that reads again."""
        super().resume_writing()
        self._stop_write_timer()

    def _should_upgrade(self) -> bool:
        """Ignore upgrades: there are no WebSockets, and uvicorn would log a warning for each request."""
        return False

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its client does not read the answer."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timeouts."""
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _close(self) -> None:
        self._timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """Server that ends with an exit code instead of the signal.

    Args:
        config: a config that is not loaded; its protocol and its grace period are set here.
        service: drained when the shutdown begins.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        limits = service.config.serve
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        settings = {
            "head_seconds": limits.header_seconds,
            "answer_seconds": limits.timeout_seconds,
            # Without free file descriptors, asyncio logs an error thousands of times a second.
            "max_connections": sys.maxsize if files == resource.RLIM_INFINITY else max(1, files // 2),
        }
        config.http = type("Protocol", (TimeoutProtocol,), settings)
        config.timeout_graceful_shutdown = max(1, round(limits.grace_seconds))
        super().__init__(config)
        self._service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on the first SIGTERM or SIGINT, end at once on the second SIGINT."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, close open ones with their next answer, and wait for every answer."""
        self._service.drain()
        for server in self.servers:
            server.close()
        if self._service.admission.request_count or self.server_state.connections:
            await asyncio.sleep(min(NOTICE, self._service.config.serve.grace_seconds))
        await super().shutdown(sockets)
