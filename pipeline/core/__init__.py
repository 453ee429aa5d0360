"""Records, errors, concurrency, processes, failpoints and the format of log lines."""
