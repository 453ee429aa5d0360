"""The report of a run: figures, plots and the HTML page."""
