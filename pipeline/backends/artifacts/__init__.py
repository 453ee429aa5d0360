"""Models exported for other runtimes, in a store keyed by fingerprint."""
