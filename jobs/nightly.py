"""The nightly job: embed new and changed rows of a manifest, carry the others, publish the dataset of a date."""

from pipeline.core.cli import own_exit_code
from pipeline.nightly.cli import main

if __name__ == "__main__":
    with own_exit_code():
        raise SystemExit(main())
