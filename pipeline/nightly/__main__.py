"""``python -m pipeline.nightly``: the nightly job, the same as ``jobs/nightly.py`` in a checkout."""

from pipeline.core.cli import run_process
from pipeline.nightly.cli import main

if __name__ == "__main__":
    run_process(main)
