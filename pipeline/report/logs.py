"""The log: plain sentences on the terminal, the same with times in ``_run.log`` beside the dataset."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from pipeline.addresses import explained
from pipeline.errors import PipelineError, StorageError
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage

NAME = "_run.log"


class _Terminal(logging.Handler):
    """Writes above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one sentence; a terminal that has gone away does not end the job."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        _say(f"{level}{record.getMessage()}")


class _File(logging.FileHandler):
    """Writes with times to a file; where that fails, as on a full disk, the terminal hears of it once."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that the log is not whole."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._tell(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Close the file; what the disk has no room for is lost."""
        try:
            super().close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            _say(f"warning: {self.baseFilename}: {error.strerror or error}; lines of the log are lost")


def _say(text: str) -> None:
    with suppress(OSError, ValueError, AttributeError):
        tqdm.write(text, file=sys.stderr)


@contextmanager
def log_to_terminal() -> Iterator[None]:
    """Send the package's log to the terminal alone, for doors that make no dataset."""
    root, handler = logging.getLogger("pipeline"), _Terminal()
    level, propagate = root.level, root.propagate
    root.setLevel(logging.INFO)
    root.propagate = False
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        root.propagate = propagate


@contextmanager
def log_to(storage: Storage, name: str = NAME) -> Iterator[None]:
    """Send the package's log to the terminal and to the file ``name`` of the output, with the error that ends the run.

    An object store gets the log at the end.
    """
    root = logging.getLogger("pipeline")
    with _path(storage, name) as path:
        with explained(str(path)):
            file = _File(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers: list[logging.Handler] = [_Terminal(), file]
        level, propagate = root.level, root.propagate
        root.setLevel(logging.INFO)
        root.propagate = False
        for handler in handlers:
            root.addHandler(handler)
        try:
            yield
        except BaseException as error:
            # The terminal hears of it from the door.
            fact = error if isinstance(error, PipelineError) else repr(error)
            trace = None if isinstance(error, PipelineError) else (type(error), error, error.__traceback__)
            file.handle(logging.LogRecord("pipeline", logging.ERROR, __file__, 0, "%s", (fact,), trace))
            raise
        finally:
            for handler in handlers:
                root.removeHandler(handler)
                handler.close()
            root.setLevel(level)
            root.propagate = propagate
            if not isinstance(storage, LocalStorage):
                # Nothing depends on the log: a store that is away hides neither the dataset nor the error.
                try:
                    storage.write(name, path.read_bytes())
                except StorageError as error:
                    _say(f"warning: {error}; the log of this run is lost")


@contextmanager
def _path(storage: Storage, name: str) -> Iterator[Path]:
    """Where the log is written while the run goes on."""
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
