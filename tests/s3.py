"""An S3 server of its own process on loopback, and a proxy before it that loses, delays and refuses requests."""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BUCKET = "bucket"
# The answers of the proxy itself: status, and S3's code; a fault of another name happens to the connection.
ANSWERS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "409": (409, "ConditionalRequestConflict"),
    "403": (403, "AccessDenied"),
    "412": (412, "PreconditionFailed"),
}
# What passes by itself: an answer, a connection cut before the server hears of it, or after (the reply is lost),
# or in the middle of the reply.
PASSING = ("500", "503", "cut", "lost", "half")


@contextmanager
def moto_server(log: Path) -> Iterator[str]:
    """The address of a server whose bucket is there."""
    pytest.importorskip("moto", reason="needs the extra compat")
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for(port, process, log)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"moto's server did not start:\n{log.read_text()}")


@dataclass
class Rule:
    """A fault for the next ``times`` requests of a method whose address holds ``text``; ``seconds`` is for ``slow``."""

    fault: str
    method: str = ""
    text: str = ""
    times: int = 1
    seconds: float = 2.0

    def takes(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in ("", method) and self.text in path


@dataclass
class Proxy:
    """Forwards to a server, and does to single requests what the rules or the dice say."""

    upstream: str
    url: str = ""
    rules: list[Rule] = field(default_factory=list)
    # Requests so far: method, address, and the fault that befell it or "".
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    share: float = 0.0
    _dice: random.Random = field(default_factory=random.Random)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # moto's server looks for the object and then writes it; in S3 a conditional put is one step.
    conditional: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        with self._lock:
            self.rules, self.requests, self.share = [], [], 0.0

    def inject(self, fault: str, method: str = "", text: str = "", times: int = 1, seconds: float = 2.0) -> None:
        with self._lock:
            self.rules.append(Rule(fault, method, text, times, seconds))

    def throw_dice(self, share: float, seed: int) -> None:
        """From now on let this share of all requests fail somehow."""
        with self._lock:
            self.share, self._dice = share, random.Random(seed)

    def seen(self, method: str, text: str = "") -> list[str]:
        """Return the faults of the requests of a method, in order."""
        with self._lock:
            return [fault for verb, path, fault in self.requests if verb == method and text in path]

    def judge(self, method: str, path: str, conditional: bool) -> Rule | None:
        with self._lock:
            rule = next((rule for rule in self.rules if rule.takes(method, path)), None)
            if rule is not None:
                rule.times -= 1
            elif self._dice.random() < self.share:
                rule = Rule(self._dice.choice([*PASSING, "409"] if conditional else PASSING))
            self.requests.append((method, path, rule.fault if rule else ""))
            return rule


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that was killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def proxy_to(upstream: str) -> Iterator[Proxy]:
    """A proxy that runs in threads of this process."""
    proxy = Proxy(upstream)

    class Handler(_Handler):
        owner = proxy

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        rule = self.owner.judge(self.command, self.path, "If-None-Match" in self.headers)
        fault = rule.fault if rule else ""
        if fault in ANSWERS:
            status, code = ANSWERS[fault]
            text = f"<Error><Code>{code}</Code><Message>injected {code}</Message></Error>".encode()
            self.reply(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text)
            return
        if fault == "cut":
            self.cut()
            return
        with self.owner.conditional if "If-None-Match" in self.headers else nullcontext():
            status, headers, data = self.forward(body)
        if fault == "lost":
            self.cut()
        elif fault == "half":
            self.reply(status, headers, data[: len(data) // 2])
            self.cut()
        else:
            if rule is not None:
                time.sleep(rule.seconds)
            self.reply(status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        host = self.owner.upstream.removeprefix("http://")
        with closing(http.client.HTTPConnection(host, timeout=30)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
            # moto's server names itself twice, which strict clients refuse.
            skipped = ("connection", "date", "server", "transfer-encoding")
            return response.status, [(n, v) for n, v in response.getheaders() if n.lower() not in skipped], data

    def reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            # The client did not wait.
            self.close_connection = True

    def cut(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def environment(url: str) -> dict[str, str]:
    """Return variables that point boto at a server, with fake credentials, and away from those of the user."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def pointed_at(url: str) -> Iterator[None]:
    """Let S3 be the server at ``url``, for this process and its children."""
    from s3fs import S3FileSystem

    # fsspec keeps file systems by their arguments, and the endpoint is none of them.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(url).items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        S3FileSystem.clear_instance_cache()
        yield
        S3FileSystem.clear_instance_cache()


def objects(upstream: str, prefix: str) -> dict[str, bytes]:
    """Return every object below a prefix by its name there, read from the server itself."""
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=upstream, key="test", secret="test", use_listings_cache=False)
    found = fs.find(f"{BUCKET}/{prefix}")
    return {name.removeprefix(f"{BUCKET}/{prefix}/"): fs.cat_file(name) for name in found}
