"""``python -m pipeline.bench.worker``: one backend, or the stages, in a process of its own, measured on request.

A line of JSON on standard input is a request, a line on standard output its answer. The first request sets up.
At the end of its input the process ends at once, whatever it is doing, with all that it started.
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

# What the first request may set up.
SUBJECTS = {
    "backend": ("pipeline.bench.backend_worker", "Subject"),
    "stages": ("pipeline.bench.stages_worker", "Stages"),
}


def main() -> int:
    """Answer requests until the input ends."""
    # Libraries print to standard output: there they find standard error, and the answers go their own way.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        requests = _requests(sys.stdin.buffer)
        subject: Any = None
        for request in requests:
            try:
                handle = _set_up if subject is None else getattr(subject, request.pop("do"))
                answer = handle(**request)
                if subject is None:
                    subject, answer = answer["subject"], {}
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


def _set_up(kind: str = "backend", **request: Any) -> dict[str, Any]:
    module, name = SUBJECTS[kind]
    return {"subject": getattr(import_module(module), name)(**request)}


def _requests(source: BinaryIO) -> Iterator[dict[str, Any]]:
    waiting: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in source:
            waiting.put(line)
        # The parent is done, or gone.
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(waiting.get())


if __name__ == "__main__":
    raise SystemExit(main())
