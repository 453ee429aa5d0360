"""The fields of a log line besides its message, such as run and shard, and the JSON format of ``log.format=json``."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from pipeline.core.errors import PipelineError

# Attributes of every record; all others were passed as ``extra``.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "plain"}
# Containers nested deeper are written as text, because one that holds itself would never end.
_DEPTH = 6
_SHARD: ContextVar[int | None] = ContextVar("shard", default=None)


def new_run() -> str:
    """A unique name for a run: its start (UTC) and four random bytes."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


@contextmanager
def within(shard: int) -> Iterator[None]:
    """Mark messages of this thread in the body, and an error that leaves it, with ``shard``."""
    token = _SHARD.set(shard)
    try:
        yield
    except Exception as error:
        if shard_of(error) is None:
            # Some exceptions take no attributes.
            with suppress(AttributeError):
                error.shard = shard  # type: ignore[attr-defined]
        raise
    finally:
        _SHARD.reset(token)


def shard_of(error: BaseException) -> int | None:
    """The shard in which an error was raised, if known."""
    found = getattr(error, "shard", None)
    return found if isinstance(found, int) else None


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The shard and the ``extra`` values of a message, as types that JSON has."""
    shard = _SHARD.get()
    fields: dict[str, Any] = {} if shard is None else {"shard": shard}
    given = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
    return {**fields, **_plain(given)}


class JsonLines(logging.Formatter):
    """A formatter that makes one JSON object of a message, on one line, in ASCII.

    ``time`` is UTC with milliseconds; ``error`` and ``traceback`` exist only for an exception. An extra field with one
    of the standard names gets a ``_`` appended.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        """The line; values of types that JSON lacks are written as text."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        content: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            # A text with a prefix for people, such as the worker, has its message here without the prefix.
            "message": str(getattr(record, "plain", None) or record.getMessage()),
        }
        if self._run:
            content["run"] = self._run
        content["process"] = record.process or os.getpid()
        extras = fields_of(record)
        if record.exc_info and record.exc_info[0] is not None:
            content["error"] = record.exc_info[0].__name__
            content["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        for name, value in extras.items():
            content[f"{name}_" if name in content else name] = value
        return _dumped(content)


def ending(error: BaseException, code: int | None = None) -> logging.LogRecord:
    """The log record of the error that ends a run, with a traceback if it is not a :class:`PipelineError`."""
    expected = isinstance(error, PipelineError)
    trace = None if expected else (type(error), error, error.__traceback__)
    text = error if expected else repr(error)
    record = logging.LogRecord("pipeline", logging.ERROR, __file__, 0, "%s", (text,), trace)
    found = {"error": type(error).__name__ if expected else None, "shard": shard_of(error), "exit_code": code}
    record.__dict__.update({name: value for name, value in found.items() if value is not None})
    return record


def _dumped(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, allow_nan=False)
    # Most readers of JSON reject a lone surrogate, which names of files may contain.
    return text if "\\ud" not in text else json.dumps(_whole(content), allow_nan=False)


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return str(value)
    if depth < _DEPTH and isinstance(value, Mapping):
        return {_text(key): _plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return object.__repr__(value)


# transformers imports torchao, if it is installed, to load any model.
SILENCED: tuple[tuple[str, str], ...] = (
    # Kernels that were built for another machine; it has others.
    ("torchao", "Failed to load "),
    # Its Triton kernels are for GPUs; torch.compile reports a missing Triton itself.
    ("torchao.kernel.intmm", "Warning: Detected no triton"),
    # A function that torch deprecates, called by torchao.
    ("torch.utils._pytree", "register_constant() on Enum subclasses is deprecated"),
)


class _Without(logging.Filter):
    """A filter that drops messages with these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the message."""
        return self.words not in record.getMessage()


def silence() -> None:
    """Drop the :data:`SILENCED` messages in this process."""
    for name, words in SILENCED:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) and each.words == words for each in logger.filters):
            logger.addFilter(_Without(words))
