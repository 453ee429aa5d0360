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
from pipeline.errors import PipelineError
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage

NAME = "_run.log"


class _Terminal(logging.Handler):
    """Writes above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one sentence; a terminal that has gone away does not end the job."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        with suppress(OSError, ValueError, AttributeError):
            tqdm.write(f"{level}{record.getMessage()}", file=sys.stderr)


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
def log_to(storage: Storage) -> Iterator[None]:
    """Send the package's log to the terminal and to ``_run.log``, with the error that ends the run, if any.

    An object store gets the log at the end.
    """
    root = logging.getLogger("pipeline")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / NAME
        if isinstance(storage, LocalStorage):
            storage.make()
            path = storage.root / NAME
        with explained(str(path)):
            file = logging.FileHandler(path, encoding="utf-8")
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
                storage.write(NAME, path.read_bytes())
