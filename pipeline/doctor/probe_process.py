"""``python -m pipeline.doctor.probe_process``: one probe after the other, in a process that may hang or crash.

A line of JSON on standard input says what to look at, lines of JSON on standard output what was found. When the input
ends, as it does when the parent dies, this process ends too, with all that it started.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
from typing import Any, get_type_hints

from pipeline.config.schema import Config
from pipeline.doctor.check import Check, Status, Subject
from pipeline.doctor.probes import Entry, entry


def main() -> int:
    """Run the probes that the input names."""
    signal.signal(signal.SIGTERM, _end)
    # Libraries print to standard output: there they find standard error, and the findings go their own way.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as findings:
        os.dup2(2, 1)
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
        told = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_watch, daemon=True).start()
        if told["caches"]:
            # What is compiled here is not kept for jobs either.
            os.environ |= {"TORCHINDUCTOR_CACHE_DIR": told["caches"], "TRITON_CACHE_DIR": told["caches"]}
        config = None if told["config"] is None else _config(told["config"])
        subject = Subject(config=config, quick=told["quick"], temporary=told["temporary"], scratch=told["scratch"])

        def tell(line: dict[str, Any]) -> None:
            findings.write(json.dumps(line) + "\n")
            findings.flush()

        for name in told["probes"]:
            tell({"begin": name})
            for check in _look(entry(name), subject):
                tell({"check": to_json(check)})
            tell({"end": name})
    sys.stderr.flush()
    # Threads that hang somewhere are not waited for.
    os._exit(0)


def to_json(check: Check) -> dict[str, Any]:
    """The check as plain JSON."""
    return {name: getattr(check, name) for name in ("group", "name", "status", "fact", "way_out")} | {
        "figures": {name: round(value, 6) for name, value in check.figures.items() if math.isfinite(value)}
    }


def from_json(content: dict[str, Any]) -> Check:
    """The check of :func:`to_json`."""
    return Check(**{**content, "status": Status(content["status"])})


def _look(probe: Entry, subject: Subject) -> Any:
    try:
        yield from probe.load()(subject)
    except Exception as error:
        # Whatever it is, the other probes go on.
        traceback.print_exc()
        words = (str(error).strip().splitlines() or [""])[0]
        yield Check(probe.group, probe.module, Status.FAIL, f"this check broke off: {type(error).__name__}: {words}",
                    _advice(error))  # fmt: skip


def _advice(error: Exception) -> str:
    from pipeline.doctor.versions import install

    if isinstance(error, ImportError) and not (error.name or "").startswith("pipeline"):
        return f"a package is missing or broken: {install()}"
    return "where no other line explains it, this is a flaw of the pipeline: please report it"


def _config(values: dict[str, Any]) -> Config:
    return Config(**{name: kind(**values[name]) for name, kind in get_type_hints(Config).items()})


def _watch() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def _end(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
