"""Shared parts of the commands: parser, error line, exit code, signals and the end of the process."""

from __future__ import annotations

import argparse
import atexit
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from pipeline.core.concurrency import unfinished
from pipeline.core.errors import Interrupted, PipelineError, exit_code_of
from pipeline.core.log_format import JsonLines, ending
from pipeline.core.processes import give_home, mark_as_command

# The exit code that shells report for a program that SIGPIPE ended.
BROKEN_PIPE = 141
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class FolderGone(PipelineError):
    """The folder that a command was started in does not exist any more."""

    exit_code = 2


def command_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples and exit codes.

    Args:
        command: the command as it is typed, such as ``python -m pipeline.verify``.
    """
    return argparse.ArgumentParser(
        prog=command,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the overrides of the job's config to a parser."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for the job")


@dataclass(slots=True)
class ErrorOutput:
    """Output of the error that ends a command.

    Attributes:
        interrupted: the message for an interruption.
        formatter: the format of the log for ``log.format=json``, set once the config is read; None for text.
    """

    interrupted: str
    formatter: JsonLines | None = None

    def line(self, error: BaseException) -> str:
        """Return the line for an error, as text or in the format of the log."""
        if self.formatter is None:
            return f"error: {error}"
        return self.formatter.format(ending(error, exit_code_of(error)))

    def print(self, error: BaseException) -> int:
        """Print the line for an error, and return its exit code."""
        with suppress(OSError, ValueError):
            print(self.line(error), file=sys.stderr)
        return exit_code_of(error)

    def leave(self, number: int = 0, frame: FrameType | None = None) -> NoReturn:
        """End the process at once, as interrupted; usable as the handler of a signal."""
        with suppress(OSError):
            os.write(2, f"{self.line(Interrupted(self.interrupted))}\n".encode())
        os._exit(Interrupted.exit_code)


def run_command(work: Callable[[], int | None], errors: ErrorOutput) -> int:
    """Call ``work``; return its exit code, or print the line of the error that ends it and return that one's code.

    An unforeseen error is raised, or printed with its traceback where the log has a format of its own.
    """
    give_home()
    try:
        check_folder()
        return work() or 0
    except PipelineError as error:
        return errors.print(error)
    except KeyboardInterrupt:
        return errors.print(Interrupted(errors.interrupted))
    except Exception as error:
        if isinstance(error, RuntimeError) and _came_of_interrupt(error):
            return errors.print(Interrupted(errors.interrupted))
        if errors.formatter is None:
            raise
        return errors.print(error)


def _came_of_interrupt(error: BaseException | None) -> bool:
    """True if an error was raised while a KeyboardInterrupt was handled.

    One that comes while Python takes back the lock of a condition leaves it without, and its release is an error.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def check_folder() -> None:
    """Check that the current folder exists, where relative paths start, also those of libraries.

    Raises:
        FolderGone: it was removed, or lies on a disk that does not answer.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise FolderGone(
            f"the current folder is gone ({error.strerror}); change to another one, and run the same command again"
        ) from error


def provide_streams() -> None:
    """Discard what is written to a standard stream that the process was started without.

    A file that is opened later would get the descriptor of the stream, and what a library writes there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run a command as this process: SIGTERM interrupts it like Ctrl-C, and its return value is the exit code."""
    provide_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with quick_end(), own_exit_code():
        raise SystemExit(main())


@contextmanager
def quick_end() -> Iterator[None]:
    """End the process with the SystemExit of the body, or after it, as Python does, but leave its memory to the system.

    Python waits for threads, calls exit handlers, and then takes all modules apart, for half a second with torch. For
    the entry of a process, around all that it does; errors are left to Python.
    """
    mark_as_command()
    code: Any = None
    try:
        yield
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            # Python prints it.
            raise
    # A signal that comes now cannot end the process any sooner.
    with suppress(KeyboardInterrupt):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        # Python tries again, says what failed, and has an exit code for it.
        raise SystemExit(code) from None
    os._exit(int(code or 0) & 0xFF)


def showable(text: str) -> str:
    """Return the text with characters escaped that standard output cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_showable(text: str) -> None:
    """Print text with names of files, which may hold characters that standard output cannot encode."""
    print(showable(text), flush=True)


@contextmanager
def own_exit_code() -> Iterator[None]:
    """End the process with the exit code of the body's SystemExit, even if background threads are still running.

    Python stops such a thread when it returns from C++, and torch then aborts the process with exit code 134.
    If the reader of standard output is gone, as behind ``| head``, the process ends without a message; if it takes
    nothing more for another reason, as on a full disk, with exit code 1 and the reason.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _without_reader():
            raise SystemExit(BROKEN_PIPE) from None
        _check_output(b"\n")
        raise
    except SystemExit as end:
        if not _without_reader():
            _check_output()
        if unfinished():
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _check_output(probe: bytes = b"") -> None:
    """End the process with a message if standard output cannot be written; ``probe`` is written to see that."""
    try:
        number = sys.stdout.fileno()
        sys.stdout.flush()
        if probe:
            os.write(number, probe)
    except (BrokenPipeError, ValueError, AttributeError):
        return
    except OSError as error:
        # Python flushes once more at its end, and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        with suppress(OSError, ValueError):
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


def _without_reader() -> bool:
    """Return true if the reader of standard output is gone, and discard further output then."""
    try:
        number = sys.stdout.fileno()
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        poll = select.poll()
        poll.register(number, 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        if gone:
            # Python flushes once more at its end, and would print an error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    except (OSError, ValueError, AttributeError):
        return False
    return gone


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle SIGINT and SIGTERM with ``handler``."""
    for number in SIGNALS:
        signal.signal(number, handler)


def interrupt_within(grace: float, leave: Callable[[], None]) -> None:
    """Raise KeyboardInterrupt at the first signal; call ``leave`` at the second one, or after ``grace`` seconds.

    Python's own handlers wait for the main thread, which may be in a long call; so a thread measures the time.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    on_signals(_interrupt)
    threading.Thread(target=_watch, args=(ours, theirs, grace, leave), name="signals", daemon=True).start()


def _watch(signals: socket.socket, writer: socket.socket, grace: float, leave: Callable[[], None]) -> None:
    """Wait for the first signal, then for a second one or for the end of the grace; ``writer`` is kept open."""
    while signals.recv(1)[0] not in SIGNALS:
        continue
    end = time.monotonic() + grace
    while (left := end - time.monotonic()) > 0:
        if select.select([signals], [], [], left)[0] and signals.recv(1)[0] in SIGNALS:
            break
    leave()


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Later signals are left to the thread.
    on_signals(lambda number, frame: None)
    raise KeyboardInterrupt
