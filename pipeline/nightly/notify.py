"""Notifications of a run: a GET for a health check, and metrics for Prometheus' textfile collector."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.nightly.records import Night
from pipeline.telemetry import prometheus
from pipeline.telemetry.prometheus import by, one

# Timeout in seconds: a ping must not delay the night.
PING_SECONDS = 10.0
_NAME = "clip_pipeline_nightly"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run over a ``store``: its exit code and wall time.

    ``night`` is the newest that it published or found. ``succeeded`` is the time at which the newest night with exit
    code 0 was finished, in seconds since the epoch.
    """

    store: str
    exit_code: int
    seconds: float
    night: Night | None
    succeeded: float | None


def ping(url: str | None, what: str) -> bool:
    """GET ``url``/``what``, where ``what`` is ``start`` or an exit code; True if the answer was a success.

    Nothing is raised. A failure is logged with the host only, as the rest of the address is a secret.
    """
    if url is None:
        return False
    import urllib3

    host = "?"
    try:
        host = urlsplit(url).hostname or host
        # urllib3 would log retries with the whole address.
        with urllib3.PoolManager(timeout=urllib3.Timeout(total=PING_SECONDS), retries=False) as pool:
            status = pool.request("GET", f"{url.rstrip('/')}/{what}").status
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        log.warning("--ping %s: %s was not delivered: %s", host, what, type(error).__name__)
        return False
    # A redirect is not followed, so it is a failure too.
    if status >= 300:
        log.warning("--ping %s: %s was answered with %d", host, what, status)
    return status < 300


def write_textfile(path: Path, outcome: Outcome) -> None:
    """Write a ``.prom`` file, labelled by store; see :func:`pipeline.telemetry.prometheus.write_file`.

    Raises:
        OSError: it cannot be written, or prometheus_client is not installed.
    """
    hint = prometheus.missing()
    if hint is not None:
        raise OSError(hint)
    night = outcome.night
    metrics = [
        one("last_run_timestamp_seconds", "When the nightly job ended last.", round(time.time(), 3)),
        one("exit_code", "Exit code of the last run.", outcome.exit_code),
        one("seconds", "Wall time of the last run.", round(outcome.seconds, 3)),
    ]
    if outcome.succeeded is not None:
        text = "When the newest night with exit code 0 was finished."
        metrics.append(one("last_success_timestamp_seconds", text, outcome.succeeded))
    if night is not None:
        metrics += [
            by("status", "rows", "Rows of the newest night by status.", night.counts),
            by("kind", "changes", "Rows of the newest night by kind of change.", night.kinds),
            one("embedded_images", "Images that the newest night embedded.", night.images),
            one("images_per_second", "Throughput of the newest night's embedding.", night.images_per_second),
        ]
    prometheus.write_file(path, prometheus.to_registry(_NAME, {"store": outcome.store}, metrics))
