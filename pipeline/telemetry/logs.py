"""The log of a run: text or JSON lines on the terminal, and with times in ``_run.log`` beside the dataset."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from pipeline.config.schema import Config, LogConfig
from pipeline.core.errors import StorageError
from pipeline.core.log_format import JsonLines, ending
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import explained

NAME = "_run.log"
JSON = "json"
_TIMES = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Terminal(logging.Handler):
    """A handler that writes above a progress bar, if there is one."""

    def __init__(self, form: LogConfig, run: str) -> None:
        super().__init__(form.level.upper())
        if form.format == JSON:
            self.setFormatter(JsonLines(run))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message; a closed terminal does not end the job."""
        text = self.format(record)
        with suppress(OSError, ValueError, AttributeError):
            tqdm.write(text, file=sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        """The message, with its level above INFO, and with its logger outside of this package."""
        if self.formatter is not None:
            return self.formatter.format(record)
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        ours = record.name.partition(".")[0] == "pipeline"
        return f"{level}{record.getMessage()}" if ours else f"{level}{record.name}: {record.getMessage()}"

    def warn(self, text: str) -> None:
        """Write a warning to the terminal only."""
        self.handle(_record(logging.WARNING, text))


class _File(logging.FileHandler):
    """A handler that writes with times to a file; a failure, such as a full disk, is one warning on the terminal."""

    _failed = False

    def __init__(self, path: Path, terminal: _Terminal) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._terminal = terminal
        self.setFormatter(terminal.formatter or logging.Formatter(_TIMES))

    def handleError(self, record: logging.LogRecord) -> None:
        """Warn that the log is incomplete."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._warn(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Close the file; lines that do not fit on the disk are lost."""
        try:
            super().close()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._terminal.warn(f"{self.baseFilename}: {error.strerror or error}; lines of the log are lost")


class _Libraries(logging.Handler):
    """A handler that passes the warnings of libraries to the current handlers of this package."""

    def __init__(self, terminal: _Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one message on."""
        try:
            record.getMessage()
        except Exception:
            # The arguments do not fit the format; an error of a library must not end the job.
            record.msg, record.args = f"{record.msg!r} {record.args!r}", None
        for handler in [*logging.getLogger("pipeline").handlers] or [self._terminal]:
            if record.levelno >= handler.level:
                handler.handle(record)


@contextmanager
def library_messages(form: LogConfig, run: str) -> Iterator[None]:
    """Log the warnings of libraries under their names.

    For the entry point of a process, because it changes process-wide settings.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        parts = Path(filename).parts
        # The library as it is installed, else the folder of the file.
        name = parts[parts.index("site-packages") + 1] if "site-packages" in parts else parts[-2:][0]
        record = _record(logging.WARNING, str(message), name)
        record.category, record.place = category.__name__, f"{'/'.join(parts[-2:])}:{lineno}"
        handler.handle(record)

    root, handler, before = logging.getLogger(), _Libraries(_Terminal(form, run)), warnings.showwarning
    root.addHandler(handler)
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        root.removeHandler(handler)


@contextmanager
def log_to_terminal(form: LogConfig | None = None, run: str = "") -> Iterator[None]:
    """Send the package's log to the terminal only: for commands that make no dataset, and around jobs that do."""
    with _handlers(_Terminal(form or LogConfig(), run)):
        yield


@contextmanager
def log_to(storage: Storage, name: str = NAME, *, form: LogConfig | None = None, run: str = "") -> Iterator[None]:
    """Send the package's log to the terminal and to the file ``name`` of the output, with the error that ends the run.

    An object store gets the log at the end. ``run`` names the run: in every line of JSON, once in a file of text.
    """
    terminal = _Terminal(form or LogConfig(), run)
    with _path(storage, name) as path:
        with explained(str(path)):
            file = _File(path, terminal)
        if run and file.formatter is not terminal.formatter:
            file.handle(_record(logging.INFO, f"run {run}"))
        try:
            with _handlers(terminal, file):
                try:
                    yield
                except BaseException as error:
                    # The command prints the error on the terminal.
                    file.handle(ending(error))
                    raise
        finally:
            file.close()
            if not isinstance(storage, LocalStorage):
                # The log is not essential: an unreachable store must hide neither the dataset nor the error.
                try:
                    storage.write(name, path.read_bytes())
                except StorageError as error:
                    terminal.warn(f"{error}; the log of this run is lost")


def progress_mode(config: Config) -> str:
    """``report.progress``, but never a bar among lines of JSON."""
    mode = config.report.progress
    return "plain" if config.log.format == JSON and mode in ("auto", "bar") else mode


@contextmanager
def _handlers(*handlers: logging.Handler) -> Iterator[None]:
    """Send the package's log to these handlers, and not to those of a log that was opened before."""
    root = logging.getLogger("pipeline")
    level, propagate = root.level, root.propagate
    before = [handler for handler in root.handlers if isinstance(handler, _Terminal | _File)]
    root.setLevel(logging.INFO)
    root.propagate = False
    _exchange(root, before, handlers)
    try:
        yield
    finally:
        _exchange(root, handlers, before)
        root.setLevel(level)
        root.propagate = propagate


def _exchange(root: logging.Logger, old: Sequence[logging.Handler], new: Sequence[logging.Handler]) -> None:
    for handler in old:
        root.removeHandler(handler)
    for handler in new:
        root.addHandler(handler)


def _record(level: int, text: str, name: str = "pipeline") -> logging.LogRecord:
    """A message without a logger."""
    return logging.LogRecord(name, level, __file__, 0, "%s", (text,), None)


@contextmanager
def _path(storage: Storage, name: str) -> Iterator[Path]:
    """The path of the log during the run."""
    if isinstance(storage, LocalStorage):
        storage.make()
        path = storage.root / name
        with explained(str(path)):
            path.parent.mkdir(exist_ok=True)
        yield path
        return
    with explained("a temporary folder for the log (TMPDIR)"):
        scratch = tempfile.TemporaryDirectory()
    with scratch as folder:
        yield Path(folder) / NAME
