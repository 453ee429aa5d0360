"""The main door: ``python -m pipeline.run [GROUP=OPTION ...] [KEY=VALUE ...]``."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.config.compose import check_overrides, groups, known_keys, register, to_config
from pipeline.config.hydra_guard import check_files
from pipeline.config.options import read_options
from pipeline.config.schema import conf_dir
from pipeline.core.concurrency import own_exit_code
from pipeline.core.errors import ConfigError, Interrupted, PipelineError, exit_code_of
from pipeline.core.log_format import JsonLines, ending, new_run

if TYPE_CHECKING:
    from omegaconf import DictConfig

# The first job of a process began with it; the process itself may be older, where a shell became it.
_began = iter([time.time()])
INTERRUPTED = "interrupted; what was committed stays, and the same command goes on from there"
DRY = "interrupted; nothing was written to the output"
_words_when_interrupted = INTERRUPTED
# The commands of Hydra's --shell-completion.
COMPLETION = ("install", "uninstall", "query")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# How this process says what ends it, where the config wants lines of JSON.
_formatter: JsonLines | None = None


def main() -> None:
    """Read the command line, run the job, exit with the code that :mod:`pipeline.core.errors` explains."""
    # An exception out of a signal handler may get lost among the imports; until they are done, leave at once.
    _on_signals(_leave)
    # The million objects that imports make are no garbage: looking for some less often saves a tenth of the start-up.
    gc.set_threshold(100_000, 20, 50)
    import hydra

    options, problems = read_options([*groups(conf_dir()), *known_keys()])
    register()
    if options.shell_completion:
        # What completion is told to do looks like overrides; all else is checked as ever.
        options.overrides = [text for text in options.overrides if text.partition("=")[0] not in COMPLETION]
    problems += check_overrides(options.overrides, sweep=options.multirun)
    # Composed with overrides that are good, so only when these are.
    problems = problems or check_files(options)
    if problems:
        _exit(ConfigError(problems))
    with own_exit_code():
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_task)()


def _task(composed: DictConfig) -> None:
    global _formatter, _words_when_interrupted
    opened, run = ExitStack(), new_run()
    try:
        config = to_config(composed)
        _formatter = JsonLines(run) if config.log.format == "json" else None
        from pipeline.telemetry.logs import library_messages

        opened.enter_context(library_messages(config.log, run))
        from pipeline.images.factory import open_decoders

        # While this process imports torch, which takes seconds, its decoders start.
        decoders = open_decoders(config) if config.cluster.name == "inline" else None
        if decoders is not None:
            decoders.start()
        if config.run.dry:
            from pipeline.job.estimate.estimate import estimate_job

            _words_when_interrupted = DRY
            _interrupt_within(config.errors.grace_seconds)
            if code := estimate_job(config, began=next(_began, None), decoders=decoders, run=run).exit_code:
                sys.exit(code)
            return
        from pipeline.job.main import run_job

        _interrupt_within(config.errors.grace_seconds)
        run_job(config, began=next(_began, None), decoders=decoders, run=run)
    except KeyboardInterrupt:
        _exit(Interrupted(_words_when_interrupted))
    except PipelineError as error:
        _exit(error)
    except Exception as error:
        if _formatter is None:
            raise
        _exit(error)
    finally:
        opened.close()
        _leave_dead_terminal()


def _leave_dead_terminal() -> None:
    """Where standard error has gone away, Python would fail to flush it at the end, with exit code 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for what is left of the process


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _interrupt_within(grace: float) -> None:
    """The first signal drops the shard at hand and lets finished ones be written; after ``grace`` seconds, or with a
    second signal, the process ends at once.

    Python's own handlers wait for the main thread, which may be in a long call; so a thread keeps the time.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    _on_signals(_interrupt)
    threading.Thread(target=_watch, args=(ours, theirs, grace), name="signals", daemon=True).start()


def _watch(signals: socket.socket, writer: socket.socket, grace: float) -> None:
    """Wait for the first signal, then for a second one or for the end of the grace; ``writer`` is kept open."""
    while signals.recv(1)[0] not in SIGNALS:
        continue
    end = time.monotonic() + grace
    while (left := end - time.monotonic()) > 0:
        if select.select([signals], [], [], left)[0] and signals.recv(1)[0] in SIGNALS:
            break
    _leave()


def _leave(number: int = 0, frame: FrameType | None = None) -> None:
    with suppress(OSError):
        os.write(2, f"{_words(Interrupted(_words_when_interrupted))}\n".encode())
    os._exit(Interrupted.exit_code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _on_signals(_again)
    raise KeyboardInterrupt


def _again(number: int, frame: FrameType | None) -> None:
    """Left to the thread that keeps the time."""


def _words(error: BaseException) -> str:
    return f"error: {error}" if _formatter is None else _formatter.format(ending(error, exit_code_of(error)))


def _exit(error: BaseException) -> None:
    # Hydra turns exceptions into exit code 1; SystemExit passes through.
    with suppress(OSError, ValueError):
        print(_words(error), file=sys.stderr)
    raise SystemExit(exit_code_of(error))


if __name__ == "__main__":
    main()
