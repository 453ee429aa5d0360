"""How much is under way, and who is told to come back later. Used in the thread of the event loop alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config.schema import ServeConfig
from pipeline.serve.errors import Refused
from pipeline.serve.metrics import Metrics

# Seconds after which a client that was refused may try again, at least and at most.
SOON, LATE = 1, 60


class Admission:
    """Counts requests, pictures and bytes of bodies against the limits of the group ``serve``."""

    def __init__(self, limits: ServeConfig, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._clients: Counter[str] = Counter()
        self.requests = self.images = self.held = 0
        # Seconds until a picture that comes now would be done, as the last batches tell.
        self.seconds_ahead = 0.0

    @contextmanager
    def request(self, client: str) -> Iterator[None]:
        """Around a request of ``client``.

        Raises:
            Refused: too many are under way, of all (503) or of this client (429).
        """
        limit, own = self._limits.requests, self._limits.client_requests
        if own and self._clients[client] >= own:
            message = f"{own} requests of this client are under way (serve.client_requests); wait for their answers"
            raise self._later(429, "too_many_requests", message)
        if self.requests >= limit:
            raise self._later(503, "overloaded", f"{limit} requests are under way (serve.requests); try again")
        self._clients[client] += 1
        self.requests += 1
        self._metrics.in_flight.inc()
        try:
            yield
        finally:
            self.requests -= 1
            self._metrics.in_flight.dec()
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    @contextmanager
    def pictures(self, count: int) -> Iterator[None]:
        """Around the work on so many pictures.

        Raises:
            Refused: with them, too many would be under way.
        """
        if self.images + count > self._limits.queue:
            message = f"{self.images} images are under way, of serve.queue={self._limits.queue} at most; try again"
            raise self._later(503, "overloaded", message)
        self.images += count
        self._metrics.queue.inc(count)
        try:
            yield
        finally:
            self.images -= count
            self._metrics.queue.dec(count)

    def hold(self, count: int) -> None:
        """Take so many more bytes of a body; give them back with :meth:`release`.

        Raises:
            Refused: with them, too many would be held.
        """
        if self.held + count > self._limits.held_bytes:
            message = f"bodies of {self._limits.held_bytes:,} bytes are in memory (serve.held_bytes); try again"
            raise self._later(503, "overloaded", message)
        self.held += count
        self._metrics.held.inc(count)

    def release(self, count: int) -> None:
        """Give bytes of a body back."""
        self.held -= count
        self._metrics.held.dec(count)

    def _later(self, status: int, name: str, message: str) -> Refused:
        return Refused(status, name, message, retry=round(min(max(SOON, self.seconds_ahead), LATE)))
