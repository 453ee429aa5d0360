"""Events from a worker to the driver: batches, reports, log lines."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any

from pipeline.core.log_format import fields_of

# Batches are reported together, at most once in so many seconds.
INTERVAL = 0.5


class EventSender:
    """Sends messages under a topic, from any thread; they arrive in order, and before the end of the task."""

    def __init__(self, worker: Any, topic: str) -> None:
        self._worker, self._topic = worker, topic
        self._images, self._sent = 0, 0.0
        # The process that a log line comes from.
        self.origin = {"worker": str(worker.name), "worker_host": socket.gethostname(), "worker_process": os.getpid()}

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self._worker.log_event(self._topic, message)

    def count(self, images: int) -> None:
        """Count the images of a batch; sent soon."""
        self._images += images
        if time.monotonic() - self._sent > INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Send the images that were counted."""
        images, self._images, self._sent = self._images, 0, time.monotonic()
        if images:
            self.send({"images": images})


class Forward(logging.Handler):
    """Send log lines of ``level`` or above to the driver, with the name of the worker."""

    def __init__(self, events: EventSender, name: str, level: int) -> None:
        super().__init__(level)
        self._events, self._from = events, name

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        fields = {**fields_of(record), **self._events.origin}
        known = {"log": record.getMessage(), "logger": record.name, "level": record.levelno}
        self._events.send({**known, "from": self._from, "fields": fields})
