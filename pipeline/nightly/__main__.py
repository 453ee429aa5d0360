"""``python -m pipeline.nightly``: the nightly job, the same as ``jobs/nightly.py`` in a checkout."""

from pipeline.core.cli import own_exit_code
from pipeline.nightly.cli import main

if __name__ == "__main__":
    with own_exit_code():
        raise SystemExit(main())
