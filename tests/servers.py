"""Servers on loopback that count what they are asked, and name servers that say what a test wants."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

Page = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Pages by path, and one for every other path.

    ``requests`` are the paths and bodies in order, ``asked`` counts them by path, ``connections`` the sockets.
    """

    daemon_threads = True
    # A test that ends early leaves a page in the middle of its work.
    block_on_close = False

    def __init__(self, pages: dict[str, Page], other: Page) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages, self.other, self.connections = pages, other, 0
        self.asked, self.requests = Counter[str](), list[tuple[str, bytes]]()
        self.headers: list[dict[str, str]] = []

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.place}"

    def get_request(self) -> tuple[socket.socket, Any]:
        found = super().get_request()
        self.connections += 1
        return found

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients that hang up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.reply(b"")

    def do_POST(self) -> None:
        self.reply(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, body: bytes) -> None:
        self.server.asked[self.path] += 1
        self.server.requests.append((self.path, body))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.server.pages.get(self.path, self.server.other)(self)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serve(pages: dict[str, Page], *, other: Page | None = None, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server in a thread."""
    server = Server(pages, other or answer(404, b"nothing here"))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(status: int, body: bytes = b"", **headers: str) -> Page:
    """A page that is whole; underscores in names of headers are dashes."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return page


def moved(to: str, status: int = 302) -> Page:
    """A redirect."""
    return answer(status, b"over there", Location=to)


def in_turn(*pages: Page) -> Page:
    """The first page to the first request, and so on; the last one stays."""
    left = list(pages)

    def page(handler: BaseHTTPRequestHandler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return page


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends without an answer."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def drip(head: bytes, drop: bytes, *, every: float = 0.05, seconds: float = 10.0) -> Page:
    """``head`` at once, then ``drop`` again and again."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(head)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            handler.wfile.write(drop)
            handler.wfile.flush()
            time.sleep(every)

    return page


def endless(handler: BaseHTTPRequestHandler) -> None:
    """A chunked body without an end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")


def resolve(patch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> list[str]:
    """Let ``names`` resolve to each of their answers in turn, the last one for good; returns what is asked."""
    asked: list[str] = []
    left = {name: [list(one) for one in answers] for name, answers in names.items()}
    real = socket.getaddrinfo

    def found(host: Any, port: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(host)
        name = host.rstrip(".")
        if name not in left:
            return real(host, port, *arguments, **named)
        given = left[name].pop(0) if len(left[name]) > 1 else left[name][0]
        if not given:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in given]
        return [(f, socket.SOCK_STREAM, 6, "", (one, port)) for f, one in zip(families, given, strict=True)]

    patch.setattr(socket, "getaddrinfo", found)
    return asked


@contextmanager
def connections_to(patch: pytest.MonkeyPatch, answered: tuple[str, int]) -> Iterator[list[str]]:
    """Record the addresses that a socket is told to connect to; all end at the server ``answered`` instead."""
    told: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        told.append(address[0])
        real(self, answered)

    with patch.context() as inner:
        inner.setattr("pipeline.images.sources.allowlist._Timed.connect", connect, raising=False)
        yield told


def self_signed(path: Path, name: str) -> Path:
    """A new key and a certificate of it for a host, which vouches for itself."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, nobody, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(nobody, nobody, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, *plain))
    return path
