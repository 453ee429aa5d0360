"""``python -m pipeline.bench.worker``: a child process that measures one backend on request."""

from __future__ import annotations

import traceback
from typing import Any

from pipeline.core.child import Parent
from pipeline.core.errors import PipelineError


def main() -> None:
    """Set up the backend of the first request, then answer the others, until the parent ends this process."""
    # Before the imports, which take seconds: it ends the process with its parent.
    parent = Parent()
    backend: Any = None
    while True:
        request = parent.receive()
        answer: dict[str, Any] = {}
        try:
            if backend is None:
                from pipeline.bench.backend_worker import Backend

                backend = Backend(**request)
            else:
                answer = getattr(backend, request.pop("do"))(**request)
        except PipelineError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:
            # Backends raise their runtimes' own exceptions, of many kinds.
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            answer = {"error": f"{type(error).__name__}: {first}", "exit_code": 1}
        parent.send(answer)


if __name__ == "__main__":
    main()
