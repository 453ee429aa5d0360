"""The nightly job: embed new and changed rows of a manifest, carry the others, publish the dataset of a date."""

from pipeline.core.cli import run_process
from pipeline.nightly.cli import main

if __name__ == "__main__":
    run_process(main)
