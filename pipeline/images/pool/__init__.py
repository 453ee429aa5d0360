"""Decoder processes: the pool, the protocol and the worker."""
