"""Executors of shards: this process, parts of a job, Dask workers."""
