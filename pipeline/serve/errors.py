"""Errors that are answered with a status, a fixed short name, and a message."""

from __future__ import annotations

from collections.abc import Mapping

# A message has at most so many characters, whatever names a client sent.
MESSAGE = 500


class Refused(Exception):
    """Request that is refused.

    ``retry`` is the value of Retry-After in seconds, where another attempt can help; ``param`` the field at fault.
    """

    def __init__(
        self,
        status: int,
        name: str,
        message: str,
        *,
        retry: int | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.name, self.message, self.param = status, name, message, param
        self.headers = dict(headers or {}) | ({} if retry is None else {"retry-after": str(retry)})


def invalid(message: str, *, name: str = "invalid", param: str | None = None) -> Refused:
    """Return the error for a body that is not valid."""
    return Refused(422, name, message if len(message) <= MESSAGE else f"{message[:MESSAGE]}...", param=param)
