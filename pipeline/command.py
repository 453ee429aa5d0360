"""The command ``clip-pipeline``, which is ``python -m pipeline`` too: the main job, or another door by its name."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping

from pipeline.config.schema import nearest

# Every door and its module, which does what ``python -m MODULE`` does.
DOORS: Mapping[str, str] = {
    "run": "pipeline.run",
    "manifest": "pipeline.manifest",
    "nightly": "pipeline.nightly",
    "bench": "pipeline.bench",
    "export": "pipeline.export",
    "artifacts": "pipeline.artifacts",
    "verify": "pipeline.verify",
    "relabel": "pipeline.relabel",
    "search": "pipeline.search",
    "convert": "pipeline.convert",
    "doctor": "pipeline.doctor",
    "report": "pipeline.report",
    "serve": "pipeline.serve",
}


def main() -> None:
    """Open the door that the first word names; without such a word, run the main job with what was typed."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in DOORS:
        del sys.argv[1]
        if word != "run":
            runpy.run_module(DOORS[word], run_name="__main__", alter_sys=True)
            return
    elif word.isalpha():
        # What is told to the main job has an = or begins with a -.
        hint = nearest(word, DOORS)
        print(f"error: {word}: there is no such command{f'; {hint}' if hint else ''}", file=sys.stderr)
        print(f"there are {', '.join(DOORS)}; without one, the main job runs", file=sys.stderr)
        raise SystemExit(2)
    # In this process's own module, so that shells complete its options.
    from pipeline.run import main as run

    run()
