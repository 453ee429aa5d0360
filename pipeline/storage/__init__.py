"""Storage: files that are published atomically, on a local disk or in an object store."""
