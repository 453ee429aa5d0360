"""Backends: the same model on different runtimes, each in the module of its name."""
