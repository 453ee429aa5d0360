"""Tells monitors of a run while it works and when it ends, however it ends; what they answer never changes the run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as LateError
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config.schema import Config
from pipeline.core.concurrency import aside
from pipeline.core.errors import ConfigError, OutputBusy, Problem, exit_code_of
from pipeline.core.run_report import RunReport
from pipeline.telemetry import prometheus, tracing
from pipeline.telemetry.logs import log_to_terminal
from pipeline.telemetry.run_metrics import PREFIX, SUCCESS, Figures

# How often the file is written anew, and how long a Pushgateway may take, in seconds.
REFRESH_SECONDS = 15.0
PUSH_SECONDS = 5.0
log = logging.getLogger(__name__)


class Monitor:
    """What a run tells as it goes; without ``metrics.textfile`` and ``metrics.pushgateway`` nobody listens."""

    def __init__(self, config: Config, run: str, *, began: float) -> None:
        self._config, self._wanted = config, config.metrics
        self._group = {} if config.cluster.part is None else {"part": config.cluster.part}
        self.labels = {
            "job": config.metrics.job,
            "model": config.model.name,
            "backend": config.backend.name,
            **self._group,
        }
        self.run, self._figures = run, Figures(run=run, began=began)
        self._path = None if self._wanted.textfile is None else Path(self._wanted.textfile).expanduser()
        self._url = self._wanted.pushgateway
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed = False
        if self._path is not None:
            own = {"job": self._wanted.job, **self._group}
            self._figures.succeeded = prometheus.read_value(self._path, f"{PREFIX}_{SUCCESS}", own)

    def looping(self, progress: Callable[[], Mapping[str, float]], *, resumed: int) -> None:
        """The loop begins: from now on the file follows it."""
        self._figures.progress, self._figures.resumed = progress, resumed
        if self._path is not None:
            self._thread = threading.Thread(target=self._refresh, name="metrics", daemon=True)
            self._thread.start()

    def finished(self, report: RunReport, *, dataset_bytes: int) -> None:
        """The report of the run is known; whether it ends well is not."""
        self._figures.report, self._figures.dataset_bytes = report, dataset_bytes

    def refused(self) -> None:
        """Another run is at work: what it tells stays."""
        self._path, self._url = None, None

    def ended(self, code: int) -> None:
        """Tell how the run ended."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(PUSH_SECONDS)
        self._figures.exit_code = code
        if code == 0:
            self._figures.succeeded = time.time()
        if self._path is not None:
            self._write(self._path)
        if self._url is not None:
            self._push(self._url)

    def _refresh(self) -> None:
        path = self._path
        assert path is not None
        while True:
            self._write(path)
            if self._ended.wait(REFRESH_SECONDS):
                return

    def _write(self, path: Path) -> None:
        try:
            prometheus.write_file(path, prometheus.to_registry(PREFIX, self.labels, self._figures.metrics()))
        except (OSError, ValueError) as error:
            if not self._failed:
                self._failed = True
                reason = getattr(error, "strerror", None) or error
                log.warning("metrics.textfile=%s cannot be written: %s", path, reason)

    def _push(self, url: str) -> None:
        registry = prometheus.to_registry(PREFIX, self.labels, self._figures.metrics())
        host, job = urlsplit(url).netloc, self._wanted.job

        def push() -> None:
            prometheus.push(url, registry, job=job, group=self._group, seconds=PUSH_SECONDS)

        try:
            # One that drips its answer would take longer than any single wait of the connection.
            aside(push, name="push").result(2 * PUSH_SECONDS)
        except (OSError, ValueError, LateError) as error:
            reason = str(error) or f"no answer in {2 * PUSH_SECONDS:g} s"
            log.warning("metrics.pushgateway: %s was not told: %s", host, reason)


@contextmanager
def monitored(config: Config, run: str, *, began: float) -> Iterator[Monitor]:
    """Around all of a run. One that is refused since another works at the same output tells nothing: the file is its.

    Raises:
        ConfigError: a package that the config wants is not installed; nothing was begun then.
    """
    _check(config)
    monitor = Monitor(config, run, began=began)
    # When the run has ended, the log of its output is closed.
    terminal = partial(log_to_terminal, config.log, run)
    code = 0
    with tracing.exported(run, monitor.labels, told=terminal) if config.metrics.opentelemetry else nullcontext():
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
    wanted, problems = config.metrics, []
    given = {"metrics.textfile": wanted.textfile, "metrics.pushgateway": wanted.pushgateway}
    for key, value in given.items():
        hint = None if value is None else prometheus.missing()
        problems += [] if hint is None else [Problem(key, value, hint)]
    hint = tracing.missing() if wanted.opentelemetry else None
    problems += [] if hint is None else [Problem("metrics.opentelemetry", True, hint)]
    if problems:
        raise ConfigError(problems)
