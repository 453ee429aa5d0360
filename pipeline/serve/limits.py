"""Limits on requests, images and bytes in progress. Used only in the thread of the event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config.schema import ServeConfig
from pipeline.serve.errors import Refused
from pipeline.serve.metrics import Metrics

# Least and most seconds of Retry-After.
SHORTEST, LONGEST = 1, 60


class Admission:
    """Counters of requests, images and bytes of bodies, with the limits of the config group ``serve``."""

    def __init__(self, limits: ServeConfig, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._clients: Counter[str] = Counter()
        self.request_count = self.image_count = self.held = 0
        # Estimated seconds until an image that arrives now is done, from the latest batch.
        self.seconds_ahead = 0.0

    @contextmanager
    def request(self, client: str) -> Iterator[None]:
        """Count a request of ``client`` while it is in progress.

        Raises:
            Refused: too many are in progress, in total (503) or of this client (429).
        """
        limit, own = self._limits.requests, self._limits.client_requests
        if own and self._clients[client] >= own:
            message = f"{own} requests of this client are in progress (serve.client_requests); wait for their answers"
            raise self._refused(429, "too_many_requests", message)
        if self.request_count >= limit:
            raise self._refused(503, "overloaded", f"{limit} requests are in progress (serve.requests); try again")
        self._clients[client] += 1
        self.request_count += 1
        self._metrics.in_flight.inc()
        try:
            yield
        finally:
            self.request_count -= 1
            self._metrics.in_flight.dec()
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    @contextmanager
    def images(self, count: int) -> Iterator[None]:
        """Count ``count`` images while they are in progress.

        Raises:
            Refused: the total would exceed the limit.
        """
        if self.image_count + count > self._limits.queue:
            message = f"{self.image_count} images are in progress, at most serve.queue={self._limits.queue}; try again"
            raise self._refused(503, "overloaded", message)
        self.image_count += count
        self._metrics.queue.inc(count)
        try:
            yield
        finally:
            self.image_count -= count
            self._metrics.queue.dec(count)

    def check_size(self, size: int) -> None:
        """Check the bytes of one body.

        Raises:
            Refused: there are too many.
        """
        limit = min(self._limits.max_body_bytes, self._limits.held_bytes)
        if size > limit:
            raise Refused(413, "too_large", f"the body is over serve.max_body_bytes={limit:,}")

    def hold(self, count: int) -> None:
        """Count ``count`` more bytes of a body in memory, until :meth:`release`.

        Raises:
            Refused: the total would exceed the limit.
        """
        if self.held + count > self._limits.held_bytes:
            message = f"the bodies in memory would exceed serve.held_bytes={self._limits.held_bytes:,}; try again"
            raise self._refused(503, "overloaded", message)
        self.held += count
        self._metrics.held.inc(count)

    def release(self, count: int) -> None:
        """Subtract bytes of a body that is no longer in memory."""
        self.held -= count
        self._metrics.held.dec(count)

    def _refused(self, status: int, name: str, message: str) -> Refused:
        return Refused(status, name, message, retry=round(min(max(SHORTEST, self.seconds_ahead), LONGEST)))
