"""``python -m pipeline``, also installed as ``clip-pipeline``: the main job, or another command by its name."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping

from pipeline.config.schema import nearest

# The module of every command, which runs like ``python -m MODULE``.
COMMANDS: Mapping[str, str] = {
    "run": "pipeline.run",
    "manifest": "pipeline.manifest",
    "nightly": "pipeline.nightly",
    "bench": "pipeline.bench",
    "export": "pipeline.export",
    "artifacts": "pipeline.artifacts",
    "verify": "pipeline.verify",
    "relabel": "pipeline.relabel",
    "search": "pipeline.search",
    "browse": "pipeline.browse",
    "convert": "pipeline.convert",
    "dedup": "pipeline.dedup",
    "sample": "pipeline.sample",
    "doctor": "pipeline.doctor",
    "report": "pipeline.report",
    "serve": "pipeline.serve",
}


def main() -> None:
    """Run the command that the first argument names, or the main job with all arguments."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in COMMANDS:
        del sys.argv[1]
        if word != "run":
            runpy.run_module(COMMANDS[word], run_name="__main__", alter_sys=True)
            return
    elif word.isalpha():
        # Arguments of the main job have an = or begin with a -.
        hint = nearest(word, COMMANDS)
        print(f"error: {word}: there is no such command{f'; {hint}' if hint else ''}", file=sys.stderr)
        print(f"there are {', '.join(COMMANDS)}; without one, the main job runs", file=sys.stderr)
        raise SystemExit(2)
    # Within this module, so that shells complete the options of the main job.
    from pipeline.core.cli import quick_end
    from pipeline.run import main as run

    with quick_end():
        run()


if __name__ == "__main__":
    main()
