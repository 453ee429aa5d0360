"""Storage: files that are published whole, on a local disk or in an object store."""
