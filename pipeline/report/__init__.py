"""The report: clocks, progress, and the page that a person reads."""
