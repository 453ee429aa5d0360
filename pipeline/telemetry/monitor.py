"""Report a run to monitors while it works and when it ends. A failure of a monitor never changes the run."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as LateError
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config.ranges import AUTO
from pipeline.config.schema import Config
from pipeline.core.concurrency import aside
from pipeline.core.errors import ConfigError, OutputBusy, Problem, exit_code_of
from pipeline.core.run_report import RunReport
from pipeline.telemetry import prometheus, tracing
from pipeline.telemetry.logs import log_to_terminal
from pipeline.telemetry.run_metrics import PREFIX, SUCCESS, RunState

# Seconds between two writes of the file, and the timeout of a Pushgateway.
REFRESH_SECONDS = 15.0
PUSH_SECONDS = 5.0
log = logging.getLogger(__name__)


class Monitor:
    """The textfile and the Pushgateway of a run, as far as the config has them."""

    def __init__(self, config: Config, run: str, *, began: float) -> None:
        self._job, self._url = config.metrics.job, config.metrics.pushgateway
        self._path = None if config.metrics.textfile is None else Path(os.path.expanduser(config.metrics.textfile))
        part = config.cluster.part
        # Parts that claim their shards have no numbers.
        self._group = {} if part is None else {"part": socket.gethostname() if part == AUTO else part}
        self.labels = {"job": self._job, "model": config.model.name, "backend": config.backend.name, **self._group}
        self.run, self._state = run, RunState(run=run, began=began)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False
        if self._path is not None:
            own = {"job": self._job, **self._group}
            self._state.succeeded = prometheus.read_value(self._path, f"{PREFIX}_{SUCCESS}", own)

    def looping(self, progress: Callable[[], Mapping[str, float]], *, resumed: int) -> None:
        """Begin to rewrite the file at intervals; the loop of the run starts now."""
        self._state.progress, self._state.resumed = progress, resumed
        if self._path is not None:
            self._thread = threading.Thread(target=self._refresh, name="metrics", daemon=True)
            self._thread.start()

    def finished(self, report: RunReport, *, dataset_bytes: int) -> None:
        """Add the report of the run; the exit code is not known yet."""
        self._state.report, self._state.dataset_bytes = report, dataset_bytes

    def refused(self) -> None:
        """Leave the metrics to the other run that holds the output."""
        self._path, self._url = None, None

    def ended(self, code: int) -> None:
        """Write and push the final metrics with the exit code."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(PUSH_SECONDS)
        self._state.exit_code = code
        if code == 0:
            self._state.succeeded = time.time()
        self._write()
        self._push()

    def _refresh(self) -> None:
        self._write()
        while not self._ended.wait(REFRESH_SECONDS):
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            prometheus.write_file(self._path, prometheus.to_registry(PREFIX, self.labels, self._state.metrics()))
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                reason = getattr(error, "strerror", None) or error
                log.warning("metrics.textfile=%s cannot be written: %s", self._path, reason)

    def _push(self) -> None:
        if self._url is None:
            return
        registry = prometheus.to_registry(PREFIX, self.labels, self._state.metrics())
        push = partial(prometheus.push, self._url, self._job, registry, group=self._group, seconds=PUSH_SECONDS)
        try:
            # The timeout of a connection is for a single wait: a slow answer in many pieces would take longer.
            aside(push, name="push").result(2 * PUSH_SECONDS)
        except (OSError, ValueError, LateError) as error:
            reason = str(error) or f"no answer in {2 * PUSH_SECONDS:g} s"
            log.warning("metrics.pushgateway: %s did not receive the metrics: %s", urlsplit(self._url).netloc, reason)


@contextmanager
def monitored(config: Config, run: str, *, began: float) -> Iterator[Monitor]:
    """Report the run in the body. A run that is refused because another holds the output reports nothing.

    Raises:
        ConfigError: a package that the config needs is not installed; nothing was started.
    """
    _check(config)
    monitor = Monitor(config, run, began=began)
    # The log of the output is closed when the run has ended.
    terminal = partial(log_to_terminal, config.log, run)
    code = 0
    with tracing.exported(run, monitor.labels, logged=terminal) if config.metrics.opentelemetry else nullcontext():
        try:
            yield monitor
        except BaseException as error:
            code = exit_code_of(error)
            if isinstance(error, OutputBusy):
                monitor.refused()
            raise
        finally:
            with terminal():
                monitor.ended(code)


def _check(config: Config) -> None:
    wanted = config.metrics
    hints = [
        ("metrics.textfile", wanted.textfile, prometheus.missing),
        ("metrics.pushgateway", wanted.pushgateway, prometheus.missing),
        ("metrics.opentelemetry", wanted.opentelemetry or None, tracing.missing),
    ]
    problems = [Problem(key, value, hint) for key, value, find in hints if value is not None and (hint := find())]
    if problems:
        raise ConfigError(problems)
