"""The page over datasets, served in this process as the command serves it."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from pipeline.browse.app import Page
from pipeline.browse.collection import Collection
from pipeline.browse.guard import LOOPBACK, Guard
from pipeline.serve.bind import bind_to


@dataclass
class Site:
    """A running page; ``cookie`` is that of a browser that opened the address with the token."""

    port: int
    token: str
    cookie: str = ""

    def ask(self, path: str, *, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Host": f"127.0.0.1:{self.port}", "Cookie": self.cookie}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body or None, given)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.headers, data

    def page(self, path: str, status: int = 200) -> str:
        """A page once its work is done; at most a minute."""
        for _ in range(100):
            code, headers, data = self.ask(path)
            text = data.decode()
            if 'class="waiting"' not in text:
                break
        assert code == status, text[-700:]
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        return text


@contextmanager
def sites() -> Iterator[Callable[..., Site]]:
    """A function that serves datasets until the context ends."""
    with ExitStack() as opened:

        def serve(*urls: Path | str, memory: int = 1 << 26) -> Site:
            listening = opened.enter_context(bind_to("127.0.0.1", 0))
            page = Page(Collection([str(url) for url in urls], memory))
            opened.callback(page.close)
            port = listening.getsockname()[1]
            guard: Any = Guard(page.app(), hosts=LOOPBACK, port=port, token="secret")
            server = uvicorn.Server(uvicorn.Config(guard, lifespan="off", log_config=None, ws="none"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            opened.callback(thread.join, 10)
            opened.callback(setattr, server, "should_exit", True)
            thread.start()
            made = Site(port, "secret")
            made.cookie = made.ask("/?token=secret")[1]["set-cookie"].split(";")[0]
            return made

        yield serve
