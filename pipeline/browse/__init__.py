"""A web page over finished datasets: look, search, filter, export."""
