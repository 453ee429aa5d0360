"""ASGI middleware: the token of an address, the Host header, and the headers that keep a page to itself."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

TOKEN = "token"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# No script, style or picture of another origin, nothing inline, no frame around the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """Answer only requests with the token, in the address once and then in a cookie, and for an allowed host.

    A page of another site that a name server leads to this address (DNS rebinding) sends a Host header of its own.

    Args:
        app: the app behind it.
        hosts: names and addresses that the Host header may have, without a port.
        port: of the server.
        token: the secret.
        names: further names, which the Host header has with or without the port, as that of a proxy does.
    """

    def __init__(self, app: App, *, hosts: tuple[str, ...], port: int, token: str, names: tuple[str, ...] = ()) -> None:
        self._app, self._token = app, token
        bare = (*names, *(hosts if port == 80 else ()))
        self._hosts = {each.lower() for each in (*bare, *(f"{host}:{port}" for host in (*hosts, *names)))}
        # Browsers send cookies to every port of a host.
        self._cookie = f"clip-pipeline-{port}"

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in given)]
            await send(message)

        answer = self._refusal(scope)
        await (answer or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: MutableMapping[str, Any]) -> Response | None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        # Of two headers a proxy may read the first, and this server the last.
        if len(hosts := headers.get("host", [])) != 1 or hosts[0].lower() not in self._hosts:
            return PlainTextResponse("this name of the server is not allowed; --host sets it\n", 421)
        if scope["method"] not in ("GET", "HEAD"):
            origins = headers.get("origin", [])
            if len(origins) != 1 or origins[0].lower().partition("://")[2] not in self._hosts:
                return PlainTextResponse("a request from another page\n", 403)
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(pairs).get(TOKEN, "")
        if given and self._fits(given):
            rest = urlencode([(name, value) for name, value in pairs if name != TOKEN])
            # Two slashes would lead to another host.
            moved = RedirectResponse(f"/{scope['path'].lstrip('/')}{'?' if rest else ''}{rest}", 303)
            # Not strict: a browser that follows a link of another site, as in a message, brings no strict cookie to the
            # redirect. No request that has only the cookie changes anything.
            moved.set_cookie(self._cookie, self._token, httponly=True, samesite="lax", path="/")
            return moved
        # Python's own parser reads nothing where another program on this host has set a cookie that it does not like.
        if not self._fits(cookie_parser("; ".join(headers.get("cookie", []))).get(self._cookie, "")):
            return PlainTextResponse(
                "this page needs its token: open the address that the command printed, with ?token=...\n", 403
            )
        return None

    def _fits(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())
