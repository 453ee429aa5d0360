"""Prometheus metrics of the service."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

PREFIX = "clip_service"
# Stages of a request in order; ``wait`` is the time in the queue for a batch.
STAGES = ("read", "fetch", "decode", "wait", "encode", "label", "text")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Set where several processes share a port, as with gunicorn: each scrape then has the sums of all processes.
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """Counters, histograms and gauges of one app, in a separate registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(f"{PREFIX}_requests", "Answers, by route and status code", ["route", "code"],
                                registry=registry)  # fmt: skip
        self.seconds = Histogram(f"{PREFIX}_request_seconds", "From the head of a request to its answer", ["route"],
                                 buckets=SECONDS, registry=registry)  # fmt: skip
        self.stages = Histogram(f"{PREFIX}_stage_seconds", "Time in each stage: of a request (read, decode, text), of "
                                "an image (fetch, wait) or of a batch (encode, label)", ["stage"], buckets=SECONDS,
                                registry=registry)  # fmt: skip
        self.batch = Histogram(f"{PREFIX}_batch_images", "Images of a batch", buckets=BATCH_SIZES,
                               registry=registry)  # fmt: skip
        self.images = Counter(f"{PREFIX}_images", "Images, by status", ["status"], registry=registry)
        self.texts = Counter(f"{PREFIX}_text_features", "Texts and label sets, by the source of their features",
                             ["source"], registry=registry)  # fmt: skip
        self.errors = Counter(f"{PREFIX}_errors", "Requests that were refused or failed, by error", ["error"],
                              registry=registry)  # fmt: skip
        self.queue = self._gauge("queue_images", "Images in progress: waiting, decoding or in a batch")
        self.waiting = self._gauge("waiting_images", "Decoded images that wait for a batch")
        self.in_flight = self._gauge("requests_in_flight", "Requests that are not answered yet")
        self.held = self._gauge("held_bytes", "Bytes of request bodies in memory")
        self.ready = self._gauge("ready", "Processes that are ready: warm, parity passed, not draining")
        for stage in STAGES:
            self.stages.labels(stage)

    def stage(self, name: str, seconds: float) -> None:
        """Record the seconds of one stage; safe from any thread."""
        self.stages.labels(name).observe(seconds)

    def _gauge(self, name: str, help: str) -> Gauge:
        # The sum over live processes.
        return Gauge(f"{PREFIX}_{name}", help, registry=self._registry, multiprocess_mode="livesum")

    def page(self) -> bytes:
        """Return all metrics in the exposition format."""
        registry = self._registry
        if MULTIPROCESS in os.environ:
            from prometheus_client.multiprocess import MultiProcessCollector

            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
