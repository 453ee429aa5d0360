"""Where shards run: in this process, in a part of a job, or on Dask workers."""
