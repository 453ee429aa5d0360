"""``python -m pipeline.nightly``: the nightly job where no checkout is, the same as ``jobs/nightly.py`` in one."""

from pipeline.core.cli import own_exit_code
from pipeline.nightly.cli import main

if __name__ == "__main__":
    with own_exit_code():
        raise SystemExit(main())
