"""Benchmarks of the backends and of the stages of a job on this machine."""
