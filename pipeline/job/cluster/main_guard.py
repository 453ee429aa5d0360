"""Detection of a script without a main guard, which every process of a cluster on this machine would run again.

Python imports the script of a program in each process that it spawns. What stands at the script's top level runs there
too, and a job there would start a cluster of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import ClusterUnavailable
from pipeline.storage.local import temporary_folder

# The file that a process creates in which the script began its job again.
VARIABLE = "PIPELINE_SCRIPT_RAN_AGAIN"


def leave_if_run_again() -> None:
    """End this process if a cluster has spawned it, and it is importing the script of the job."""
    mark = os.environ.get(VARIABLE)
    # The attribute that Python's own check of the same mistake reads.
    if mark is not None and getattr(multiprocessing.current_process(), "_inheriting", False):
        Path(mark).touch()
        os._exit(ClusterUnavailable.exit_code)


@contextmanager
def watched() -> Iterator[Path]:
    """Yield the file that exists once a process has run the script again."""
    before = os.environ.get(VARIABLE)
    with temporary_folder() as folder:
        mark = folder / "again"
        os.environ[VARIABLE] = str(mark)
        try:
            yield mark
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def refuse(cluster: str) -> None:
    """Print the message, and end the program: its own top level is wrong, and no caller can mend that."""
    script = getattr(sys.modules["__main__"], "__file__", "the script")
    print(
        f"error: cluster={cluster}: {script} has no main guard, so that every process of the cluster runs all of it "
        'again; put its statements into a function main(), and call that under: if __name__ == "__main__":',
        file=sys.stderr,
    )
    raise SystemExit(ClusterUnavailable.exit_code)
