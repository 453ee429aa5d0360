"""uvicorn, with what it leaves to others: patience that ends, and an end that answers everything first."""

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
    # gunicorn's workers take this file before the app brings PyTorch.
    from pipeline.serve.service import Service

# Seconds in which a body that was refused may still come, so that its sender reads why; then the connection ends.
LINGER = 2.0
# Seconds, after the signal to end, in which clients with open connections hear of it with their next answer.
NOTICE = 0.3


class Patient(H11Protocol):
    """HTTP/1.1 whose clients have so many seconds for the head of a request, for the rest of a refused body, and for
    reading an answer."""

    _patience: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    head_seconds = 10.0
    answer_seconds = 30.0
    most = sys.maxsize

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request; close what comes on top of ``most`` connections."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._wait(self.head_seconds)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, and for no more once it is there."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._patience is None:
            self._wait(self.head_seconds)

    def on_response_complete(self) -> None:
        """Wait for the end of a body that nobody wants, if there is one, or until the last answer is read."""
        refused = self.cycle is not None and self.cycle.more_body
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait(self.answer_seconds)
        elif refused:
            self._wait(LINGER)

    def send_400_response(self, msg: str) -> None:
        """Say it, if no answer has begun, and end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        self._wait(self.answer_seconds)

    def pause_writing(self) -> None:
        """Wait for a client that does not read its answer."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        self._read()

    def _should_upgrade(self) -> bool:
        """There are no WebSockets here, and whoever asks for them does not fill the log."""
        return False

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; a client that does not read its answer loses it."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        self._stop()
        self._read()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        self._stop()
        self._patience = self.loop.call_later(seconds, self._lose)

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _lose(self) -> None:
        self._patience = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """A server that ends with its exit code, and not by the signal that it was sent.

    Args:
        config: not loaded yet; its protocol and its grace are set here.
        service: told when the end begins.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        limits = service.config.serve
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limited = {
            "head_seconds": limits.header_seconds,
            "answer_seconds": limits.timeout_seconds,
            # Once no file can be opened, asyncio logs that thousands of times a second.
            "most": sys.maxsize if files == resource.RLIM_INFINITY else max(1, files // 2),
        }
        config.http = type("Protocol", (Patient,), limited)
        config.timeout_graceful_shutdown = max(1, round(limits.grace_seconds))
        super().__init__(config)
        self._service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A first SIGTERM or SIGINT drains, a second SIGINT ends at once."""
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
        """Take no more connections, let open ones end with their next answer, wait for every answer."""
        self._service.drain()
        for server in self.servers:
            server.close()
        if self._service.admission.requests or self.server_state.connections:
            await asyncio.sleep(min(NOTICE, self._service.config.serve.grace_seconds))
        await super().shutdown(sockets)
