"""Whom a night is told to: a health check that waits for it, and Prometheus."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.nightly.records import Night
from pipeline.telemetry import prometheus
from pipeline.telemetry.prometheus import by, one

# Seconds that a ping waits, as it must never hold up the night.
PING_SECONDS = 10.0
_NAME = "clip_pipeline_nightly"
log = logging.getLogger(__name__)


def ping(url: str | None, what: str) -> bool:
    """GET ``url``/``what``, as healthchecks.io and its like take it: ``start``, or an exit code; True if it was heard.

    Nothing is raised: a check that cannot be reached is logged, by its host alone, as the rest is a secret.
    """
    if url is None:
        return False
    import urllib3

    host = "?"
    try:
        host = urlsplit(url).hostname or host
        # Without retries, which urllib3 would log with the whole address.
        with urllib3.PoolManager(timeout=urllib3.Timeout(total=PING_SECONDS), retries=False) as pool:
            status = pool.request("GET", f"{url.rstrip('/')}/{what}").status
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        log.warning("--ping %s: %s was not told: %s", host, what, type(error).__name__)
        return False
    # One that is sent elsewhere has not arrived.
    if status >= 300:
        log.warning("--ping %s: %s was answered with %d", host, what, status)
    return status < 300


def write_textfile(
    path: Path, *, store: str, exit_code: int, seconds: float, night: Night | None, succeeded: float | None
) -> None:
    """What node_exporter's textfile collector reads; see :func:`pipeline.telemetry.prometheus.write_file`.

    Args:
        path: of the file, which ends in ``.prom``.
        store: the store, as a label, so that the files of several stores stand beside each other.
        exit_code: of this run.
        seconds: that this run took.
        night: the newest that this run published or found, if any.
        succeeded: when the newest night with exit code 0 was finished, in seconds since the epoch.

    Raises:
        OSError: it cannot be written, or prometheus_client is not installed.
    """
    hint = prometheus.missing()
    if hint is not None:
        raise OSError(hint)
    metrics = [one("last_run_timestamp_seconds", "When the nightly job ended last.", round(time.time(), 3))]
    if succeeded is not None:
        told = "When the newest night with exit code 0 was finished."
        metrics.append(one("last_success_timestamp_seconds", told, succeeded))
    metrics.append(one("exit_code", "Exit code of the last run.", exit_code))
    metrics.append(one("seconds", "Wall time of the last run.", round(seconds, 3)))
    if night is not None:
        metrics += [
            by("status", "rows", "Rows of the newest night by status.", night.counts),
            by("kind", "changes", "Rows of the newest night by what became of them.", night.kinds),
            one("embedded_images", "Images that the newest night embedded.", night.images),
            one("images_per_second", "Throughput of the newest night's embedding.", night.images_per_second),
        ]
    prometheus.write_file(path, prometheus.to_registry(_NAME, {"store": store}, metrics))
