"""``python -m pipeline.bench.worker``: a child process that measures one backend, or the stages of a job, on request.

Each line of standard input is a request in JSON, each line of standard output the answer to one. The first request
sets up. At the end of its input the process ends at once, with all processes that it started.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import Any, BinaryIO

from pipeline.core.errors import PipelineError

# The classes that the first request may set up.
SUBJECTS = {
    "backend": ("pipeline.bench.backend_worker", "Backend"),
    "stages": ("pipeline.bench.stages_worker", "Stages"),
}


def main() -> int:
    """Answer requests until the input ends."""
    # Libraries print to standard output: from here on that is standard error, and the answers have a pipe of their own.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        subject: Any = None
        for request in _requests(sys.stdin.buffer):
            answer: dict[str, Any] = {}
            try:
                if subject is None:
                    subject = _set_up(**request)
                else:
                    answer = getattr(subject, request.pop("do"))(**request)
            except PipelineError as error:
                answer = {"error": str(error), "exit_code": error.exit_code}
            except Exception as error:
                # Backends raise their runtimes' own exceptions, of many kinds.
                traceback.print_exc()
                first = next(iter(str(error).splitlines()), "")
                answer = {"error": f"{type(error).__name__}: {first}", "exit_code": 1}
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
    return 0


def _set_up(kind: str, **arguments: Any) -> Any:
    module, name = SUBJECTS[kind]
    return getattr(import_module(module), name)(**arguments)


def _requests(source: BinaryIO) -> Iterator[dict[str, Any]]:
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in source:
            lines.put(line)
        # The parent has closed the pipe, or has ended.
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


if __name__ == "__main__":
    raise SystemExit(main())
