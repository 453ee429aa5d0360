"""What a request is refused with: a status, a short fixed name, and a sentence with the way out."""

from __future__ import annotations

from collections.abc import Mapping


class Refused(Exception):
    """A request that is not done; ``retry`` is the value of Retry-After in seconds, where trying again helps."""

    def __init__(
        self,
        status: int,
        name: str,
        message: str,
        *,
        retry: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.name, self.message = status, name, message
        self.headers = dict(headers or {}) | ({} if retry is None else {"retry-after": str(retry)})


class Gone(Exception):
    """The client has closed the connection; nobody waits for the answer."""


def content(name: str, message: str, request: str) -> dict[str, dict[str, str]]:
    """The body of an answer that refuses, as JSON; ``request`` is the id of the request."""
    return {"error": {"name": name, "message": message, "request": request}}
