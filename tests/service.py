"""Service in a child process and an HTTP client, for tests and for ``tests.load``."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.forks import Child, forks

BOUNDARY = "----tests"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """Running service; ``ask`` opens a connection for each request."""

    child: Child
    port: int = field(default=0)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            return send(connection, method, path, body, headers)
        finally:
            connection.close()

    def post(self, path: str, asked: Any, **headers: str) -> Answer:
        given = {"content-type": "application/json", **headers}
        return self.ask("POST", path, json.dumps(asked).encode(), given)

    def send_files(self, path: str, parts: Sequence[tuple[str, str | None, bytes]]) -> Answer:
        return self.ask("POST", path, form(parts), {"content-type": f"multipart/form-data; boundary={BOUNDARY}"})

    def figure(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the samples with these labels."""
        text = self.ask("GET", "/metrics").body.decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        )

    def wait_ready(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.child.alive(), self.child.said()
            if not self.port:
                found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.child.said())
                self.port = int(found[1]) if found else 0
            elif self.ask("GET", "/readyz").status == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"not ready in {seconds} s: {self.child.said()}")


def send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return Answer(answer.status, found, answer.read())


def form(parts: Sequence[tuple[str, str | None, bytes]]) -> bytes:
    """Return a multipart body of parts: name, file name or None, bytes."""
    lines = []
    for name, file, data in parts:
        named = f'; filename="{file}"' if file is not None else ""
        head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'
        lines.append(head.encode() + data + b"\r\n")
    return b"".join([*lines, f"--{BOUNDARY}--\r\n".encode()])


def start(*overrides: str) -> Served:
    """Start a service on a free port, without waiting until it is ready."""
    return Served(forks().start("pipeline.serve.__main__:main", ["serve.port=0", "backend.device=cpu", *overrides]))
