"""The nightly job: embed new and changed rows, carry the others from the previous night."""
