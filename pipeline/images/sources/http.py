"""Images over http and https: bytes, or a failure with the reason.

The addresses in a manifest are untrusted, so every step has a limit: addresses (see
:mod:`pipeline.images.sources.allowlist`), redirects, bytes, time, and tries. Nothing is sent but the request: no
cookies, no passwords, no referrer.
"""

from __future__ import annotations

import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import tenacity
from urllib3 import Retry, Timeout
from urllib3.exceptions import HTTPError, InvalidHeader, LocationParseError, ReadTimeoutError
from urllib3.exceptions import SSLError as TLSError
from urllib3.exceptions import TimeoutError as RequestTimeout
from urllib3.util import Url, parse_url

from pipeline.core.records import Failure
from pipeline.images.sources.allowlist import AddressNotAllowed, NoConnection, pools, seconds_left, set_deadline
from pipeline.images.sources.outage import OutageDetector

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

SCHEMES = {"http": 80, "https": 443}
REDIRECTS = 5
# Tries of one image in all, the first one included; the seconds between them double, plus or minus a half.
TRIES, FIRST_WAIT, LONGEST_WAIT = 4, 0.25, 8.0
HEADERS = {"User-Agent": "clip-pipeline", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
_MOVED = (301, 302, 303, 307, 308)
_PASSING = (429, 502, 503, 504)
_STATUSES = {404: "not_found", 410: "not_found", 401: "permission", 403: "permission", 204: "empty", 416: "empty"}
_CHUNK = 1 << 16
# Characters that no address may hold: control characters, and one that some take for a slash.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")


class _Refused(Exception):
    """The failure of this image; no other try would help."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.failure = Failure(status, reason)


class _Passing(Exception):
    """A failure of the server or the network that may pass. ``after`` are the seconds that the server asks to wait."""

    def __init__(self, reason: str, *, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes that are wanted, from ``start`` to just before ``stop``."""

    start: int
    stop: int | None

    @property
    def headers(self) -> dict[str, str]:
        """With the header that asks for them."""
        return HEADERS if self.stop is None else {**HEADERS, "Range": f"bytes={self.start}-{self.stop - 1}"}


class Fetcher:
    """Reads images over http and https; safe to use from many threads, and keeps connections open.

    Args:
        max_bytes: of one image.
        seconds: for one image, from the first look-up to the last byte, redirects and tries included.
        schemes: the allowed ones; a redirect to another is refused, so with ``https`` alone no step is readable.
        private_hosts: hosts (``name`` or ``name:port``) that may have private or loopback addresses.
    """

    def __init__(self, *, max_bytes: int, seconds: float, schemes: tuple[str, ...], private_hosts: tuple[str, ...]):
        self._max_bytes, self._seconds, self._schemes = max_bytes, seconds, schemes
        self._private = frozenset(host.rstrip(".").lower() for host in private_hosts)
        self._pools = pools(self._private)
        self._outages = OutageDetector(self._private)

    def fetch(self, url: str, start: int = 0, stop: int | None = None) -> bytes | Failure:
        """The bytes at ``url``, or the range of them.

        Statuses of a failure: ``address_not_allowed`` (private, link-local, ...), ``scheme_not_allowed``,
        ``not_found`` (404, 410), ``permission`` (401, 403), ``empty``, ``too_many_bytes``, ``timeout``, and
        ``unreadable`` for all others. After 429, 502, 503, 504, a broken connection or an error of a busy name server
        it tries again, four times in all and within the time; ``Retry-After`` counts.

        Raises:
            StorageError: no server answers any more, not even those that did; the network is at fault.
        """
        if stop is not None and stop <= start:
            return Failure("empty", f"{url}: 0 bytes")
        if stop is not None and stop - start > self._max_bytes:
            return self._too_large(url, stop - start)
        set_deadline(time.monotonic() + self._seconds)
        tries = tenacity.Retrying(
            stop=_tried_enough,
            wait=_wait,
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            data = tries(self._follow, url, _Range(start, stop))
        except NoConnection as error:
            self._outages.failed(error)
            if error.late:
                return self._too_late(url)
            return Failure("unreadable", f"{url}: no connection: {error}")
        except (TimeoutError, RequestTimeout):
            return self._too_late(url)
        except AddressNotAllowed as error:
            reason = f"{url}: {error}; images.private_hosts lists internal servers"
            return Failure("address_not_allowed", reason)
        except _Refused as error:
            return error.failure
        except _Passing as error:
            return Failure("unreadable", f"{url}: {error}, {TRIES} times or until the time was over")
        except TLSError as error:
            return Failure("unreadable", f"{url}: no trusted connection: {error}")
        except (HTTPError, OSError, ValueError) as error:
            return Failure("unreadable", f"{url}: {error}")
        return data if isinstance(data, Failure) or data else Failure("empty", f"{url}: 0 bytes")

    def _follow(self, url: str, wanted: _Range) -> bytes | Failure:
        here = url
        for _ in range(REDIRECTS + 1):
            target = self._target(here, url)
            response = self._open(target, wanted)
            try:
                location = response.headers.get("Location") if response.status in _MOVED else None
                if location is None:
                    return self._body(response, url, wanted)
                here = urljoin(target.url, location)
            finally:
                _release(response)
        raise _Refused("unreadable", f"{url}: more than {REDIRECTS} redirects, the last one to {here}")

    def _target(self, here: str, url: str) -> Url:
        """The parsed address of one step, if it may be asked for."""
        via = f"{url}: " if here == url else f"{url}: redirected to {here!r}: "
        if _FORBIDDEN.search(here):
            raise _Refused("unreadable", f"{via}an address holds no control characters and no backslash")
        try:
            target = parse_url(here)
        except LocationParseError as error:
            raise _Refused("unreadable", f"{via}{error}") from error
        if target.scheme not in SCHEMES or target.scheme not in self._schemes:
            raise _Refused("scheme_not_allowed", f"{via}{target.scheme} is not among images.schemes")
        if target.auth is not None:
            raise _Refused("unreadable", f"{via}an address with a user name or a password is not asked for")
        if not target.host or target.port == 0:
            raise _Refused("unreadable", f"{via}no host")
        return target

    def _open(self, target: Url, wanted: _Range) -> BaseHTTPResponse:
        left = seconds_left()
        pool = self._pools.connection_from_host(target.host, target.port, target.scheme)
        try:
            response = pool.urlopen(
                "GET",
                target.request_uri,
                headers=wanted.headers,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=left, read=left),
            )
        except (TimeoutError, RequestTimeout, TLSError):
            raise
        except (HTTPError, OSError) as error:
            raise _Passing(f"the connection broke: {error}") from error
        self._outages.answered(target.host or "", target.port or SCHEMES[target.scheme or "http"])
        return response

    def _body(self, response: BaseHTTPResponse, url: str, wanted: _Range) -> bytes | Failure:
        status = response.status
        if status in _PASSING:
            raise _Passing(f"HTTP {status}", after=_retry_after(response.headers.get("Retry-After", "")))
        if status not in (200, 206):
            raise _Refused(_STATUSES.get(status, "unreadable"), f"{url}: HTTP {status}")
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            # Not unpacked: a few bytes may become gigabytes.
            raise _Refused("unreadable", f"{url}: packed with {coding}, which was not asked for")
        if wanted.stop is not None and (
            status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {wanted.start}-")
        ):
            if status == 206 or wanted.start:
                raise _Refused("unreadable", f"{url}: the server does not give ranges of bytes")
        elif status == 206 and wanted.stop is None:
            raise _Refused("unreadable", f"{url}: HTTP 206, a part that was not asked for")
        limit = self._max_bytes if wanted.stop is None else wanted.stop - wanted.start
        if wanted.stop is None and (response.length_remaining or 0) > limit:
            return self._too_large(url, int(response.length_remaining or 0))
        return self._read(response, url, wanted, limit)

    def _read(self, response: BaseHTTPResponse, url: str, wanted: _Range, limit: int) -> bytes | Failure:
        data = bytearray()
        try:
            while chunk := response.read(min(_CHUNK, limit + 1 - len(data))):
                data += chunk
                if len(data) > limit:
                    return self._too_large(url, len(data)) if wanted.stop is None else bytes(data[:limit])
        except ReadTimeoutError:
            raise
        except (HTTPError, OSError) as error:
            seconds_left()
            raise _Passing(f"the connection broke after {len(data):,} bytes: {error}") from error
        return bytes(data)

    def _too_late(self, url: str) -> Failure:
        return Failure("timeout", f"{url}: not there within loader.read_seconds={self._seconds:g}")

    def _too_large(self, url: str, size: int) -> Failure:
        return Failure("too_many_bytes", f"{url}: {size:,} bytes or more, over images.max_bytes={self._max_bytes:,}")


def _release(response: BaseHTTPResponse) -> None:
    """Give the connection back; a short rest of the body is read, so that it can be used again."""
    rest = response.length_remaining
    with suppress(HTTPError, OSError):
        if rest is not None and rest < _CHUNK:
            response.read(_CHUNK)
            response.release_conn()
    response.close()


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, _Passing) or (isinstance(error, NoConnection) and error.passing and not error.late)


def _tried_enough(state: tenacity.RetryCallState) -> bool:
    """True after the last try, or if the deadline would come before the next one."""
    if state.attempt_number >= TRIES:
        return True
    try:
        return state.upcoming_sleep >= seconds_left()
    except TimeoutError:
        return True


def _wait(state: tenacity.RetryCallState) -> float:
    error: Any = state.outcome.exception() if state.outcome is not None else None
    doubled: float = FIRST_WAIT * 2 ** (state.attempt_number - 1) * random.uniform(0.5, 1.5)
    asked: float = getattr(error, "after", 0.0)
    return max(min(asked, LONGEST_WAIT), doubled)


def _retry_after(text: str) -> float:
    """Seconds of a ``Retry-After`` header (RFC 9110, 10.2.3), a number or a date; 0 if it is neither."""
    try:
        return Retry().parse_retry_after(text)
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0
