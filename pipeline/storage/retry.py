"""Retries of single requests to an object store: bounded in number and time, and only after transient errors.

A request is retried after a timeout, a broken connection, a server error (5xx), a conflict of two writers (409) or a
request to slow down. A missing permission, file or bucket, a failed precondition (412) and a bad request are not
transient: a retry would fail in the same way.
"""

from __future__ import annotations

import errno
import http.client
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_after_delay
from tenacity.wait import wait_random_exponential

from pipeline.core.errors import StorageError, short

# If one request of five fails, eight tries in a row fail once in 400,000 times.
TRIES = 8
# Seconds after which no new try begins; the waits alone add up to half a minute at most.
SECONDS = 300.0
# The wait before try n is drawn from [0, min(LONGEST_WAIT, FIRST_WAIT * 2**n)] seconds, so that workers spread out.
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0
# Timeouts of a connection, in seconds.
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0

# NoSuchUpload: a multipart upload that was completed and whose reply was lost, or that the store removed.
_CODES = frozenset({
    "BandwidthLimitExceeded", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "NoSuchUpload",
    "OperationAborted", "RequestLimitExceeded", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "XAmzContentSHA256Mismatch",
})  # fmt: skip
_STATUSES = frozenset({408, 409, 429, 500, 502, 503, 504})
_NUMBERS = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EPIPE, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EAGAIN),
})  # fmt: skip
_T = TypeVar("_T")
log = logging.getLogger(__name__)


def retried(place: str, work: Callable[[], _T]) -> _T:
    """Return the result of ``work``, which is retried after transient errors.

    Raises:
        Exception: the last transient error, or the first other one.
    """

    def log_retry(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        seconds = state.next_action.sleep if state.next_action else 0.0
        log.info("%s: %s; try %d of %d in %.1f s", place, _short(error), state.attempt_number + 1, TRIES, seconds)

    attempts = Retrying(
        stop=stop_after_attempt(TRIES) | stop_after_delay(SECONDS),
        wait=wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
        retry=retry_if_exception(is_transient),
        before_sleep=log_retry,
        reraise=True,
    )
    return attempts(work)


def is_transient(error: BaseException) -> bool:
    """True if the same request may succeed a moment later."""
    if isinstance(error, StorageError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    response = response_of(error)
    if response is not None:
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return response.get("Error", {}).get("Code") in _CODES or status in _STATUSES
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    if isinstance(error, ConnectionError | TimeoutError | http.client.IncompleteRead):
        return True
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return True
    return isinstance(error, tuple(_connection_errors()))


def response_of(error: BaseException) -> dict[str, Any] | None:
    """The store's response behind an error of boto or s3fs, or None if there was none."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response
    return None


def exists_already(error: BaseException) -> bool:
    """True if a store refused to create a name because the name exists."""
    # Not every store names the condition in its 412; s3fs then raises a general error.
    response = response_of(error) or {}
    return isinstance(error, FileExistsError) or response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412


def _connection_errors() -> Iterator[type[BaseException]]:
    """The connection errors of the loaded drivers that are no OSErrors."""
    for module, names in (
        ("botocore.exceptions", ("HTTPClientError", "ConnectionError", "IncompleteReadError")),
        ("botocore.parsers", ("ResponseParserError",)),
        ("aiohttp", ("ClientConnectionError", "ClientPayloadError", "ServerTimeoutError")),
        ("urllib3.exceptions", ("IncompleteRead", "ProtocolError", "TimeoutError")),
    ):
        if module in sys.modules:
            yield from (getattr(sys.modules[module], name) for name in names)


def _short(error: BaseException | None) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return short(text, 160)
