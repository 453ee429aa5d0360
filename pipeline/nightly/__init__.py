"""The nightly job: embed new and changed rows, carry the others from the night before."""
